"""The inverse of autoregressive maps: exact, in whichever way it is computed, and with a gradient.

For any network it is a fixed point, which stops early and is exact after D passes. For the MADE of a flow it is forward
substitution, level by level or in blocks.
"""

import copy
from functools import partial

import pytest
import torch

from pyro_flowguides.inference.replay import record
from pyro_flowguides.transforms import ConditionalInverseAutoregressive, InverseAutoregressive, MaskedAutoregressive
from pyro_flowguides.transforms.solvers import autoregressive_root
from pyro_flowguides.transforms.updates import UPDATES, invert_affine
from tests.transforms.families import CASES, DIMS, SCALES, as_under_tracing, name

AUTOREGRESSIVE = [case for case in CASES if issubclass(case.formula, (InverseAutoregressive, MaskedAutoregressive))]
EPS = torch.finfo(torch.float64).eps


def cheap(flow):
    """The direction that takes one pass."""
    return flow.inverse_and_ladj if flow.cheap_direction == "inverse" else flow.forward_and_ladj


def expensive(flow):
    """The direction that solves."""
    return flow.forward_and_ladj if flow.cheap_direction == "inverse" else flow.inverse_and_ladj


def affine_map(flow):
    """The function from z to log-scale and shift that the cheap direction applies."""
    ((layer, theta),) = flow.formulas()
    return lambda z: layer.affine_map(z, theta)


def conditioner(flow):
    ((layer, _),) = flow.formulas()
    return layer.conditioner


def solve_one_by_one(flow, w):
    """The textbook inversion: one coordinate after the other in the order of the conditioner, a network pass each."""
    a_and_m = affine_map(flow)
    z = torch.zeros_like(w)
    for i in conditioner(flow).order.tolist():
        log_scale, shift = a_and_m(z)
        z[..., i] = (w[..., i] - shift[..., i]) / log_scale[..., i].exp()
    return z


def residual(flow, z, w):
    log_scale, shift = affine_map(flow)(z)
    return (z * log_scale.exp() + shift - w).abs()


def solve_by_passes(flow, w):
    return autoregressive_root(affine_map(flow), w, conditioner(flow).order.argsort())


def _substitute(flow, w, method, **options):
    ((layer, theta),) = flow.formulas()

    def solve(raw, shift, w):
        return invert_affine(*UPDATES[layer.update](raw, shift, layer.limits(theta)), w)

    return getattr(layer.conditioner, method)(solve, [w], theta, **options)


SUBSTITUTIONS = {
    "level by level": partial(_substitute, method="substitute"),
    "level by level in place": partial(_substitute, method="substitute_in_blocks", max_iterated=0),
    "iterated": partial(_substitute, method="substitute_in_blocks", max_iterated=10**9),
}


class count_passes:
    """Count the runs of the conditioner of a flow."""

    def __init__(self, flow, monkeypatch):
        self.passes = 0
        network = conditioner(flow)
        run = network.run

        def counted(*arguments):
            self.passes += 1
            return run(*arguments)

        monkeypatch.setattr(network, "run", counted)


