"""Errors name the site, the shape and the remedy."""

import pickle
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import init_to_value
from torch import nn

import pyro_flowguides as fg
from tests.guides.zoo import KINDS, draw, make_guide, number, regression, regression_data, schools, train, wide


def says(*parts):
    """Return a pattern for all parts in this order."""
    return "(?s)" + ".*".join(re.escape(part) for part in parts)


# -- structure of the model --------------------------------------------------------------------------------------------


def test_discrete_latents():
    def model():
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        pyro.sample("flag", dist.Bernoulli(p))

    with pytest.raises(ValueError, match=says("'flag'", "enum")):
        fg.AutoIAF(model)()


def test_no_latents():
    def model():
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))

    with pytest.raises(RuntimeError, match=says("AutoIAF found no latent variables", "Use an empty guide instead")):
        fg.AutoIAF(model)()


def test_sites_on_a_sphere():
    def model():
        pyro.sample("direction", dist.ProjectedNormal(torch.ones(2)))

    with pytest.raises(ValueError, match=says("'direction'", "ProjectedNormalReparam")):
        fg.AutoIAF(model)()


def test_subsampled_local_plate():
    def model():
        with pyro.plate("data", 10, subsample_size=3):
            pyro.sample("local", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=says("'local'", "'data'", "3 of 10", "per slot", "AutoAmortizedFlow")):
        fg.AutoIAF(model)()


def test_sequential_plate():
    def model():
        for i in pyro.plate("data", 2):
            pyro.sample(f"x{i}", dist.Normal(0.0, 1.0))

    with pytest.raises(NotImplementedError, match="sequential"):
        fg.AutoIAF(model)()


def branching(deep):
    pyro.sample("x", dist.Normal(0.0, 1.0))
    if deep:
        pyro.sample("extra", dist.Normal(torch.zeros(2), 1.0).to_event(1))


@pytest.mark.parametrize("first", [True, False], ids=["fewer sites", "more sites"])
def test_structure_changes_between_calls(first):
    guide = fg.AutoIAF(branching)
    guide(first)
    change = "missing: ['extra'], new: []" if first else "missing: [], new: ['extra']"
    with pytest.raises(ValueError, match=says("AutoIAF", change, "create one guide per structure")):
        guide(not first)
    assert guide(first), "the guide still serves the structure it was made for"


