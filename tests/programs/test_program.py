"""A program is inspected once; its mode is found once and serves fit, diagnosis and export."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pyro_flowguides as fg
from pyro_flowguides.programs.batched_run import NotVectorizedError, RunMode
from pyro_flowguides.programs.program import Program
from pyro_flowguides.programs.simulation import simulate

DATA = torch.tensor([0.3, -0.4, 1.2])


def broadcasting(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    pyro.deterministic("twice", 2 * mean)
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, scale), obs=y)


def written_for_one_draw(y):
    slope = pyro.sample("slope", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(torch.eye(3) @ slope, 1.0).to_event(1), obs=y)


def branching(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    scale = 1.0 if mean.item() > 0 else 2.0
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, scale), obs=y)


def test_one_run_of_each_shows_the_structure():
    program = Program.inspect(broadcasting, AutoNormal(broadcasting), (DATA,))
    assert list(program.latents) == ["mean", "scale"]
    assert list(program.observed) == ["y"]
    assert list(program.deterministics) == ["twice"]
    assert [plate.name for plate in program.observed["y"].plates] == ["data"]
    assert program.nesting == 1
    assert len(program.parameters) == 4


def test_inspection_uses_up_no_random_numbers():
    guide = AutoNormal(broadcasting)
    guide(DATA)
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    Program.inspect(broadcasting, guide, (DATA,))
    assert torch.equal(torch.randn(4), expected)


@pytest.mark.parametrize(
    ("model", "mode"),
    [(broadcasting, RunMode.PLATE), (written_for_one_draw, RunMode.MAPPED), (branching, RunMode.SINGLE)],
)
def test_fit_diagnosis_and_export_agree_on_how_the_model_runs(model, mode):
    result = fg.fit(model, AutoNormal(model), DATA, steps=4, progress=False)
    assert result.program.mode is mode
    assert result.diagnosis is not None
    program = result.program
    result.to_inference_data(num_samples=10)
    assert result.program is program
    assert program.mode is mode


def test_both_reasons_are_given_where_a_model_takes_one_draw_at_a_time():
    guide = AutoNormal(branching)
    guide(DATA)
    program = Program.inspect(branching, guide, (DATA,))
    with pytest.raises(NotVectorizedError) as error:
        program.in_fastest_mode(lambda mode: mode.missing)
    for mode in (RunMode.PLATE, RunMode.MAPPED):
        assert f"{mode.value}, AttributeError" in str(error.value)


def test_a_slower_mode_is_never_followed_by_a_faster_one():
    """The export does not try again what the diagnosis has refused at extreme draws."""
    guide = AutoNormal(broadcasting)
    guide(DATA)
    program = Program.inspect(broadcasting, guide, (DATA,))

    def only_mapped(mode):
        if mode is RunMode.PLATE:
            raise NotVectorizedError("no")
        return mode

    assert program.in_fastest_mode(only_mapped) is RunMode.MAPPED
    assert program.in_fastest_mode(lambda mode: mode) is RunMode.MAPPED


def test_a_latent_site_of_the_guide_alone_is_refused_by_fit_too():
    """Nothing in the model would bound its density: the ELBO could grow forever."""

    def guide(y):
        scale = pyro.param("width", torch.tensor(0.5))
        pyro.sample("mean", dist.Normal(0.0, scale))
        pyro.sample("scale", dist.LogNormal(0.0, scale))
        pyro.sample("surplus", dist.Normal(0.0, scale))

    with pytest.raises(ValueError, match="'surplus' of the guide is not latent in the model"):
        fg.fit(broadcasting, guide, DATA, steps=2, progress=False)


def test_parameters_and_data_are_drawn_from_the_model():
    torch.manual_seed(0)
    parameters, data = simulate(broadcasting, (DATA,))
    assert sorted(parameters) == ["mean", "scale"]
    assert data["y"].shape == DATA.shape
    assert not torch.equal(data["y"], DATA)