@pytest.mark.parametrize("substitution", SUBSTITUTIONS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dim", [2, 3, 8, 32, 64])
@pytest.mark.parametrize("case", AUTOREGRESSIVE, ids=name)
@torch.no_grad()
def test_substitution_is_as_accurate_as_solving_one_by_one(case, dim, scale, substitution):
    """In single precision, judged in double precision, at points that the flow did not produce, far ones included.

    Both methods sum in orders of their own, so the median and the upper decile of their errors are compared. In few
    dimensions points share scales, and so their rounding; there are more flows then.
    """
    errors = []
    # The wide network has several blocks; smaller weights keep its coordinates within single precision.
    scale, hidden_dims = (scale, [7, 20]) if dim < 64 else (scale / 3, [64, 70])
    for seed in range(16 if dim < 5 else 1):
        flow = case.flow(dim, scale, (600,), seed=seed, hidden_dims=hidden_dims)
        w = torch.randn(600, dim) * torch.tensor([1e-3, 1.0, 1.0, 10.0, 1e3, 1e6]).repeat(100)[:, None]
        single, v = copy.deepcopy(flow).float(), w.float()
        for z in (SUBSTITUTIONS[substitution](single, v), solve_one_by_one(single, v)):
            size = v.abs() + affine_map(single)(z)[1].abs()
            errors.append(residual(flow, z.double(), v.double()) / size.double())
    ours, naive = (torch.stack(errors[k::2]).quantile(torch.tensor([0.5, 0.9])) for k in (0, 1))
    assert (ours <= 1.25 * naive).all()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("case", AUTOREGRESSIVE, ids=name)
@torch.no_grad()
def test_a_single_dimension_is_solved_to_the_last_bit(case, scale):
    """In one dimension the passes that refine a substitution do just what :func:`solve_one_by_one` does."""
    for seed in range(16):
        single = case.flow(1, scale, (60,), seed=seed, hidden_dims=[7, 20]).float()
        v = torch.randn(60, 1).float() * torch.logspace(-3, 6, 60)[:, None].float()
        assert torch.equal(expensive(single)(v)[0], solve_one_by_one(single, v))


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.0, 3.0, 5.0])
@pytest.mark.parametrize("family", [InverseAutoregressive, MaskedAutoregressive])
@torch.no_grad()
def test_round_trips_in_single_precision(family, scale):
    """As good as those of :func:`solve_one_by_one`.

    Its passes round as the cheap direction does and so cancel the rounding of that direction. The passes that refine a
    substitution must do the same.
    """
    errors, residuals = [], []
    for _ in range(20):
        flow = family(20, [32, 32]).float()
        for parameter in flow.conditioner.parameters():
            parameter.normal_(0, scale / parameter.shape[-1] ** 0.5)
        z = torch.randn(200, 20, dtype=torch.float32)
        w = cheap(flow)(z)[0]
        size = w.abs() + affine_map(flow)(z)[1].abs()
        for solution in (expensive(flow)(w)[0], solve_one_by_one(flow, w)):
            errors.append((solution - z).square().mean().sqrt())
            residuals.append(residual(copy.deepcopy(flow).double(), solution.double(), w.double()) / size)
    assert (torch.stack(errors[::2]) / torch.stack(errors[1::2])).median() <= 1.05
    ours, naive = (torch.stack(residuals[k::2]).quantile(torch.tensor([0.5, 0.9, 0.99])) for k in (0, 1))
    assert (ours <= 1.25 * naive).all()


