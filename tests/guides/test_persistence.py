"""A guide is a module like any other: dtypes, optimizers, state_dict, parameter store, copies and files."""

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from torch.testing import assert_close

from tests.guides.zoo import (
    F64,
    KINDS,
    SCHOOLS,
    draw,
    make_guide,
    number,
    regression,
    regression_data,
    same,
    schools,
    shake,
    train,
    values,
    wide,
    without_arguments,
)

ROOT = Path(__file__).parents[2]


def trained(make, model=schools, *args):
    guide = make(model)
    guide.setup(*args or (SCHOOLS,))
    shake(guide)
    train(model, guide, 2, *args or (SCHOOLS,))
    return guide


# -- dtype -------------------------------------------------------------------------------------------------------------


def test_latents_and_parameters_have_the_dtype_of_the_model(make):
    guide = make(schools)
    assert {value.dtype for value in guide(SCHOOLS).values()} == {F64}
    assert {parameter.dtype for parameter in guide.parameters()} == {F64}
    float32 = make(without_arguments)
    assert {value.dtype for value in float32().values()} == {torch.float32}


@pytest.mark.parametrize("convert", [torch.nn.Module.double, lambda guide: guide.to(F64)], ids=["double", "to"])
@pytest.mark.parametrize("before", [True, False], ids=["before the first call", "after"])
def test_conversion(make, convert, before):
    guide = make(without_arguments)
    if not before:
        guide()
    convert(guide)
    assert {value.dtype for value in guide().values()} == {F64}
    assert {parameter.dtype for parameter in guide.parameters()} == {F64}
    train(without_arguments, guide, 1)


@pytest.mark.parametrize("before", [True, False], ids=["before the first call", "after"])
def test_move(make, before):
    """Move to the meta device, which every machine has."""
    guide = make(without_arguments)
    if not before:
        guide()
    guide.to("meta")
    assert {parameter.device.type for parameter in guide.parameters()} == {"meta"}


@pytest.mark.gpu
def test_device(make):
    def model(device):
        with pyro.plate("pair", 2, device=device):
            pyro.sample("x", dist.Normal(torch.zeros(2, device=device), 1.0))

    before, after, follows = make(wide(3)).cuda(), make(wide(3)), make(model)
    after()
    after.cuda()
    assert before()["x"].is_cuda
    assert after()["x"].is_cuda
    assert follows("cuda")["x"].is_cuda
    state = torch.cuda.get_rng_state()
    follows.quantiles([0.1, 0.9], "cuda")
    assert torch.equal(torch.cuda.get_rng_state(), state)
    train(model, follows, 2, "cuda", elbo=Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1))


# -- optimizers of torch -----------------------------------------------------------------------------------------------


def test_torch_optimizer_before_the_first_call(make):
    guide = make(without_arguments)
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.1)
    start, loss = values(guide), Trace_ELBO().differentiable_loss
    for _ in range(3):
        optimizer.zero_grad()
        loss(without_arguments, guide).backward()
        optimizer.step()
    assert not any(torch.equal(value, start[name]) for name, value in values(guide).items() if value.numel())


def test_torch_optimizer_after_setup(make):
    x, y = regression_data()
    guide = make(regression)
    guide.setup(x, y)
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.1)
    start = values(guide)
    Trace_ELBO().differentiable_loss(regression, guide, x, y).backward()
    optimizer.step()
    assert not same(values(guide), start)


def test_setup_twice_changes_nothing(make):
    guide = make(schools)
    guide.setup(SCHOOLS)
    start, parameters = values(guide), list(guide.parameters())
    guide.setup(SCHOOLS)
    guide(SCHOOLS)
    assert same(values(guide), start)
    assert all(one is two for one, two in zip(guide.parameters(), parameters, strict=True))


def test_creating_a_guide_runs_nothing():
    def model():
        raise AssertionError("the model ran")

    guide = make_guide("iaf", model)
    copy.deepcopy(guide).double().train().eval()
    assert "AutoFlow" in repr(guide)


def test_module_local_params(make):
    """With this setting of Pyro's, parameters stay in their modules, torch trains them, and the store stays empty."""
    x, y = regression_data()
    with pyro.settings.context(module_local_params=True):
        guide = make(regression)
        elbo = Trace_ELBO()(regression, guide)
        elbo(x, y)
        start, optimizer = values(guide), torch.optim.Adam(elbo.parameters(), lr=0.1)
        elbo(x, y).backward()
        optimizer.step()
        assert not same(values(guide), start)
        other = make(regression)
        assert other(x, y).keys() == {"slope", "scale"}
        assert not list(pyro.get_param_store().keys())
        listed = AutoGuideList(regression)
        listed.append(AutoNormal(poutine.block(regression, expose=["slope"])))
        listed.append(make(poutine.block(regression, expose=["scale"])))
        assert listed(x, y).keys() == {"slope", "scale"}


