"""The promises of each family: where it starts, its names and documentation, what it refuses."""

import doctest
import inspect
import math
import pickle
import pkgutil
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_flowguides import transforms as T
from pyro_flowguides.transforms.docstrings import parse_docstring
from tests.transforms.families import (
    CASES,
    CONDITIONAL,
    CONTEXT_DIM,
    DEFAULT,
    DIMS,
    PARAMETRIC,
    PLAIN,
    jacobian,
    name,
    randomize,
    seeded,
)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("case", [case for case in PARAMETRIC if "permutation" not in case.options], ids=name)
def test_starts_at_the_identity(case, dim):
    """Within 1e-2, for several draws of the initial weights, at any context. LULinear starts at its permutation."""
    for seed in range(5):
        flow = case.flow(dim, None, (200,), seed=seed)
        x = torch.randn(200, dim)
        with torch.no_grad():
            for value, ladj in (flow.forward_and_ladj(x), flow.inverse_and_ladj(x)):
                assert (value - x).abs().max() <= 1e-2
                assert ladj.abs().max() <= 1e-2 * math.sqrt(dim)


@pytest.mark.parametrize("case", [case for case in CONDITIONAL if "permutation" not in case.options], ids=name)
def test_the_context_matters_after_a_few_steps_but_not_at_the_start(case):
    module = case.build(3)
    x, contexts = torch.randn(20, 3), torch.randn(2, 1, CONTEXT_DIM)

    def difference():
        y, _ = module.condition(contexts).forward_and_ladj(x)
        return (y[0] - y[1]).abs().max().item()

    assert difference() <= 1e-6
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for _ in range(3):
        y, ladj = module.condition(contexts).forward_and_ladj(x)
        target = torch.stack([2 + 3 * x.roll(1, -1), -0.5 * x])
        loss = (y - target).square().mean() - 0.1 * ladj.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert difference() > 1e-6


@pytest.mark.parametrize("hidden_dims", [(), (1,)], ids=str)
def test_a_step_of_adam_moves_amortized_parameters_by_the_root_of_the_number_of_features(hidden_dims):
    """At constant features n weights move by the learning rate each, and 1/sqrt(n) of their sum reaches the output."""
    moved = []
    for width in (16, 1600):
        hidden = [width for _ in hidden_dims]
        flow = T.ConditionalPlanar(3, context_dim=width, hidden_dims=hidden)
        for weight, bias in list(zip(flow.hyper.network.weights, flow.hyper.network.biases, strict=True))[:-1]:
            torch.nn.init.zeros_(weight)
            torch.nn.init.ones_(bias)
        optimizer = torch.optim.Adam([flow.hyper.network.weights[-1]], lr=1e-3)
        context = torch.ones(width)
        flow.hyper(context)["u"].sum().backward()
        optimizer.step()
        moved.append(flow.hyper(context)["u"].abs().mean().item())
    assert moved[1] == pytest.approx(10 * moved[0], rel=1e-3)


def helper_name(case):
    words = re.findall("[A-Z]+(?=[A-Z][a-z])|[A-Z][a-z]+", case.family.__name__)
    return "_".join(words).lower()


@pytest.mark.parametrize("case", DEFAULT, ids=name)
def test_pyro_style_helper(case):
    assert helper_name(case) in T.__all__
    module = getattr(T, helper_name(case))(*((3, CONTEXT_DIM) if case.conditional else (3,)))
    assert isinstance(module, case.family)
    assert module.input_dim == 3
    assert str(module.input_dim) in repr(module)


@pytest.mark.parametrize("case", [case for case in PARAMETRIC if not case.options], ids=name)
def test_every_parametric_family_exists_in_both_forms(case):
    name = case.family.__name__
    assert (name.removeprefix("Conditional") if case.conditional else f"Conditional{name}") in T.__all__


def test_names_of_the_package():
    """They are sorted, and none is that of a module of the package, which it would hide."""
    assert T.__all__ == sorted(T.__all__)
    modules = {module.name for module in pkgutil.iter_modules(T.__path__)}
    assert {"flow", "families"} <= modules
    assert not modules & set(T.__all__)


