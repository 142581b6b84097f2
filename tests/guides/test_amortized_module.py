"""AutoAmortizedFlow is a module like any other: parameters, copies, files, conversions, lists of guides."""

import copy
import io
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal

import pyro_flowguides as fg
from tests.guides.hierarchies import B, M, Y, encoder, hierarchy, make, only_local, ready, several, step, unchanged
from tests.guides.zoo import F64, draw, same, values


def test_parameters_exist_after_the_first_run():
    guide = make()
    for request in (lambda: list(guide.parameters()), guide.state_dict):
        with pytest.raises(RuntimeError, match=r"guide.setup\(\*args, \*\*kwargs\)"):
            request()
    guide.setup(Y)
    names = {name.split(".")[0] for name, _ in guide.named_parameters()}
    assert names == {"local", "globals"}
    torch.optim.Adam(guide.parameters())


@pytest.mark.parametrize("model", [hierarchy, several, only_local])
@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "state_dict", "torch.save"])
def test_copies(model, copier):
    guide = ready(model)
    step(model, guide)
    if copier == "state_dict":
        other = make(model)
        with pytest.raises(RuntimeError, match=r"guide\.setup"):
            other.load_state_dict(guide.state_dict())
        other.setup(Y)
        other.load_state_dict(guide.state_dict())
    elif copier == "deepcopy":
        other = copy.deepcopy(guide)
    elif copier == "pickle":
        other = pickle.loads(pickle.dumps(guide))
    else:
        buffer = io.BytesIO()
        torch.save(guide, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert same(draw(guide, Y), draw(other, Y))
    before = values(guide)
    step(model, other)
    assert same(before, values(guide))
    assert not same(before, values(other))


def test_a_copy_before_the_first_run():
    guide = copy.deepcopy(make())
    assert guide(Y)["theta"].shape == (B,)


def test_unpickled_without_its_model():
    guide = ready(lambda y: hierarchy(y))
    other = pickle.loads(pickle.dumps(guide))
    with pytest.raises(RuntimeError, match=r"guide.model = model"):
        other(Y)
    other.model = hierarchy
    assert same(draw(guide, Y), draw(other, Y))


def test_two_guides_are_independent():
    first, second = make(), make()
    step(hierarchy, first)
    kept = values(first)
    second.setup(Y)
    before = values(second)
    for _ in range(2):
        step(hierarchy, second)
    assert same(kept, values(first))
    assert not unchanged(second, before)


def test_a_saved_parameter_store_is_used(tmp_path):
    guide = make()
    step(hierarchy, guide)
    kept = values(guide)
    pyro.get_param_store().save(tmp_path / "store.pt")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store.pt")
    fresh = make()
    fresh(Y)
    assert same(kept, values(fresh))


def test_dtypes_of_the_model_and_of_conversions():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", len(y)):
            pyro.sample("theta", dist.Normal(mu, 1.0))

    single = fg.AutoAmortizedFlow(model, encoder(torch.float32), plate="groups")
    assert {value.dtype for value in single(Y.float()).values()} == {torch.float32}
    for early in (True, False):
        guide = fg.AutoAmortizedFlow(model, encoder(torch.float32), plate="groups")
        if early:
            guide.double()
        guide.setup(Y if early else Y.float())
        guide.double()
        assert {value.dtype for value in guide(Y).values()} == {F64}
        assert {parameter.dtype for parameter in guide.parameters()} == {F64}
    assert {parameter.device.type for parameter in guide.to("meta").parameters()} == {"meta"}


def test_in_a_list_of_guides():
    guide = AutoGuideList(hierarchy)
    guide.append(AutoNormal(poutine.block(hierarchy, expose=["mu"])))
    guide.append(make(poutine.block(hierarchy, hide=["mu"])))
    assert guide(Y)["theta"].shape == (B,)
    assert math.isfinite(step(hierarchy, guide))


def test_with_module_local_parameters():
    with pyro.settings.context(module_local_params=True):
        guide = make()
        guide.setup(Y)
        Trace_ELBO()(hierarchy, guide)(Y).backward()
    assert all(p.grad is not None for p in guide.parameters() if p.numel())
    assert not pyro.get_param_store().keys()


@pytest.mark.gpu
def test_on_a_gpu():
    guide = make().cuda()
    y = Y.cuda()

    def model(y):
        mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 2.0))
        with pyro.plate("groups", len(y), subsample_size=B, device=y.device) as rows:
            theta = pyro.sample("theta", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(theta[..., None].expand(*theta.shape, M), 1.0).to_event(1), obs=y[rows])

    guide.model = model
    assert math.isfinite(step(model, guide, y))
    assert all(value.is_cuda for value in guide(y).values())