# -- the parameter store -----------------------------------------------------------------------------------------------


def test_param_store_in_the_same_process(make, tmp_path):
    guide = trained(make)
    expected = draw(guide, SCHOOLS)
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    pyro.set_rng_seed(42)
    fresh = make(schools)
    pyro.get_param_store().load(tmp_path / "store")
    assert_close(draw(fresh, SCHOOLS), expected, rtol=0, atol=0)
    assert same(values(fresh), values(guide))


def test_param_store_loaded_into_a_guide_in_use(make, tmp_path):
    guide = trained(make)
    expected = draw(guide, SCHOOLS)
    pyro.get_param_store().save(tmp_path / "store")
    train(schools, guide, 2, SCHOOLS, lr=0.1)
    assert not same(draw(guide, SCHOOLS), expected)
    pyro.get_param_store().load(tmp_path / "store")
    assert_close(draw(guide, SCHOOLS), expected, rtol=0, atol=0)
    start = values(guide)
    train(schools, guide, 1, SCHOOLS)
    assert not same(values(guide), start), "it still trains"


def test_param_store_scopes_switch_between_states(make):
    guide, store = make(schools), pyro.get_param_store()
    with store.scope() as first:
        train(schools, guide, 2, SCHOOLS)
    second_state = None
    with store.scope(copy.deepcopy(first)) as second:
        train(schools, guide, 2, SCHOOLS, lr=0.1)
        second_state = draw(guide, SCHOOLS)
    with store.scope(second):
        assert_close(draw(guide, SCHOOLS), second_state, rtol=0, atol=0)


def test_param_store_of_a_guide_list(make, tmp_path):
    def build():
        guide = AutoGuideList(schools)
        guide.append(make(poutine.block(schools, expose=["theta"])))
        guide.append(AutoNormal(poutine.block(schools, hide=["theta"])))
        return guide

    guide = build()
    train(schools, guide, 3, SCHOOLS, lr=0.3)
    expected = draw(guide, SCHOOLS)
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    pyro.set_rng_seed(42)
    fresh = build()
    pyro.get_param_store().load(tmp_path / "store")
    assert_close(draw(fresh, SCHOOLS), expected, rtol=0, atol=0)


CHILD = """
import sys, pyro, torch
from tests.guides.zoo import *
pyro.set_rng_seed(42)
for kind in KINDS:
    pyro.clear_param_store()
    guide = make_guide(kind, schools)
    pyro.get_param_store().load(f"{sys.argv[1]}/{kind}.store")
    from_store = draw(guide, SCHOOLS)
    pyro.clear_param_store()
    guide = make_guide(kind, schools)
    guide.load_state_dict(torch.load(f"{sys.argv[1]}/{kind}.state", weights_only=True))
    from_state = draw(guide, SCHOOLS)
    pyro.clear_param_store()
    guide = torch.load(f"{sys.argv[1]}/{kind}.guide", weights_only=False)
    torch.save([from_store, from_state, draw(guide, SCHOOLS)], f"{sys.argv[1]}/{kind}.draws")
"""


def test_everything_saved_is_restored_in_a_fresh_process(tmp_path):
    """Restore by the parameter store, by state_dict and by a pickle of the whole guide."""
    expected = {}
    for kind in KINDS:
        pyro.clear_param_store()
        guide = trained(lambda model, kind=kind: make_guide(kind, model))
        expected[kind] = draw(guide, SCHOOLS)
        pyro.get_param_store().save(tmp_path / f"{kind}.store")
        torch.save(guide.state_dict(), tmp_path / f"{kind}.state")
        torch.save(guide, tmp_path / f"{kind}.guide")
    subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore:You are using:FutureWarning", "-c", CHILD, str(tmp_path)],
        check=True,
        cwd=ROOT,
        timeout=120,
    )
    for kind in KINDS:
        for found in torch.load(tmp_path / f"{kind}.draws", weights_only=True):
            assert_close(found, expected[kind], rtol=1e-12, atol=1e-12, msg=kind)


# -- state_dict --------------------------------------------------------------------------------------------------------