def test_structure_changes_inside_svi():
    guide = fg.AutoIAF(branching)
    svi = SVI(branching, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(False)
    with pytest.raises(ValueError, match=says("new: ['extra']")):
        svi.step(True)


def test_shapes_change_between_calls():
    def model(data):
        with pyro.plate("data", len(data)):
            local = pyro.sample("local", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(local, 1.0), obs=data)

    guide = fg.AutoIAF(model)
    guide(torch.zeros(4))
    pattern = says("'local'", "(6,)", "'data' of size 6", "(4,)", "'data' of size 4", "AutoAmortizedFlow")
    with pytest.raises(ValueError, match=pattern):
        guide(torch.zeros(6))
    assert guide(torch.ones(4))["local"].shape == (4,)


def test_more_observations_leave_the_structure_unchanged():
    guide = fg.AutoIAF(regression, depth=1)
    guide(*regression_data(4))
    assert guide(*regression_data(9)).keys() == {"slope", "scale"}


def test_data_become_latent_only_if_they_were_data():
    """Prediction samples the observed sites; that is not a change of structure."""
    x, y = regression_data()
    guide = fg.AutoIAF(regression, depth=1)
    guide.setup(x)  # here y is a latent site
    with pytest.raises(ValueError, match=says("missing: ['y']")):
        guide(x, y)


def test_structure_depends_on_latent_values():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        if x > 0:
            pyro.sample("positive only", dist.Normal(x, 1.0))

    with pytest.raises(
        ValueError, match=says("AutoIAF", "at other values", "'positive only'", "one guide per structure")
    ):
        fg.AutoIAF(model)()


def test_support_depends_on_another_latent():
    def model():
        high = pyro.sample("high", dist.LogNormal(0.0, 1.0))
        pyro.sample("below", dist.Uniform(torch.zeros(()), high))

    with pytest.raises(ValueError, match=says("'below'", "depends on other latent variables", "fraction")):
        fg.AutoIAF(model)()


def test_the_remedy_for_a_moving_support_works():
    def model():
        high = pyro.sample("high", dist.LogNormal(0.0, 1.0))
        fraction = pyro.sample("fraction", dist.Uniform(0.0, 1.0))
        pyro.deterministic("below", high * fraction)

    assert fg.AutoIAF(model)().keys() == {"high", "fraction"}


# -- initial values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prior", "value", "shown"),
    [
        (dist.Normal(torch.zeros(3), 1.0).to_event(1), [1.0, float("nan"), 0.0], "[1, nan, 0], shape (3,)"),
        (dist.Normal(torch.zeros(3), 1.0).to_event(1), [1.0, float("inf"), 0.0], "[1, inf, 0], shape (3,)"),
        (dist.LogNormal(torch.zeros(2), 1.0).to_event(1), [1.0, 0.0], "[1, 0], shape (2,)"),
    ],
    ids=["nan", "inf", "zero scale"],
)
def test_initial_value_outside_or_on_the_boundary(prior, value, shown):
    def model():
        pyro.sample("bad", prior)

    guide = fg.AutoIAF(model, init_loc_fn=init_to_value(values={"bad": torch.tensor(value)}))
    with pyro.validation_enabled(False), pytest.raises(ValueError, match=says("'bad'", shown, "init_to_value")):
        guide()


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "nearest"), [("plannar", "planar"), ("IAF2", "iaf"), ("real_nvp", "realnvp")])
def test_unknown_flow(name, nearest):
    with pytest.raises(ValueError, match=says(name, f"did you mean '{nearest}'", "Known flows", "sylvester")):
        fg.AutoFlow(wide(2), name)


class NotAFlow(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("builder", "got"),
    [
        (lambda dim: nn.Linear(dim, dim), "Linear()"),
        (lambda dim: None, "NoneType()"),
        (lambda dim: fg.transforms.Planar(dim + 1), "Planar(4)"),
        (lambda dim: fg.flows.planar(dim, context_dim=2), "ConditionalCompose(3)"),
    ],
    ids=["a module", "nothing", "a flow of another dimension", "a conditional flow"],
)
def test_builder_returns_something_else(builder, got):
    with pytest.raises(ValueError, match=says("builder", "unconditional Flow with input_dim 3", got)):
        fg.AutoFlow(wide(3), builder)()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [0, -1])
def test_depth_below_one(kind, depth):
    guide = make_guide(kind, wide(3), depth=depth)
    with pytest.raises(ValueError, match=says("depth must be at least 1", str(depth))):
        guide()


@pytest.mark.parametrize("scale", [0, 0.0, -0.1, float("nan")])
def test_init_scale_not_positive(scale):
    with pytest.raises(ValueError, match=says("AutoNICE: init_scale must be positive", str(scale))):
        fg.AutoNICE(wide(2), init_scale=scale)


def test_unknown_option():
    with pytest.raises(TypeError, match="no_such_option"):
        fg.AutoPlanar(wide(2), no_such_option=1)


# -- parameters before the model has run -------------------------------------------------------------------------------


def needs_shape(data=None):
    pyro.sample("x", dist.Normal(torch.zeros(data.shape[0]), 1.0).to_event(1))


@pytest.mark.parametrize("model", [regression, needs_shape], ids=["missing argument", "None where data are needed"])
@pytest.mark.parametrize(
    "use",
    [
        lambda guide: torch.optim.Adam(guide.parameters()),
        lambda guide: guide.state_dict(),
        lambda guide: guide.get_posterior(),
        lambda guide: guide.get_base_dist(),
    ],
    ids=["parameters", "state_dict", "posterior", "base"],
)
def test_parameters_before_setup_of_a_model_with_arguments(model, use):
    guide = fg.AutoIAF(model)
    with pytest.raises(RuntimeError, match=says("AutoIAF has no parameters yet", "guide.setup(*args, **kwargs)")):
        use(guide)


