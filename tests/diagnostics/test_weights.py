"""Importance weights: known answers, all kinds of guides, and programs that cannot take many draws at once."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO, autoguide
from pyro.infer.importance import vectorized_importance_weights
from torch import Tensor

import pyro_flowguides as fg
from pyro_flowguides.diagnostics import WeightedDraws, defensive_log_weights, diagnose, log_weights
from pyro_flowguides.programs.batched_run import RunMode
from tests.diagnostics import programs
from tests.diagnostics.programs import DATA


@pytest.fixture(autouse=True)
def _fresh() -> None:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


def _one_by_one(model: object, weighted: WeightedDraws, *args: object) -> Tensor:
    """log p of each draw, computed by conditioning the model on it."""
    log_p = []
    for s in range(weighted.num_samples):
        draw = {name: value[s] for name, value in weighted.draws.items()}
        log_p.append(pyro.poutine.trace(pyro.poutine.condition(model, draw)).get_trace(*args).log_prob_sum())
    return torch.stack(log_p).double()


def test_weights_of_an_exact_guide_are_the_evidence() -> None:
    weighted = log_weights(programs.gaussian_model, programs.gaussian_guide(), DATA, num_samples=500)
    assert weighted.vectorized
    assert weighted.draws["z"].shape == (500,)
    expected = torch.full((500,), programs.gaussian_evidence(DATA), dtype=torch.float64)
    torch.testing.assert_close(weighted.log_w, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weighted.log_w, weighted.log_p - weighted.log_q)


AUTOGUIDES = [
    autoguide.AutoNormal,
    autoguide.AutoDiagonalNormal,
    autoguide.AutoMultivariateNormal,
    autoguide.AutoLowRankMultivariateNormal,
    autoguide.AutoIAFNormal,
    autoguide.AutoStructured,
    autoguide.AutoNormalMessenger,
    autoguide.AutoHierarchicalNormalMessenger,
    autoguide.AutoRegressiveMessenger,
    fg.AutoIAF,
    fg.AutoPlanar,
    fg.AutoSylvester,
]


@pytest.mark.parametrize("make", AUTOGUIDES, ids=lambda make: make.__name__)
def test_every_autoguide(make: type) -> None:
    weighted = log_weights(programs.schools_model, make(programs.schools_model), num_samples=40)
    assert weighted.vectorized, (weighted.guide_note, weighted.model_note)
    assert {name: value.shape[1:] for name, value in weighted.draws.items()} == {"mu": (), "tau": (), "theta": (8,)}
    assert weighted.log_w.isfinite().all()
    torch.testing.assert_close(weighted.log_p, _one_by_one(programs.schools_model, weighted), rtol=1e-4, atol=1e-4)


def test_agrees_with_pyro() -> None:
    guide = autoguide.AutoMultivariateNormal(programs.schools_model)
    ours = log_weights(programs.schools_model, guide, num_samples=4000).log_w
    theirs, _, _ = vectorized_importance_weights(programs.schools_model, guide, num_samples=4000, max_plate_nesting=1)
    assert float(ours.median()) == pytest.approx(float(theirs.detach().median()), abs=0.5)


def test_guide_list_and_handwritten_guide() -> None:
    model = programs.schools_model
    parts = autoguide.AutoGuideList(model)
    parts.append(autoguide.AutoNormal(pyro.poutine.block(model, expose=["mu", "tau"])))
    parts.append(autoguide.AutoMultivariateNormal(pyro.poutine.block(model, expose=["theta"])))
    for guide in (parts, programs.schools_guide):
        weighted = log_weights(model, guide, num_samples=30)
        assert weighted.vectorized, (weighted.guide_note, weighted.model_note)
        assert set(weighted.draws) == {"mu", "tau", "theta"}
        torch.testing.assert_close(weighted.log_p, _one_by_one(model, weighted), rtol=1e-4, atol=1e-4)


def test_log_q_is_the_density_of_the_draws() -> None:
    weighted = log_weights(programs.schools_model, programs.schools_guide, num_samples=30)
    draws = weighted.draws
    log_q = (
        dist.Normal(4.0, 3.0).log_prob(draws["mu"])
        + dist.LogNormal(1.0, 0.5).log_prob(draws["tau"])
        + dist.Normal(draws["mu"][:, None], 3.0).log_prob(draws["theta"]).sum(-1)
    )
    torch.testing.assert_close(weighted.log_q, log_q.double(), rtol=1e-5, atol=1e-5)


def test_chunks() -> None:
    guide = programs.gaussian_guide(scale=1.5)
    whole = log_weights(programs.gaussian_model, guide, DATA, num_samples=25)
    parts = log_weights(programs.gaussian_model, guide, DATA, num_samples=25, chunk_size=7)
    assert parts.log_w.shape == whole.log_w.shape == (25,)
    torch.testing.assert_close(parts.log_p, _one_by_one(programs.gaussian_model, parts, DATA), rtol=1e-5, atol=1e-5)


def test_as_many_draws_as_data() -> None:
    weighted = log_weights(programs.gaussian_model, programs.gaussian_guide(), DATA, num_samples=len(DATA))
    assert weighted.vectorized
    expected = torch.full((len(DATA),), programs.gaussian_evidence(DATA), dtype=torch.float64)
    torch.testing.assert_close(weighted.log_w, expected, rtol=1e-5, atol=1e-5)


def _sums_over_everything(data: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 2.0))
    log_prob = dist.Normal(z.unsqueeze(-1), 1.0).log_prob(data)
    pyro.factor("x", log_prob.sum())


def _indexes_from_the_left(data: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 2.0).expand([1]).to_event(1))
    pyro.factor("x", dist.Normal(z[0], 1.0).log_prob(data).sum())


def _branches_on_a_value(data: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 2.0))
    scale = 1.0 if float(z.mean()) > 0.9 else 2.0
    with pyro.plate("data", len(data)):
        pyro.sample("x", dist.Normal(z, scale), obs=data)


@pytest.mark.parametrize(
    ("model", "mode"),
    [
        (_sums_over_everything, RunMode.MAPPED),
        (_indexes_from_the_left, RunMode.MAPPED),
        (_branches_on_a_value, RunMode.SINGLE),
    ],
)
def test_wrong_broadcast_falls_back(model: object, mode: RunMode) -> None:
    def guide(data: Tensor) -> None:
        prior = dist.Normal(0.8, 0.5)
        pyro.sample("z", prior.expand([1]).to_event(1) if model is _indexes_from_the_left else prior)

    weighted = log_weights(model, guide, DATA, num_samples=40)
    assert weighted.model_mode is mode
    assert weighted.vectorized is (mode is RunMode.MAPPED)
    assert mode.value in weighted.model_note
    assert not weighted.guide_note
    torch.testing.assert_close(weighted.log_p, _one_by_one(model, weighted, DATA), rtol=1e-5, atol=1e-5)


def test_a_wrong_broadcast_is_found_without_pairing_all_draws() -> None:
    """The plate pairs every draw with every other; a few draws are enough to notice."""
    shapes = set()

    def model() -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(5), 1.0).to_event(1))
        with pyro.plate("data", 5):
            x = dist.Normal(z, 1.0)
            shapes.add(x.batch_shape)
            pyro.sample("x", x, obs=torch.zeros(5))

    def guide() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(5), 1.0).to_event(1))

    weighted = log_weights(model, guide, num_samples=500)
    assert weighted.model_mode is RunMode.MAPPED
    assert max(shape.numel() for shape in shapes) < 500


def test_guide_that_mixes_draws_falls_back() -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(a, 1.0))

    def guide() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(a.mean(), 1.0))  # correct for one draw only

    weighted = log_weights(model, guide, num_samples=50)
    assert weighted.guide_note
    torch.testing.assert_close(weighted.log_w, torch.zeros(50, dtype=torch.float64), atol=1e-5, rtol=0)


def test_guide_that_cannot_score_its_draws_falls_back() -> None:
    def model() -> None:
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    planar = dist.transforms.planar(2)  # Pyro's planar flow has no inverse

    def guide() -> None:
        pyro.module("planar", planar)
        with pyro.plate("data", 3):
            pyro.sample("z", dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [planar]))

    weighted = log_weights(model, guide, num_samples=200)
    assert weighted.guide_note
    assert float(weighted.log_w.exp().mean()) == pytest.approx(1, abs=0.3)


def test_masked_data_do_not_count() -> None:
    is_there = torch.tensor([True, True, False, True, False])

    def model(data: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(data)), pyro.poutine.mask(mask=is_there):
            pyro.sample("x", dist.Normal(z, 1.0), obs=data.masked_fill(~is_there, torch.nan))

    weighted = log_weights(model, programs.gaussian_guide(), DATA, num_samples=20)
    assert weighted.vectorized
    expected = dist.Normal(weighted.draws["z"][:, None], 1.0).log_prob(DATA[is_there]).sum(-1)
    expected += dist.Normal(0.0, 2.0).log_prob(weighted.draws["z"])
    torch.testing.assert_close(weighted.log_p, expected.double(), rtol=1e-5, atol=1e-5)


def test_zero_density_is_minus_infinity() -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Uniform(0.0, 1.0))
        b = pyro.sample("b", dist.Exponential(1.0))  # log_prob is finite outside the support
        pyro.sample("c", dist.Uniform(torch.zeros(()), a))
        pyro.factor("f", -b)

    def guide() -> None:
        pyro.sample("a", dist.Uniform(0.0, 1.0))
        pyro.sample("b", dist.Normal(1.0, 1.0))
        pyro.sample("c", dist.Uniform(0.0, 1.0))

    weighted = log_weights(model, guide, num_samples=400)
    outside = (weighted.draws["b"] < 0) | (weighted.draws["c"] > weighted.draws["a"])
    assert weighted.vectorized
    assert 0 < weighted.num_zero < 400
    assert weighted.num_invalid == 0
    assert torch.equal(weighted.log_w.isneginf(), outside)


def test_undefined_density_is_counted() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", z.log())  # NaN for half of the draws

    def guide() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))

    weighted = log_weights(model, guide, num_samples=200)
    assert weighted.num_invalid == int((weighted.draws["z"] < 0).sum()) > 0


@pytest.mark.parametrize("as_plate", [True, False])
def test_enumerated_sites_are_summed_out(as_plate: bool) -> None:
    def guide(data: Tensor) -> None:
        pyro.sample("loc", dist.Normal(0.0, 1.0))

    weighted = log_weights(programs.clusters_model, guide, DATA, num_samples=20, chunk_size=20 if as_plate else 1)
    assert weighted.vectorized
    expected = programs.clusters_log_prob(weighted.draws["loc"], DATA).double()
    torch.testing.assert_close(weighted.log_p, expected, rtol=1e-5, atol=1e-5)
    conditioned = pyro.poutine.condition(programs.clusters_model, {"loc": weighted.draws["loc"][3]})
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    assert float(weighted.log_p[3]) == pytest.approx(-elbo.loss(conditioned, lambda data: None, DATA), rel=1e-5)


def test_enumerated_markov_chain() -> None:
    transition = torch.tensor([[0.9, 0.1], [0.2, 0.8]])

    def model(data: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
        state = torch.tensor(0)
        for t in pyro.markov(range(len(data))):
            state = pyro.sample(f"s{t}", dist.Categorical(transition[state]), infer={"enumerate": "parallel"})
            pyro.sample(f"x{t}", dist.Normal(loc * state, 1.0), obs=data[t])

    def guide(data: Tensor) -> None:
        pyro.sample("loc", dist.Normal(0.0, 1.0))

    weighted = log_weights(model, guide, DATA, num_samples=10)
    assert weighted.vectorized, weighted.model_note
    for s in range(10):
        loc = weighted.draws["loc"][s]
        alpha = torch.tensor([1.0, 0.0]).double()
        for x in DATA:
            alpha = (alpha @ transition.double()) * dist.Normal(loc * torch.arange(2.0), 1.0).log_prob(x).exp()
        expected = alpha.sum().log() + dist.Normal(0.0, 3.0).log_prob(loc)
        assert float(weighted.log_p[s]) == pytest.approx(float(expected), rel=1e-5)


def test_dtype_and_constants_are_kept() -> None:
    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        pyro.sample("k", dist.Poisson(3.0))

    weighted = log_weights(model, model, num_samples=10)
    assert weighted.draws["z"].dtype == torch.float64
    assert weighted.log_w.dtype == torch.float64
    torch.testing.assert_close(weighted.log_w, torch.zeros(10, dtype=torch.float64))


def test_point_sites() -> None:
    weighted = log_weights(programs.schools_model, autoguide.AutoDelta(programs.schools_model), num_samples=10)
    assert weighted.point_sites == ("mu", "tau", "theta")


def test_weights_have_no_gradient() -> None:
    guide = autoguide.AutoNormal(programs.schools_model)
    weighted = log_weights(programs.schools_model, guide, num_samples=10)
    assert not weighted.log_w.requires_grad
    assert all(not value.requires_grad for value in weighted.draws.values())
    assert all(parameter.requires_grad for parameter in guide.parameters())


def _subsampled(data: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(data), subsample_size=2) as index:
        pyro.sample("x", dist.Normal(z, 1.0), obs=data[index])


def _missing_in_guide(data: Tensor) -> None:
    pyro.sample("other", dist.Normal(0.0, 1.0))
    programs.gaussian_model(data)


def _discrete(data: Tensor) -> None:
    pyro.sample("k", dist.Bernoulli(0.5))
    programs.gaussian_model(data)


def _observed_in_model(data: Tensor) -> None:
    pyro.sample("z", dist.Normal(0.0, 1.0), obs=data[0])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (_subsampled, "plate 'data' is subsampled"),
        (_missing_in_guide, "site 'other' is latent in the model and not in the guide"),
        (_discrete, "site 'k' is latent in the model and not in the guide.*enumerate"),
        (_observed_in_model, "site 'z' of the guide is not latent"),
    ],
)
def test_structures_that_are_refused(model: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        log_weights(model, programs.gaussian_guide(), DATA, num_samples=10)


@pytest.mark.parametrize(
    ("function", "sizes"),
    [
        (log_weights, {"num_samples": 0}),
        (log_weights, {"num_samples": 10, "chunk_size": 0}),
        (defensive_log_weights, {"num_samples": 0}),
        (defensive_log_weights, {"num_samples": 10, "chunk_size": 0}),
        (diagnose, {"num_samples": 30, "chunk_size": 0}),
    ],
)
def test_sizes_that_are_refused(function: Callable[..., object], sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        function(programs.gaussian_model, programs.gaussian_guide(), DATA, **sizes)