def test_state_dict_before_and_after_the_first_call(make):
    guide = make(without_arguments)
    before = copy.deepcopy(guide.state_dict())
    assert "transform.parts.2.loc" in before
    guide()
    assert same(guide.state_dict(), before)
    train(without_arguments, guide, 1)
    assert guide.state_dict().keys() == before.keys()
    assert not same(guide.state_dict(), before)


@pytest.mark.parametrize("called", [False, True], ids=["uncalled", "called"])
def test_state_dict_into_another_guide(make, called):
    guide = trained(make)
    state, expected = guide.state_dict(), draw(guide, SCHOOLS)
    pyro.set_rng_seed(42)
    pyro.clear_param_store()
    other = make(schools)
    if called:
        other(SCHOOLS)
    assert other.load_state_dict(state) == ([], [])
    assert_close(draw(other, SCHOOLS), expected, rtol=0, atol=0)
    assert {parameter.dtype for parameter in other.parameters()} == {F64}
    train(schools, other, 1, SCHOOLS)
    assert not same(values(other), values(guide))


def test_state_dict_of_a_guide_list(make):
    def build():
        guide = AutoGuideList(without_arguments)
        guide.append(make(poutine.block(without_arguments, expose=["s"])))
        guide.append(make(poutine.block(without_arguments, hide=["s"])))
        return guide

    guide = build()
    train(without_arguments, guide, 2)
    expected = draw(guide)
    pyro.clear_param_store()
    other = build()
    other.load_state_dict(guide.state_dict())
    assert_close(draw(other), expected, rtol=0, atol=0)


def test_state_dict_with_assign(make):
    guide, other = trained(make), make(schools)
    other(SCHOOLS)
    other.load_state_dict(copy.deepcopy(guide.state_dict()), assign=True)
    assert_close(draw(other, SCHOOLS), draw(guide, SCHOOLS), rtol=0, atol=0)
    train(schools, other, 2, SCHOOLS)
    assert not same(values(other), values(guide))


# -- copies and pickles ------------------------------------------------------------------------------------------------

PASSAGES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda guide: pickle.loads(pickle.dumps(guide)),
    "torch.save": lambda guide: _through_a_file(guide),
}


def _through_a_file(guide):
    file = io.BytesIO()
    torch.save(guide, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("passage", PASSAGES)
def test_copy_before_the_first_call(make, passage):
    guide = make(schools, init_scale=0.02)
    other = PASSAGES[passage](guide)
    for one in (guide, other):
        pyro.set_rng_seed(0)
        one.setup(SCHOOLS)
    assert same(values(guide), values(other))
    train(schools, other, 2, SCHOOLS)
    assert not same(values(guide), values(other))


@pytest.mark.parametrize("passage", PASSAGES)
def test_copy_after_a_call_with_gradients(make, passage):
    guide = trained(make)
    Trace_ELBO().loss_and_grads(schools, guide, SCHOOLS)
    start = values(guide)
    other = PASSAGES[passage](guide)
    assert_close(draw(other, SCHOOLS), draw(guide, SCHOOLS), rtol=0, atol=0)
    train(schools, other, 2, SCHOOLS)
    assert same(values(guide), start), "the original does not train with its copy"
    assert not same(values(other), start)
    train(schools, guide, 2, SCHOOLS)
    assert not same(values(guide), start), "and still trains by itself"


@pytest.mark.parametrize("called", [False, True], ids=["uncalled", "called"])
def test_pickle_of_a_guide_for_a_local_model(make, called):
    """A local function cannot be pickled: the guide comes without it, draws, and gets it back by assignment."""

    def model():
        pyro.sample("x", dist.ImproperUniform(dist.constraints.positive, (), ()))
        pyro.sample("y", dist.Normal(number(5.0), 0.1))

    guide = make(model, init_scale=1e-3)
    expected = draw(guide) if called else None
    other = pickle.loads(pickle.dumps(guide))
    assert guide.model is not None, "pickling leaves the guide as it was"
    if called:
        assert_close(draw(other), expected, rtol=0, atol=0)
        assert other.median().keys() == {"x", "y"}
    other.model = model
    found = draw(other)
    assert_close(found["x"].item(), 1.0, atol=0.02, rtol=0)
    assert_close(found["y"].item(), 5.0, atol=0.2, rtol=0)


def test_copy_guides_the_same_model():
    model = torch.nn.Module()
    model.forward = without_arguments
    guide = make_guide("iaf", model)
    assert copy.deepcopy(guide).model is guide.model