@pytest.mark.parametrize("scale", [0.3, 1.0])
@pytest.mark.parametrize(("dim", "hidden_dims"), [(32, [64, 64]), (64, [80])])
@pytest.mark.parametrize("case", AUTOREGRESSIVE, ids=name)
@torch.no_grad()
def test_all_substitutions_agree(case, dim, hidden_dims, scale):
    flow, w = case.flow(dim, scale / (dim / 32), (6,), hidden_dims=hidden_dims), torch.randn(6, dim)
    expected, in_place, iterated = (substitution(flow, w) for substitution in SUBSTITUTIONS.values())
    torch.testing.assert_close(in_place, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(iterated, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", AUTOREGRESSIVE, ids=name)
def test_a_solve_can_be_recorded(case):
    """While operations are recorded no step depends on values, in many dimensions and with gradients."""
    flow = case.flow(40, 0.3, (4,))
    parameters = [p for p in flow.parameters() if p.numel()]

    def gradients(w):
        z, ladj = expensive(flow)(w)
        return torch.autograd.grad(z.square().sum() + ladj.sum(), parameters, allow_unused=True)

    recording = record(gradients, torch.randn(4, 40), check=[torch.randn(4, 40)])
    w = torch.randn(4, 40)
    for one, other in zip(recording(w), gradients(w), strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("case", AUTOREGRESSIVE, ids=name)
@torch.no_grad()
def test_passes_are_never_worse_than_solving_one_by_one(case, dim, scale):
    """At points that the flow did not produce, far ones included."""
    flow = case.flow(dim, scale, (6,))
    w = torch.randn(6, dim) * torch.tensor([1e-3, 1.0, 1.0, 10.0, 1e3, 1e6])[:, None]
    z, naive = solve_by_passes(flow, w), solve_one_by_one(flow, w)
    _, shift = affine_map(flow)(z)
    rounding = EPS * (w.abs() + shift.abs())
    assert (residual(flow, z, w) <= residual(flow, naive, w) + 8 * rounding).all()


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("case", AUTOREGRESSIVE, ids=name)
@torch.no_grad()
def test_exact_after_d_passes_even_where_it_does_not_converge_before(case, dim, monkeypatch):
    """Large weights take all D passes and no more; the arithmetic of every coordinate is then that of one by one."""
    flow = case.flow(dim, 3.0, (6,))
    w = 2 * torch.randn(6, dim)
    expected = solve_one_by_one(flow, w)
    counter = count_passes(flow, monkeypatch)
    z = solve_by_passes(flow, w)
    assert counter.passes <= dim
    if counter.passes == dim:
        assert torch.equal(z, expected)
    else:
        torch.testing.assert_close(z, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", AUTOREGRESSIVE, ids=name)
@pytest.mark.parametrize(("scale", "most"), [(None, 2), (0.01, 6), (0.1, 12)])
@torch.no_grad()
def test_small_weights_take_few_passes(case, scale, most, monkeypatch):
    """One or two at the start, where the conditioner is constant; far fewer than D = 32 while it is gentle."""
    flow = case.flow(32, scale, (6,))
    counter, w = count_passes(flow, monkeypatch), torch.randn(6, 32)
    z = solve_by_passes(flow, w)
    assert counter.passes <= most
    torch.testing.assert_close(z, solve_one_by_one(flow, w), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", AUTOREGRESSIVE, ids=name)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("scale", "most"), [(0.3, 4), (3.0, 12)])
def test_an_inversion_takes_few_passes_besides_its_substitution(case, grad, scale, most, monkeypatch):
    """Passes that refine the root, and two for the gradient."""
    flow = case.flow(8, scale, (4,))
    counter = count_passes(flow, monkeypatch)
    with torch.set_grad_enabled(grad):
        expensive(flow)(torch.randn(4, 8))
    assert 2 <= counter.passes - 2 * grad <= most


@pytest.mark.parametrize("case", AUTOREGRESSIVE, ids=name)
def test_masks_are_folded_once_per_call(case, monkeypatch):
    flow = case.flow(8, 1.0, (4,))
    network, folds = conditioner(flow), []
    fold = network.fold
    monkeypatch.setattr(network, "fold", lambda: folds.append(1) or fold())
    flow.inverse_and_ladj(torch.randn(4, 8))
    flow.forward_and_ladj(torch.randn(4, 8))
    assert len(folds) == 2


@pytest.mark.parametrize("scale", [0.3, 1.0])
@pytest.mark.parametrize("dim", [1, 2, 5, 8])
@pytest.mark.parametrize("case", AUTOREGRESSIVE, ids=name)
def test_implicit_gradient_is_that_of_the_unrolled_solve(case, dim, scale):
    """Under tracing the substitution is differentiated step by step."""
    module = case.build(dim, scale)
    context = torch.randn(4, 3)
    flow = module.condition(context) if case.conditional else module
    w, v, u = torch.randn(4, dim), torch.randn(4, dim), torch.randn(4)
    parameters = {key: value for key, value in flow.named_parameters() if value.numel()}

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.flow = flow

        def forward(self, w):
            z, ladj = expensive(self.flow)(w)
            return (z * v).sum() + (ladj * u).sum()

    loss = Loss()

    def functional(w, parameters):
        return torch.func.functional_call(loss, {f"flow.{key}": value for key, value in parameters.items()}, (w,))

    by_w, by_parameters = torch.func.grad(functional, argnums=(0, 1))(w, parameters)
    w.requires_grad_()
    implicit = torch.autograd.grad(loss(w), [w, *parameters.values()], allow_unused=True)
    for one, other in zip(implicit, (by_w, *by_parameters.values()), strict=True):
        one = torch.zeros_like(other) if one is None else one
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * max(other.abs().max().item(), 1e-300))


@pytest.mark.parametrize("traced", [False, True])
def test_iterates_that_overflow_on_the_way_do_no_harm(traced):
    """Before they are final, late coordinates grow by 2^60 per pass. Past infinity, zero weights would give NaN.

    The masked product is dense, as that of a network is, and all numbers are powers of two, so that the root is exact.
    """
    dim, iterates = 32, []
    weights = 2.0**60 * torch.ones(dim, dim).tril(-1)

    def a_and_m(z):
        iterates.append(z.abs().max().item())
        return torch.zeros_like(z), z @ weights.mT

    root = torch.zeros(1, dim)
    root[0, 0] = 1
    w = root + root @ weights.mT

    def solve(w):
        return autoregressive_root(a_and_m, w, torch.arange(dim))

    assert torch.equal(as_under_tracing(solve, w) if traced else solve(w), root)
    assert max(iterates) >= torch.finfo(torch.float64).max ** 0.5  # the bound to which an infinity is cut back


@pytest.mark.parametrize("traced", [False, True])
@torch.no_grad()
def test_weights_at_which_iterates_overflow_inside_the_network(traced):
    """In single precision the passes of this network reach infinity in a hidden unit, and times zero weights NaN.

    Coordinates that have a root in single precision are solved as well as one by one, some of them beyond the bound on
    iterates. In double precision the same stack has all its roots.
    """
    dim, far = 48, 0
    for seed in range(3):
        torch.default_generator.manual_seed(seed)
        flow = InverseAutoregressive(dim, [64, 64], update="gated", activation=torch.relu)  # whose shift is not damped
        for parameter in flow.conditioner.parameters():
            parameter.normal_(0, 30 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 30)

        def solve(w, flow=flow):
            return as_under_tracing(partial(solve_by_passes, flow), w) if traced else solve_by_passes(flow, w)

        w = torch.randn(8, dim)
        assert solve(w).isfinite().all()
        flow, w = flow.float(), w.float()
        z, naive = solve(w), solve_one_by_one(flow, w)
        rounding = torch.finfo(torch.float32).eps * (w.abs() + affine_map(flow)(naive)[1].abs())
        solvable = naive.isfinite() & residual(flow, naive, w).isfinite()
        iterated, level_by_level = (SUBSTITUTIONS[key](flow, w).isfinite() for key in ("iterated", "level by level"))
        assert torch.equal(iterated, level_by_level)
        assert (residual(flow, z, w) <= residual(flow, naive, w) + 8 * rounding)[solvable].all()
        far += (naive[solvable].abs() > torch.finfo(torch.float32).max ** 0.5).sum().item()
    assert far > 10


def test_does_not_stop_at_a_pass_without_a_move_if_the_next_pass_moves():
    """In the third pass only the third coordinate moves, by less than rounding; the fourth magnifies that move."""

    def a_and_m(z):
        m = torch.zeros_like(z)
        m[..., 0] = 2.0
        m[..., 1] = z[..., 0] - 5
        m[..., 2] = 1e-16 * (z[..., 1] - 1)
        m[..., 3] = 1e9 * (z[..., 2] - 1)
        return torch.zeros_like(z), m

    w = torch.tensor([5.0, 1.0, 1.0, 2.0, 0.0])
    z = autoregressive_root(a_and_m, w, torch.arange(5))
    torch.testing.assert_close(z + a_and_m(z)[1], w, rtol=0, atol=1e-15)


@pytest.mark.parametrize("case", AUTOREGRESSIVE, ids=name)
@torch.no_grad()
def test_finite_at_large_weights_and_far_points(case):
    flow = case.flow(32, 3.0, (2,))
    assert solve_by_passes(flow, 1e100 * torch.randn(2, 32)).isfinite().all()
    single = copy.deepcopy(flow).float()
    z = solve_by_passes(single, 3 * torch.randn(2, 32, dtype=torch.float32))
    assert z.isfinite().all()
    assert z.dtype == torch.float32


@pytest.mark.parametrize("case", AUTOREGRESSIVE, ids=name)
def test_the_graph_of_an_inversion_can_be_used_twice(case):
    flow = case.flow(3, 0.5, (4,))
    w = torch.randn(4, 3, requires_grad=True)
    z, _ = expensive(flow)(w)
    (first,) = torch.autograd.grad(z.sum(), w, retain_graph=True)
    (second,) = torch.autograd.grad(z.sum(), w)
    assert torch.equal(first, second)


@pytest.mark.parametrize("case", AUTOREGRESSIVE, ids=name)
def test_an_inversion_has_no_graph_if_there_is_nothing_to_differentiate(case):
    flow = case.flow(3, 0.5, (4,)).requires_grad_(False)
    assert not expensive(flow)(torch.randn(4, 3))[0].requires_grad


def test_order_decides_which_coordinates_depend_on_which():
    """With order (2, 0, 1) coordinate 2 comes first, and 1 last."""
    flow = InverseAutoregressive(3, [16], order=[2, 0, 1])
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter)
    j = torch.autograd.functional.jacobian(lambda x: flow.forward_and_ladj(x)[0], torch.randn(3))
    depends = j != 0
    assert depends.tolist() == [[True, False, True], [True, True, True], [False, False, True]]


@torch.no_grad()
def test_a_context_reaches_the_first_coordinate():
    """Through the network, not only as a shift of its output: the first coordinate is not linear in the context."""
    module = ConditionalInverseAutoregressive(3, 2, hidden_dims=[16])
    for parameter in module.parameters():
        parameter.normal_()
    contexts = torch.linspace(-1, 1, 5)[:, None] * torch.randn(2)
    moved = module.condition(contexts)(torch.zeros(3))[:, 0].diff()
    assert (moved != 0).all()
    assert moved.diff().abs().max() > 1e-3
