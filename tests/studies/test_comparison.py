"""Several guides side by side: their order, their verdicts, and the isolation of each fit."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal, init_to_value
from pyro.nn import PyroModule, PyroParam
from torch.testing import assert_close

from pyro_flowguides.diagnostics import diagnose
from pyro_flowguides.studies import compare

QUICK = {"steps": 150, "num_particles": 16, "lr": 0.05}


def correlated():
    """Two coordinates whose sum is nearly known: their posterior correlation is -0.96."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z.sum(-1), 0.2), obs=torch.tensor(1.0))


LOG_EVIDENCE = dist.Normal(0.0, (2 + 0.2**2) ** 0.5).log_prob(torch.tensor(1.0)).item()


def normal():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(2.0))


def two_modes():
    z = pyro.sample("z", dist.Normal(0.0, 5.0))
    pyro.sample("x", dist.Normal(z.abs(), 1.0), obs=torch.tensor(5.0))


def starting_at(*values):
    """Return a factory of guides, each of which starts at the next value."""
    values = iter(values)
    return lambda model: AutoDiagonalNormal(model, init_loc_fn=init_to_value(values={"z": torch.tensor(next(values))}))


def quick(model, **options):
    return compare(model, progress=False, **{"fit_options": QUICK, **options})


def test_the_guide_that_can_follow_the_correlation_comes_first():
    options = {"steps": 300, "num_particles": 16, "lr": 0.05}
    comparison = quick(correlated, guides=["diagonal", "mvn"], fit_options=options)
    assert list(comparison.table["guide"]) == ["mvn", "diagonal"]
    mvn, diagonal = comparison.table.to_dict("records")
    assert mvn["elbo"] == pytest.approx(LOG_EVIDENCE, abs=0.15)
    assert mvn["elbo"] - diagonal["elbo"] > 0.7
    assert mvn["agreement"] < 0.3
    assert comparison.best is comparison.results["mvn"]
    assert comparison.best.diagnosis.agreement.num_fits == 2
    assert comparison.best.diagnosis.verdict == mvn["verdict"]
    assert diagonal["verdict"] != "good"


def test_fits_that_disagree_are_not_trusted():
    comparison = quick(
        two_modes, guides=[("one mode", starting_at(-5.0, -5.0)), ("either mode", starting_at(-5.0, 5.0))]
    )
    rows = {row["guide"]: row for row in comparison.table.to_dict("records")}
    assert rows["one mode"]["agreement"] < 0.2
    assert rows["either mode"]["agreement"] > 5
    assert rows["either mode"]["verdict"] == "do not trust"
    assert "disagree" in comparison.results["either mode"].diagnosis.reason


def test_one_fit_has_no_agreement():
    comparison = quick(normal, guides=["diagonal"], repeats=1)
    assert math.isnan(comparison.table["agreement"][0])
    assert comparison.results["diagonal"].diagnosis.agreement is None


def broken(model):
    raise RuntimeError("out of order\nsecond line")


def test_a_guide_that_raises_is_listed_as_failed():
    comparison = quick(normal, guides=[broken, "diagonal", ("nothing", lambda model: None)], repeats=1)
    assert list(comparison.table["guide"]) == ["diagonal", "broken", "nothing"]
    assert list(comparison.table["verdict"][1:]) == ["failed", "failed"]
    assert comparison.table["error"][1] == "failed: RuntimeError: out of order"
    assert "must return a guide" in comparison.table["error"][2]
    assert list(comparison.results) == ["diagonal"]
    assert comparison.errors["broken"] == "failed: RuntimeError: out of order"
    assert comparison.errors.keys() == {"broken", "nothing"}
    assert "failed: RuntimeError: out of order" in str(comparison)
    assert "second line" not in str(comparison)


def test_every_guide_may_fail():
    comparison = quick(normal, guides=[broken])
    assert "out of order" in str(comparison)
    with pytest.raises(RuntimeError, match="every fit failed"):
        _ = comparison.best
    assert not comparison.plot().has_data()


def test_one_of_the_repeats_may_fail():
    makers = iter([broken, AutoDiagonalNormal])
    comparison = quick(normal, guides=[("sometimes", lambda model: next(makers)(model))])
    assert comparison.table["verdict"][0] != "failed"
    assert comparison.table["error"][0].startswith("1 of 2 fits failed")
    assert "1 of 2 fits failed" in str(comparison)


