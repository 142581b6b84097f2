"""The autoguides of registered flows: found by the registry, with the flow's options in signature and docstring."""

import copy
import doctest
import inspect
import pickle
import pydoc
import re

import pyro
import pytest
import torch
from pyro.infer.autoguide import AutoIAFNormal, init_to_mean
from torch.testing import assert_close

import pyro_flowguides as fg
from pyro_flowguides.flows import FLOWS, layer_class
from pyro_flowguides.transforms.docstrings import parse_docstring
from tests.guides.zoo import draw, same, train, values, wide, without_arguments

every_flow = pytest.mark.parametrize("flow", FLOWS)


def guide_class(flow):
    return getattr(fg, f"Auto{FLOWS[flow].title}")


def options_of(function):
    """Return the keyword-only parameters by name."""
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name: parameter for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


# -- the classes -------------------------------------------------------------------------------------------------------


@every_flow
def test_every_flow_has_an_autoguide(flow):
    cls = guide_class(flow)
    assert issubclass(cls, fg.AutoFlow)
    assert cls.__name__ in fg.__all__
    assert cls.__name__ in dir(fg)
    assert cls.__name__ in fg.guides.__all__
    assert getattr(fg.guides, cls.__name__) is cls
    assert pickle.loads(pickle.dumps(cls)) is cls


def test_star_imports_bring_all_autoguides():
    namespace = {}
    exec("from pyro_flowguides import *", namespace)
    assert {f"Auto{builder.title}" for builder in FLOWS.values()} <= namespace.keys()


@every_flow
def test_the_autoguide_is_autoflow_with_its_flow(flow):
    options = {"depth": 2, "init_scale": 0.3}
    guides = []
    for build in (guide_class(flow), lambda model, **options: fg.AutoFlow(model, flow, **options)):
        pyro.set_rng_seed(0)
        guides.append(build(wide(3), **options))
        guides[-1].setup()
    assert_close(values(guides[0]), values(guides[1]), rtol=0, atol=0)
    assert type(guides[0]).__name__ in repr(guides[0])


def test_options_reach_the_builder():
    guide = fg.AutoSylvester(wide(4), variant="triangular", bottleneck=2, depth=3)
    guide.setup()
    layers = list(guide.get_transform().parts[0].parts)
    assert [type(layer).__name__ for layer in layers] == ["TriangularSylvester"] * 3


@every_flow
def test_unknown_options_name_the_nearest_at_once(flow):
    cls = guide_class(flow)
    for option in options_of(cls):
        with pytest.raises(TypeError, match=rf"^{cls.__name__}: unknown option '{option}x', did you mean '{option}'\?"):
            cls(wide(2), **{f"{option}x": 1})
    with pytest.raises(TypeError, match=rf"unknown option 'qqq'\. Options of {flow}: depth, hidden_dims"):
        cls(wide(2), qqq=1)
    with pytest.raises(TypeError, match=r"AutoFlow: unknown option 'dept', did you mean 'depth'\?"):
        fg.AutoFlow(wide(2), flow, dept=1)


@pytest.mark.parametrize("module", [fg, fg.guides])
def test_unknown_names_name_the_nearest_autoguide(module):
    with pytest.raises(
        AttributeError, match=rf"'{module.__name__}' has no .*'AutoRealNPV', did you mean 'AutoRealNVP'"
    ):
        module.AutoRealNPV  # noqa: B018
    with pytest.raises(AttributeError, match=r"has no attribute 'diagnoze'$"):
        module.diagnoze  # noqa: B018


# -- signature and docstring -------------------------------------------------------------------------------------------


@every_flow
def test_the_signature_names_every_option(flow):
    options = options_of(guide_class(flow)) | dict(inspect.signature(guide_class(flow)).parameters)
    assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in options.values())
    for source in (FLOWS[flow], fg.AutoFlow):
        for name, parameter in options_of(source).items():
            assert name in options
            if name != "init_loc_fn":  # AutoIAF has it at the place and with the default that it has in Pyro
                assert options[name] == parameter


@every_flow
def test_the_docstring_explains_every_argument(flow):
    docs = parse_docstring(guide_class(flow).__doc__)
    builder = parse_docstring(FLOWS[flow].__doc__).arguments
    assert list(docs.arguments) == list(inspect.signature(guide_class(flow)).parameters)
    for name, text in docs.arguments.items():
        assert len(text) > 10
        assert "not described" not in text
        assert text == builder.get(name, text)


@every_flow
def test_the_docstring_has_equation_cost_and_references(flow):
    docs = parse_docstring(guide_class(flow).__doc__)
    layer = layer_class(flow)
    assert isinstance(guide_transform(flow), layer)
    assert f"One layer**, :class:`~pyro_flowguides.transforms.{layer.__name__}`" in docs.body
    assert r".. math::" in docs.body
    assert r"\log|\det" in docs.body
    assert "Cost:" in docs.body
    assert re.search(r"\(\d{4}\)\.", docs.sections["References"])
    assert docs.sections.keys() >= {"Args", "Raises", "Example"}


def guide_transform(flow):
    """Return the first layer of the guide's flow."""
    guide = guide_class(flow)(wide(3))
    guide.setup()
    return guide.get_transform().parts[0].parts[0]


@every_flow
def test_help_shows_the_options(flow):
    text = pydoc.render_doc(guide_class(flow), renderer=pydoc.plaintext)
    for name in options_of(FLOWS[flow]):
        assert f"{name}: " in text
    assert "Autoguide whose posterior is a flow of" in text