@pytest.mark.parametrize("case", [case for case in CONDITIONAL if not case.options], ids=name)
def test_a_conditional_class_shows_the_options_of_its_family(case):
    """In its signature, with the defaults that it really has, and in its docstring."""
    options = inspect.signature(case.formula).parameters.keys() - {"input_dim", "cache_size"}
    parameters = inspect.signature(case.family).parameters
    assert list(parameters)[:2] == ["input_dim", "context_dim"]
    assert options <= parameters.keys()
    arguments = parse_docstring(case.family.__doc__).arguments
    assert arguments.keys() == parameters.keys()
    assert all(arguments.values())
    chosen = {option: parameters[option].default for option in options}
    states = []
    for given in (chosen, {}):
        with seeded(0):
            states.append(case.family(3, CONTEXT_DIM, **given).state_dict())
    explicit, default = states
    assert explicit.keys() == default.keys()
    assert all(torch.equal(explicit[key], default[key]) for key in default)


@pytest.mark.parametrize("case", [case for case in CONDITIONAL if not case.options], ids=name)
def test_a_conditional_class_is_an_ordinary_class(case):
    family = case.family
    assert (family.__name__, family.__qualname__) == (f"Conditional{case.formula.__name__}",) * 2
    assert family.__module__ == case.formula.__module__
    assert issubclass(family, (T.AmortizedFlow, T.ContextFlow))
    assert pickle.loads(pickle.dumps(family)) is family

    class Derived(family):
        def __init__(self, input_dim):
            super().__init__(input_dim, CONTEXT_DIM)

    module = Derived(3)
    assert isinstance(module, family)
    assert isinstance(module.flow, Derived.family)
    assert list(inspect.signature(Derived).parameters) == ["input_dim"]
    assert module.condition(torch.randn(4, CONTEXT_DIM))(torch.randn(4, 3)).shape == (4, 3)


@pytest.mark.parametrize("case", DEFAULT, ids=name)
def test_every_family_documents_its_cost_and_arguments_and_has_an_example(case):
    """The examples run as doctests, those of conditional classes included."""
    docs = parse_docstring(case.family.__doc__)
    parameters = inspect.signature(case.family).parameters.keys() - {"cache_size"}
    assert docs.arguments.keys() == parameters
    assert "Cost: " in docs.body
    (example,) = doctest.DocTestFinder(recurse=False).find(case.family)
    assert len(example.examples) >= 3
    assert any(case.family.__name__ in line.source for line in example.examples)


def test_random_permutations_differ():
    torch.default_generator.manual_seed(0)
    assert not torch.equal(T.permute(20).permutation, T.permute(20).permutation)
    assert T.permute(3, [2, 0, 1]).permutation.tolist() == [2, 0, 1]


@pytest.mark.parametrize("case", DEFAULT, ids=name)
def test_direction_that_takes_one_pass(case):
    flow = case.flow(3)
    assert flow.cheap_direction == {"InverseAutoregressive": "forward", "MaskedAutoregressive": "inverse"}.get(
        case.formula.__name__, "both"
    )


# -- particular families -----------------------------------------------------------------------------------------------


def test_act_norm_initialize():
    flow = T.ActNorm(3)
    x = torch.randn(50, 4, 3) * torch.tensor([1.0, 10.0, 0.1]) + torch.tensor([3.0, 0.0, -1.0])
    flow.initialize(x)
    y = flow(x).reshape(-1, 3)
    torch.testing.assert_close(y.mean(0), torch.zeros(3))
    torch.testing.assert_close(y.std(0), torch.ones(3))
    constant = x.clone()
    constant[..., 1] = 7
    with pytest.raises(ValueError, match=r"ActNorm: coordinates \[1\] do not vary in the batch"):
        flow.initialize(constant)
    with pytest.raises(ValueError, match=r"ActNorm: coordinates \[0, 1, 2\] do not vary"):
        flow.initialize(x[0, 0])


@pytest.mark.parametrize("family", [T.ElementwiseAffine, T.LowerTriangularAffine])
def test_affine_families_start_at_the_given_location_and_scale(family):
    loc, scale = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 3.0])
    flow = family(2, loc=loc, scale=scale)
    x = torch.randn(5, 2)
    y, ladj = flow.forward_and_ladj(x)
    torch.testing.assert_close(y, loc + scale * x)
    torch.testing.assert_close(ladj, scale.log().sum().expand(5))
    with torch.no_grad():
        flow.loc.add_(1)
    assert loc.tolist() == [1.0, 2.0]  # the flow has copied it


