"""``fit`` on a GPU: every flow, recorded and compiled steps, the verdict, checkpoints."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flowguides as fg
from pyro_flowguides.flows import FLOWS
from pyro_flowguides.inference import checkpoint, step_loop
from pyro_flowguides.inference.compiled_steps import CapturedSteps

pytestmark = pytest.mark.gpu


def regression(x, y):
    with pyro.plate("coefficients", x.shape[1], device=x.device):
        slope = pyro.sample("slope", dist.Normal(x.new_zeros(()), 1.0))
    noise = pyro.sample("noise", dist.HalfNormal(x.new_ones(())))
    with pyro.plate("rows", len(x), device=x.device):
        pyro.sample("y", dist.Normal((slope[..., None, :] * x).sum(-1), noise), obs=y)


@pytest.fixture
def data():
    x = torch.randn(50, 3, device="cuda")
    return x, x.sum(-1) + 0.5 * torch.randn(50, device="cuda")


def fit(guide, data, **options):
    result = fg.fit(regression, guide, *data, progress=False, **{"steps": 1000, **options})
    assert all(parameter.is_cuda for parameter in guide.parameters())
    assert abs(result.diagnosis.elbo - result.diagnosis.log_evidence) < 0.3
    assert result.diagnosis.verdict != "do not trust"
    return result


@pytest.mark.parametrize("flow", FLOWS)
def test_every_flow(flow, data):
    assert fit(fg.AutoFlow(regression, flow).cuda(), data, compile=False).route.kind == "recorded"


@pytest.mark.parametrize("flow", ["planar", "iaf"])
def test_steps_are_captured_by_default(flow, data, monkeypatch):
    monkeypatch.setattr(step_loop, "compile_steps", CapturedSteps)  # and in no other form if they cannot be captured
    assert fit(fg.AutoFlow(regression, flow).cuda(), data).route.kind == "compiled"


def test_the_default_device(data):
    torch.set_default_device("cuda")
    try:
        fit(fg.AutoIAF(regression), data, compile=False)
    finally:
        torch.set_default_device(None)


def test_a_fit_is_resumed(tmp_path, data, monkeypatch):
    def make():
        pyro.clear_param_store()  # so that parameters get the same names
        return fg.AutoPlanar(regression).cuda()

    def write_and_stop(*args):
        write(*args)
        raise KeyboardInterrupt

    write, options = checkpoint.save, {"checkpoint": tmp_path / "fit.pt", "checkpoint_every": 50, "compile": False}
    whole = fit(make(), data, compile=False).guide
    monkeypatch.setattr(checkpoint, "save", write_and_stop)
    with pytest.raises(KeyboardInterrupt):
        fit(make(), data, **options)
    monkeypatch.undo()
    resumed = fit(make(), data, **options).guide
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