@every_flow
def test_the_example_of_the_docstring_runs(flow):
    cls = guide_class(flow)
    (test,) = doctest.DocTestFinder(recurse=False).find(cls, cls.__name__, module=False)
    output = []
    failed, attempted = doctest.DocTestRunner().run(test, out=output.append)
    assert attempted == 7
    assert not failed, "".join(output)


# -- a flow of the user's ----------------------------------------------------------------------------------------------


@pytest.fixture
def two_couplings():
    """Register a flow for one test."""

    @fg.flows.register("TwoCouplings")
    def two_couplings(input_dim, context_dim=0, *, hidden_dims=(8,), flip=True):
        """Build a flow of two affine couplings.

        Args:
            input_dim: D.
            context_dim: width of the context, 0 for none.
            hidden_dims: widths of the networks.
            flip: change the other half of the coordinates in the second coupling.
        """
        orders = [range(input_dim), range(input_dim)[::-1] if flip else range(input_dim)]
        if context_dim:
            family = fg.transforms.ConditionalAffineCoupling
            parts = [family(input_dim, context_dim, hidden_dims=hidden_dims, order=order) for order in orders]
            return fg.transforms.ConditionalCompose(parts)
        return fg.transforms.Compose(fg.transforms.AffineCoupling(input_dim, hidden_dims, order=o) for o in orders)

    yield two_couplings
    del FLOWS["two_couplings"]


def test_a_flow_registered_by_a_user_gets_an_autoguide(two_couplings):
    cls = fg.AutoTwoCouplings
    assert cls is guide_class("two_couplings")
    assert "AutoTwoCouplings" in dir(fg)
    assert list(inspect.signature(cls).parameters) == [
        *("model", "init_loc_fn", "init_scale", "path_gradient", "hidden_dims", "flip")
    ]
    for check in (
        test_the_signature_names_every_option,
        test_the_docstring_explains_every_argument,
        test_the_docstring_has_equation_cost_and_references,
        test_help_shows_the_options,
        test_the_example_of_the_docstring_runs,
    ):
        check("two_couplings")
    assert f":func:`~{__name__}.two_couplings`" in cls.__doc__


def test_the_autoguide_of_a_users_flow_works(two_couplings):
    guide = fg.AutoTwoCouplings(without_arguments, hidden_dims=[4], flip=False)
    assert guide().keys() == {"x", "s"}
    start = values(guide)
    train(without_arguments, guide, 3)
    assert not same(values(guide), start)
    for other in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        assert same(draw(other), draw(guide))
    with pytest.raises(TypeError, match="did you mean 'flip'"):
        fg.AutoTwoCouplings(without_arguments, flipp=True)
    posterior = fg.FlowPosterior(3, 2, "two_couplings")
    assert posterior(torch.zeros(3), torch.ones(3), torch.zeros(5, 2)).sample().shape == (5, 3)


def test_a_flow_registered_again_gets_a_new_autoguide(two_couplings):
    before = fg.AutoTwoCouplings

    def two_couplings(input_dim, context_dim=0, *, scale=1.0):
        """Build a flow of one radial layer."""
        return fg.transforms.Radial(input_dim)

    fg.flows.register("TwoCouplings")(two_couplings)
    assert fg.AutoTwoCouplings is not before
    assert "scale" in inspect.signature(fg.AutoTwoCouplings).parameters
    assert fg.AutoTwoCouplings(wide(2))()["x"].shape == (2,)


def test_a_flow_that_is_no_longer_registered_has_no_autoguide():
    with pytest.raises(AttributeError, match="AutoTwoCouplings"):
        fg.AutoTwoCouplings  # noqa: B018


# -- the options of Pyro's AutoIAFNormal -------------------------------------------------------------------------------


def test_options_of_pyros_iaf_guide():
    guide = fg.AutoIAF(wide(4), [7, 9], init_to_mean, 2)
    guide.setup()
    layers = list(guide.get_transform().parts[0].parts)
    assert [layer.conditioner.hidden_dims for layer in layers] == [(7, 9)] * 2
    same_by_name = fg.AutoIAF(wide(4), hidden_dim=[7, 9], num_transforms=2)
    assert same_by_name.state_dict().keys() == guide.state_dict().keys()


def test_every_option_of_pyros_iaf_guide_is_accepted():
    options = {"stable": True, "sigmoid_bias": 1.0, "log_scale_min_clip": -3.0, "log_scale_max_clip": 2.0}
    theirs = AutoIAFNormal(wide(2), [8], num_transforms=2, **options)
    with pytest.warns(UserWarning, match="has no effect") as warned:
        ours = fg.AutoIAF(wide(2), [8], num_transforms=2, **options)
    assert [str(warning.message).split()[1] for warning in warned] == sorted(options.keys() - {"stable"})
    assert {warning.filename for warning in warned} == {__file__}
    for guide in (theirs, ours):
        train(wide(2), guide, 2)
    assert [layer.update for layer in ours.get_transform().parts[0].parts] == ["gated"] * 2


@pytest.mark.parametrize(
    ("pyros", "ours"),
    [
        ({"hidden_dim": [8]}, {"hidden_dims": [8]}),
        ({"num_transforms": 2}, {"depth": 2}),
        ({"stable": True}, {"update": "shift"}),
    ],
)
def test_pyros_and_our_name_of_an_option_together_are_refused(pyros, ours):
    with pytest.raises(TypeError, match=f"{next(iter(pyros))} is Pyro's name for {next(iter(ours))}"):
        fg.AutoIAF(wide(2), **pyros, **ours)