def test_lower_triangular_affine_is_a_cholesky_factor():
    flow = randomize(T.LowerTriangularAffine(4), 0.5)
    origin = flow.forward_and_ladj(torch.zeros(4))[0]
    matrix = (flow.forward_and_ladj(torch.eye(4))[0] - origin).mT
    torch.testing.assert_close(matrix, matrix.tril())
    assert (matrix.diagonal() > 0).all()
    assert torch.count_nonzero(matrix) == 10


def test_radial_inverse_keeps_its_relative_accuracy_at_the_center():
    """The quadratic for the radius is solved without cancellation, for contractions and expansions."""
    for beta in (-3.0, 3.0, 1e9):
        flow = T.Radial(3)
        with torch.no_grad():
            flow.center.zero_(), flow.alpha.fill_(5.0), flow.beta.fill_(beta)
        for size in (1e-12, 1.0, 1e12):
            x = size * torch.randn(10, 3)
            back = flow.inverse_and_ladj(flow.forward_and_ladj(x)[0])[0]
            torch.testing.assert_close(back, x, rtol=1e-10, atol=0)


def test_linear_families_are_linear():
    for flow in (randomize(T.LULinear(4, [2, 0, 3, 1]), 0.5), randomize(T.QRLinear(4), 0.5), T.Householder(4, 4)):
        x, y = torch.randn(2, 5, 4)
        torch.testing.assert_close(flow(2 * x - 3 * y), 2 * flow(x) - 3 * flow(y))


def test_householder_is_a_rotation():
    flow = randomize(T.Householder(5, 4), 1.0)
    matrix = flow.forward_and_ladj(torch.eye(5))[0]
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(5))
    assert torch.linalg.det(matrix).item() == pytest.approx(1)


@pytest.mark.parametrize("family", [T.OrthogonalSylvester, T.HouseholderSylvester, T.TriangularSylvester])
@pytest.mark.parametrize("bottleneck", [1, 2, 5])
def test_sylvester_moves_points_within_a_subspace_and_reads_only_their_part_in_it(family, bottleneck):
    flow = randomize(family(5, bottleneck), 1.0)
    x = torch.randn(20, 5)
    step = flow(x) - x
    assert torch.linalg.matrix_rank(step) == bottleneck
    columns = torch.linalg.svd(step).Vh[:bottleneck].mT
    torch.testing.assert_close(step @ columns @ columns.mT, step)
    across = torch.randn(20, 5)
    across = across - across @ columns @ columns.mT
    torch.testing.assert_close(flow(x + across) - (x + across), step)


class Largest(TorchDispatchMode):
    """Find the largest number of elements of a tensor that is computed inside."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outcome = function(*args, **(kwargs or {}))
        for tensor in outcome if isinstance(outcome, (tuple, list)) else (outcome,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return outcome


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize(
    ("family", "options"), [("Householder", {}), ("HouseholderSylvester", {"bottleneck": 4})], ids=lambda value: value
)
def test_reflections_are_applied_to_vectors(family, options, conditional):
    """No D × D matrix arises, forward, inverse or backward, nor one for every point of a context's batch."""
    dim, points = 100, 3
    if conditional:
        module = randomize(getattr(T, f"Conditional{family}")(dim, 1, reflections=4, **options), 0.3)
        flow = module.condition(torch.randn(points, 1))
    else:
        flow = randomize(getattr(T, family)(dim, reflections=4, **options), 0.3)
    x = torch.randn(points, dim, requires_grad=True)
    with Largest() as largest:
        y, ladj = flow.forward_and_ladj(x)
        back, _ = flow.inverse_and_ladj(y)
        (back.sum() + y.sum() + ladj.sum()).backward()
    parameters = sum(value.numel() for value in flow.formulas()[0].theta.values())
    assert points * dim <= largest.elements <= (parameters if conditional else points * 4 * dim) < dim * dim


def test_couplings_keep_the_first_half_of_their_order():
    for family in (T.AdditiveCoupling, T.AffineCoupling):
        flow = randomize(family(5, [8], order=[4, 2, 0, 1, 3]), 1.0)
        x = torch.randn(7, 5)
        changed = (flow(x) != x).all(0)
        assert changed.tolist() == [True, True, False, True, False]
        j = jacobian(flow, x[:1])[0]
        assert j[0, 1] == j[1, 0] == 0  # changed coordinates do not see each other
        assert (j[[0, 1, 3]][:, [4, 2]] != 0).all()