def test_errors_of_the_model_itself_are_not_disguised():
    def model():
        raise ZeroDivisionError("of the model")

    with pytest.raises(ZeroDivisionError, match="of the model"):
        fg.AutoIAF(model).state_dict()


# -- files of other guides ---------------------------------------------------------------------------------------------


def test_param_store_of_another_latent_dimension(tmp_path):
    train(wide(3), fg.AutoIAF(wide(3)), 1)
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    with pytest.raises(ValueError, match=says("AutoIAF.transform", "shape (", "needs (", "clear_param_store")):
        fg.AutoIAF(wide(4))()


def test_state_dict_of_another_latent_dimension():
    state = fg.AutoIAF(wide(3)).state_dict()
    uncalled = fg.AutoIAF(wide(4))
    uncalled.load_state_dict(state)
    with pytest.raises(ValueError, match=says("parameters are for the latent sites", "(3,)", "(4,)")):
        uncalled()
    called = fg.AutoIAF(wide(4))
    called()
    with pytest.raises(RuntimeError, match=r"(?s)parameters are for the latent sites.*size mismatch"):
        called.load_state_dict(state)


def test_state_dict_of_another_flow():
    state = fg.AutoIAF(wide(3), depth=2).state_dict()
    for other in (fg.AutoIAF(wide(3), depth=3), fg.AutoPlanar(wide(3))):
        with pytest.raises(RuntimeError, match="Missing key"):
            other.load_state_dict(state)


def test_unpickled_without_its_model():
    def model(data):
        pyro.sample("x", dist.Normal(number(0.0), 1.0))

    guide = fg.AutoIAF(model)
    uncalled = pickle.loads(pickle.dumps(guide))
    with pytest.raises(RuntimeError, match=says("pickled without its model", "guide.model = model")):
        uncalled(torch.zeros(2))
    guide(torch.zeros(2))
    called = pickle.loads(pickle.dumps(guide))
    assert draw(called, torch.zeros(3)), "a guide that is set up draws without its model"


# -- models that are served after all ----------------------------------------------------------------------------------


def test_deterministic_sites_factors_and_blocked_sites_may_change():
    def model(flag):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.deterministic("square", x**2)
        pyro.factor("tilt", x * flag)
        if flag:
            pyro.sample("hidden", dist.Normal(0.0, 1.0))

    guide = fg.AutoIAF(poutine.block(model, hide=["hidden"]))
    assert guide(1).keys() == guide(0).keys() == {"x"}


def test_a_model_that_fails_away_from_its_start_is_served():
    """The structure is compared at a few points, except those at which the model cannot run."""

    def model():
        x = pyro.sample("x", dist.Normal(number(0.0), 1.0))
        reached.append(x.item())
        assert x.abs() < 0.1, "far away"

    reached = []
    guide = fg.AutoIAF(model, init_scale=0.01, init_loc_fn=init_to_value(values={"x": number(0.0)}))
    assert guide().keys() == {"x"}
    assert max(map(abs, reached)) > 0.1


def test_probing_leaves_no_trace():
    calls = []

    def model():
        calls.append(pyro.sample("x", dist.Normal(number(0.0), 1.0)).item())

    guide = fg.AutoIAF(model)
    with poutine.trace() as trace, pyro.plate("outer", 3, dim=-1):
        guide.setup()
    assert not [name for name in trace.trace.nodes if name not in ("outer", "_INPUT", "_RETURN")]
    assert guide.latent_dim == 1
    assert len(set(calls)) > 1, "the model was tried at several points"


@pytest.mark.parametrize("vectorize", [False, True])
def test_schools_is_served(vectorize):
    guide = fg.AutoIAF(schools, depth=1)
    loss = Trace_ELBO(num_particles=2, vectorize_particles=vectorize, max_plate_nesting=1)
    assert torch.isfinite(torch.tensor(loss.loss(schools, guide, torch.zeros(3))))
