"""Several guides in one process share Pyro's parameter store, and nothing else."""

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from torch.testing import assert_close

from tests.guides.zoo import SCHOOLS, draw, make_guide, same, schools, shake, train, values


def trained_alone(make, seed, steps=3):
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    guide = make(schools)
    train(schools, guide, steps, SCHOOLS)
    return values(guide)


def test_a_second_guide_trains_as_if_it_were_alone(make):
    expected = trained_alone(make, 1), trained_alone(make, 2)
    pyro.clear_param_store()
    guides = []
    for seed in (1, 2):
        pyro.set_rng_seed(seed)
        guides.append(make(schools))
        train(schools, guides[-1], 3, SCHOOLS)
    assert_close(tuple(values(guide) for guide in guides), expected, rtol=0, atol=0)


def test_guides_trained_in_turns_do_not_disturb_each_other(make):
    expected = trained_alone(make, 1), trained_alone(make, 2)
    pyro.clear_param_store()
    guides = [make(schools), make(schools)]
    steppers = [SVI(schools, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()) for guide in guides]
    states = [torch.manual_seed(seed).get_state() for seed in (1, 2)]
    for _ in range(3):
        for which, stepper in enumerate(steppers):
            torch.set_rng_state(states[which])
            stepper.step(SCHOOLS)
            states[which] = torch.get_rng_state()
    assert_close(tuple(values(guide) for guide in guides), expected, rtol=0, atol=0)


def test_one_optimizer_trains_two_guides(make):
    """A pyro.optim object keeps its state by parameter name, so names must differ."""
    expected = trained_alone(make, 1), trained_alone(make, 2)
    pyro.clear_param_store()
    optimizer, found = pyro.optim.Adam({"lr": 0.01}), []
    for seed in (1, 2):
        pyro.set_rng_seed(seed)
        guide = make(schools)
        svi = SVI(schools, guide, optimizer, Trace_ELBO())
        for _ in range(3):
            svi.step(SCHOOLS)
        found.append(values(guide))
    assert_close(tuple(found), expected, rtol=0, atol=0)


def test_clearing_the_store_leaves_the_guide_trained_and_trainable(make):
    guide = make(schools)
    train(schools, guide, 2, SCHOOLS)
    expected, start = draw(guide, SCHOOLS), values(guide)
    pyro.clear_param_store()
    assert_close(draw(guide, SCHOOLS), expected, rtol=0, atol=0)
    train(schools, guide, 2, SCHOOLS)
    assert not same(values(guide), start)


def test_a_guide_beside_the_parameters_of_a_model(make):
    """The model's own parameters in the store train with the guide's."""

    def model(y):
        noise = pyro.param(
            "noise", torch.tensor(1.0, dtype=y.dtype), constraint=pyro.distributions.constraints.positive
        )
        theta = pyro.sample("theta", pyro.distributions.Normal(y.new_zeros(()), 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", pyro.distributions.Normal(theta, noise), obs=y)

    guide = make(model)
    train(model, guide, 3, SCHOOLS)
    assert pyro.param("noise") != 1.0


def listed(make):
    guide = AutoGuideList(schools)
    guide.append(make(poutine.block(schools, expose=["theta"])))
    guide.append(make(poutine.block(schools, hide=["theta"])))
    return guide


def test_two_guide_lists(make):
    def train_one(seed):
        pyro.set_rng_seed(seed)
        guide = listed(make)
        train(schools, guide, 3, SCHOOLS)
        return values(guide)

    expected = []
    for seed in (1, 2):
        pyro.clear_param_store()
        expected.append(train_one(seed))
    pyro.clear_param_store()
    assert_close([train_one(1), train_one(2)], expected, rtol=0, atol=0)


def test_different_flows_and_pyros_guides_side_by_side():
    guides = [make_guide("iaf", schools), make_guide("nice", schools), AutoNormal(schools)]
    for guide in guides:
        train(schools, guide, 2, SCHOOLS)
    before = [values(guide) for guide in guides]
    shake(guides[0])
    train(schools, guides[1], 2, SCHOOLS)
    assert same(values(guides[2]), before[2])
    assert not same(values(guides[1]), before[1])
    for name, value in pyro.get_param_store().named_parameters():
        assert any(value is parameter for guide in guides for parameter in guide.parameters()), name


def test_store_holds_the_guides_own_tensors(make):
    """The tensors that an optimizer updates through the store are those that the guide draws with."""
    guides = [make(schools), make(schools)]
    for guide in guides:
        train(schools, guide, 1, SCHOOLS)
    stored = {id(value) for _, value in pyro.get_param_store().named_parameters()}
    assert stored == {id(parameter) for guide in guides for parameter in guide.parameters()}


@pytest.mark.parametrize("kind", ["iaf"])
def test_two_guides_saved_and_loaded_together(kind, tmp_path):
    guides = [make_guide(kind, schools), make_guide(kind, schools)]
    for guide, steps in zip(guides, (1, 4), strict=True):
        train(schools, guide, steps, SCHOOLS, lr=0.1)
    expected = [draw(guide, SCHOOLS) for guide in guides]
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    fresh = [make_guide(kind, schools), make_guide(kind, schools)]
    pyro.get_param_store().load(tmp_path / "store")
    assert_close([draw(guide, SCHOOLS) for guide in fresh], expected, rtol=0, atol=0)


def test_guides_used_one_after_the_other_share_their_names():
    """The store does not grow, and a new guide takes no value of an earlier one."""
    sizes = []
    for depth in (2, 1, 1):
        guide = make_guide("iaf", schools, depth=depth)
        train(schools, guide, 1, SCHOOLS)
        stored = dict(pyro.get_param_store().named_parameters())
        assert {id(value) for value in stored.values()} == {id(value) for value in guide.parameters()}
        sizes.append(len(stored))
        expected = values(guide)
        shake(guide)
        del guide, stored
    assert sizes[0] > sizes[1] == sizes[2]
    again = make_guide("iaf", schools, depth=1)
    again(SCHOOLS)
    assert len(pyro.get_param_store().keys()) == sizes[2]
    assert not same(values(again), expected)