@pytest.mark.parametrize("gain", [0.05, 0.7])
def test_the_affine_updates_match_their_formula(gain):
    iaf, maf = (randomize(family(2, [8]), 3.0) for family in (T.InverseAutoregressive, T.MaskedAutoregressive))
    realnvp = randomize(T.AffineCoupling(4, [8]), 3.0)
    x = torch.randn(60, 2)
    for flow, stretching in ((iaf, 1), (maf, -1), (realnvp, 1)):
        flow.set_gain(gain)
        raw, shift = (gain * output for output in flow.conditioner(x).chunk(2, -1))
        bound = torch.where(stretching * raw > 0, 2 * gain, 2.0)
        log_scale, shift = (
            bound * torch.tanh(raw / bound),
            3 / (1.001 - gain) * torch.asinh((1.001 - gain) * shift / 3),
        )
        if flow is realnvp:
            y, ladj = flow.forward_and_ladj(torch.cat([x, 7 + x], -1))
            torch.testing.assert_close(y, torch.cat([x, log_scale.exp() * (7 + x) + shift], -1))
        else:
            y, ladj = flow.forward_and_ladj(x) if flow is iaf else flow.inverse_and_ladj(x)
            torch.testing.assert_close(y, log_scale.exp() * x + shift)
        torch.testing.assert_close(stretching * ladj, log_scale.sum(-1))
        assert (stretching * log_scale).max() <= 2 * gain + 1e-12
        assert (stretching * log_scale).min() < -2 * gain


def test_the_gain_lies_between_zero_and_one_and_is_learned_slowly():
    flow = T.AffineCoupling(4, [8])
    assert flow.theta()["gain"].item() == pytest.approx(0.99)
    for gain in (0.0, 1.0, -0.3, float("nan")):
        with pytest.raises(ValueError, match=r"set_gain: gain must lie in \(0, 1\), got"):
            flow.set_gain(gain)
    flow.set_gain(0.05)
    before = flow.theta()["gain"].item()
    optimizer = torch.optim.Adam([flow.gain], lr=0.02)
    for _ in range(1000):
        optimizer.zero_grad()
        (-flow.theta()["gain"]).backward()
        optimizer.step()
    assert 1.5 * before < flow.theta()["gain"].item() < 10 * before


def test_the_gated_update_matches_its_formula_and_never_shuts():
    flow = randomize(T.InverseAutoregressive(2, [8], update="gated"), 0.7)
    x = torch.randn(6, 2)
    gain = flow.theta()["gain"]
    raw, shift = (gain * output for output in flow.conditioner(x).chunk(2, -1))
    bound = torch.where(raw > 0, 4 * gain, 4.0)
    gate, start = torch.sigmoid(bound * torch.tanh(raw / bound) + 2), torch.sigmoid(torch.tensor(2.0))
    y, ladj = flow.forward_and_ladj(x)
    torch.testing.assert_close(y, gate / start * x + (1 - gate) * shift)
    torch.testing.assert_close(ladj, (gate / start).log().sum(-1))
    flow.conditioner.biases[-1].data[:2] = -1e6
    assert (flow.forward_and_ladj(x)[1] >= 2 * -2 - 1e-9).all()


@pytest.mark.parametrize("update", ["affine", "gated", "shift"])
def test_the_shift_has_a_gradient_at_the_start(update):
    flow = T.InverseAutoregressive(3, [8], update=update).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    y, _ = flow.forward_and_ladj(x)
    torch.testing.assert_close(y, x)
    y.sum().backward()
    assert (flow.conditioner.biases[-1].grad[3:].abs() > 0.1 * len(x)).all()


def test_maf_is_the_inverse_of_iaf_with_the_same_weights_at_a_gain_of_one():
    """At smaller gains both hardly stretch their draws, and the inverse of a flow hardly shrinks them."""
    iaf, maf = T.InverseAutoregressive(4, [16]), T.MaskedAutoregressive(4, [16])
    randomize(iaf, 0.5).gain.data.fill_(1e3)
    maf.load_state_dict(iaf.state_dict())
    x = torch.randn(6, 4)
    y, ladj = iaf.forward_and_ladj(x)
    back, inverse_ladj = maf.forward_and_ladj(y)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse_ladj, -ladj)


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=name)
def test_wrong_last_dimension(case):
    flow = case.flow(3, None, (4,))
    for call in (flow.forward_and_ladj, flow.inverse_and_ladj, flow, flow.inv):
        with pytest.raises(ValueError, match=rf"{type(flow).__name__}: .*\(\.\.\., 3\), got \(4, 2\)"):
            call(torch.randn(4, 2))
        with pytest.raises(ValueError, match=r"\(\.\.\., 3\), got \(\)"):
            call(torch.tensor(1.0))