def test_a_fit_without_a_verdict_counts_as_failed():
    def minibatch():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 10, subsample_size=5) as index:
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(10)[index])

    comparison = quick(minibatch, guides=["diagonal"], repeats=1, fit_options={"steps": 4})
    assert comparison.table["verdict"][0] == "failed"
    assert "subsampled" in comparison.table["error"][0]


def test_parameter_store_and_generator_are_left_as_they_were():
    AutoNormal(normal)()  # parameters with the names that a guide of compare would have
    before = dict(pyro.get_param_store().items())
    state = torch.get_rng_state()
    quick(normal, guides=["normal"], repeats=1)
    after = dict(pyro.get_param_store().items())
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(state, torch.get_rng_state())


def with_parameter():
    scale = pyro.param("scale", torch.tensor(3.0), constraint=dist.constraints.positive)
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, scale), obs=torch.tensor(0.5))


def by_hand(model):
    def guide():
        loc = pyro.param("loc", torch.tensor(3.0))
        pyro.sample("z", dist.Normal(loc, pyro.param("sd", torch.tensor(0.5), constraint=dist.constraints.positive)))

    return guide


@pytest.mark.parametrize("make", [AutoNormal, by_hand])
def test_results_keep_their_parameters(make):
    """Also parameters of the model, those of guides that are plain functions, and those with the same names."""
    comparison = quick(with_parameter, guides=[("first", make), ("second", make)], repeats=1, seed=3)
    AutoNormal(with_parameter)()  # other parameters under the same names
    for result in comparison.results.values():
        again = diagnose(result.model, result.guide)
        assert again.elbo == pytest.approx(result.diagnosis.elbo, abs=0.1)
    assert "loc" not in pyro.get_param_store()


class Module(PyroModule):
    def __init__(self):
        super().__init__()
        self.scale = PyroParam(torch.tensor(3.0), constraint=dist.constraints.positive)

    def forward(self):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, self.scale), obs=torch.tensor(0.5))


def test_each_fit_trains_a_copy_of_a_module():
    model = Module()
    comparison = quick(model, guides=["diagonal"], repeats=1)
    assert model.scale.item() == pytest.approx(3.0)
    assert comparison.results["diagonal"].model.scale.item() < 2.5


def test_the_seed_determines_the_table():
    first, second = (quick(correlated, guides=["planar"], fit_options={"steps": 20}, seed=4) for _ in range(2))
    assert_close(first.table["elbo"][0], second.table["elbo"][0])
    assert_close(first.table["agreement"][0], second.table["agreement"][0])


def test_print_and_plot():
    comparison = quick(normal, guides=["diagonal", ("broken", broken)], repeats=1)
    header, row, failure = str(comparison).splitlines()
    assert header.split() == ["guide", "ELBO", "k-hat", "ESS", "agreement", "time", "steps", "verdict"]
    assert row.startswith("diagonal")
    assert row.index(" s ") < row.index(comparison.table["verdict"][0])
    assert failure.startswith("broken")
    axes = comparison.plot()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["diagonal"]
    assert comparison.plot(axes) is axes


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"guides": []}, ValueError, "no guides"),
        ({"guides": ["iff"]}, ValueError, "did you mean 'iaf'"),
        ({"guides": "norml"}, ValueError, "did you mean 'normal'"),
        ({"guides": [("mine", "plnar")]}, ValueError, "did you mean 'planar'"),
        ({"guides": ["iaf", "iaf"]}, ValueError, "two guides are labeled 'iaf'"),
        ({"guides": [3]}, TypeError, "not an object of type int"),
        ({"repeats": 0}, ValueError, "repeats"),
        ({"fit_options": {"seed": 1}}, ValueError, "'seed' cannot be the same"),
    ],
)
def test_refusals(options, error, match):
    with pytest.raises(error, match=match):
        compare(normal, progress=False, **options)


def test_a_guide_instead_of_a_factory_is_refused():
    with pytest.raises(TypeError, match="of its own"):
        compare(normal, guides=[AutoNormal(normal)], progress=False)