@pytest.mark.parametrize("case", DEFAULT, ids=name)
@pytest.mark.parametrize("dim", [0, -1])
def test_input_dim_below_one(case, dim):
    if "input_dim" in inspect.signature(case.formula).parameters:
        arguments = (dim, CONTEXT_DIM) if case.conditional else (dim,)
        with pytest.raises(ValueError, match=rf"{case.formula.__name__}: input_dim must be at least 1, got (0|{dim})"):
            case.family(*arguments)
    else:
        with pytest.raises(ValueError, match="input_dim must be at least 1, got 0"):
            case.family(dim if case.family is T.Reverse else [])


@pytest.mark.parametrize("case", [case for case in DEFAULT if case.conditional], ids=name)
def test_context_of_the_wrong_width(case):
    module = case.build(3)
    with pytest.raises(ValueError, match=rf"{case.family.__name__}: .*\(\.\.\., {CONTEXT_DIM}\), got \(4, 7\)"):
        module.condition(torch.randn(4, 7))
    with pytest.raises(ValueError, match=r"got \(\)"):
        module.condition(torch.tensor(1.0))
    with pytest.raises(ValueError, match="context_dim must be at least 1, got 0"):
        case.family(3, 0)


@pytest.mark.parametrize("case", PLAIN, ids=name)
@pytest.mark.parametrize("order", [[0, 1], [0, 0, 2], [1, 2, 3], [0, 1, 2, 3], [[0, 1, 2]]])
def test_invalid_orders(case, order):
    accepted = inspect.signature(case.family).parameters
    for option in {"order", "permutation"} & set(accepted):
        if case.family is T.Permute and sorted(order) == list(range(len(order))):
            continue  # it has the dimension of its permutation
        with pytest.raises(ValueError, match=r"(order|permutation) must be a permutation of 0\.\."):
            case.family(*([3] if "input_dim" in accepted else []), **{option: order})


@pytest.mark.parametrize("case", DEFAULT, ids=name)
def test_options_out_of_range(case):
    accepted = inspect.signature(case.formula).parameters
    arguments = (3, CONTEXT_DIM) if case.conditional else (3,)
    for option, values, message in [
        ("bottleneck", [0, 4, -1], r"Sylvester: bottleneck must lie in 1\.\.3, got {}"),
        ("reflections", [0, 1, 3, -2], "reflections must be even and at least 2.*{}"),
        ("update", ["afine", None], r"update must be one of \['affine', 'gated', 'shift'\], got {!r}"),
        ("hidden_dims", [[0], [8, -1]], "layer widths must be positive"),
    ]:
        if option in accepted:
            for value in values:
                with pytest.raises(ValueError, match=message.format(value)):
                    case.family(*arguments, **{option: value})
    with pytest.raises(TypeError, match="nonsense"):
        case.family(*arguments, nonsense=1)


def test_parts_that_do_not_fit_together():
    with pytest.raises(ValueError, match=r"Compose: the parts must share one input_dim, got \[2, 3\]"):
        T.Compose([T.Planar(2), T.Planar(3)])
    with pytest.raises(ValueError, match=r"Compose: .*no parts"):
        T.Compose([])
    with pytest.raises(ValueError, match=r"ConditionalCompose: the parts must share one input_dim, got \[2, 3\]"):
        T.ConditionalCompose([T.ConditionalPlanar(2, 1), T.Planar(3)])
    with pytest.raises(ValueError, match=r"ConditionalCompose: the parts must share one context_dim, got \[1, 2\]"):
        T.ConditionalCompose([T.ConditionalPlanar(2, 1), T.ConditionalPlanar(2, 2)])
    with pytest.raises(ValueError, match=r"share one context_dim, got \[\]"):
        T.ConditionalCompose([T.Planar(2)])
