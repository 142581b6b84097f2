"""The inverse of autoregressive maps: exact, however it is found, and with a gradient.

For any network it is a fixed point that stops early and is exact after D passes; for the MADE of a flow it is found by
forward substitution, level after level or some levels together.
"""

import copy

import pytest
import torch

from pyro_flowguides.inference.replay import record
from pyro_flowguides.nn import made
from pyro_flowguides.transforms import (
    ConditionalInverseAutoregressive,
    InverseAutoregressive,
    MaskedAutoregressive,
)
from pyro_flowguides.transforms import (
    solvers as solve,
)
from pyro_flowguides.transforms.families import autoregressive
from tests.transforms.families import CASES, DIMS, SCALES, name

AUTOREGRESSIVE = [case for case in CASES if issubclass(case.formula, (InverseAutoregressive, MaskedAutoregressive))]
EPS = torch.finfo(torch.float64).eps


def formula(flow):
    """The module with the formula, and what it reads."""
    return getattr(getattr(flow, "source", flow), "flow", flow), flow.theta()


def elementwise(flow):
    module, theta = formula(flow)
    return lambda z: module._elementwise(z, theta)


def naive_solve(flow, w):
    """The textbook inversion: one coordinate after the other in the order of the conditioner, a network pass each."""
    a_and_m = elementwise(flow)
    z = torch.zeros_like(w)
    for i in formula(flow)[0].conditioner.order.tolist():
        log_scale, shift = a_and_m(z)
        z[..., i] = (w[..., i] - shift[..., i]) / log_scale[..., i].exp()
    return z


def residual(flow, z, w):
    log_scale, shift = elementwise(flow)(z)
    return (z * log_scale.exp() + shift - w).abs()


def solve_for(flow, w):
    return solve.autoregressive_root(elementwise(flow), w, formula(flow)[0].conditioner.order.argsort())


def substitute(flow, w, together):
    module, theta = formula(flow)
    return module._substitute(w, theta, together)


#: Level after level, the same in place, any number of levels together.
TOGETHER = [0, 1, 10**9]


@pytest.fixture(params=[2, 5])
def _small_blocks(request, monkeypatch):
    """Several blocks of a few levels, also in few dimensions."""
    monkeypatch.setattr(made, "FIXED_LEVELS", request.param)


class count_passes:
    """How often the conditioner of a flow is run."""

    def __init__(self, flow, monkeypatch):
        self.passes = 0
        conditioner = formula(flow)[0].conditioner
        run = conditioner.run

        def counted(*arguments):
            self.passes += 1
            return run(*arguments)

        monkeypatch.setattr(conditioner, "run", counted)


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("together", TOGETHER)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dim", [dim for dim in DIMS if dim > 1])
@pytest.mark.parametrize("case", AUTOREGRESSIVE, ids=name)
@torch.no_grad()
def test_substitution_is_as_accurate_as_one_coordinate_after_the_other(case, dim, scale, together):
    """In single precision, judged in double precision, on points the flow did not produce, far ones included.

    Either way sums up in its own order: errors are compared by their median and their upper decile. In few dimensions
    points share scales, and so their rounding: there are more flows. In one dimension they share all there is.
    """
    errors = []
    for seed in range(16 if dim < 5 else 1):
        flow = case.flow(dim, scale, (600,), seed=seed, hidden_dims=[7, 20])
        w = torch.randn(600, dim) * torch.tensor([1e-3, 1.0, 1.0, 10.0, 1e3, 1e6]).repeat(100)[:, None]
        single, v = copy.deepcopy(flow).float(), w.float()
        for z in (substitute(single, v, together), naive_solve(single, v)):
            size = v.abs() + elementwise(single)(z)[1].abs()
            errors.append(residual(flow, z.double(), v.double()) / size.double())
    ours, naive = (torch.stack(errors[k::2]).quantile(torch.tensor([0.5, 0.9])) for k in (0, 1))
    assert (ours <= 1.25 * naive).all()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("case", AUTOREGRESSIVE, ids=name)
@torch.no_grad()
def test_a_single_dimension_is_solved_to_the_last_bit(case, scale):
    """What refines a substitution is there all that :func:`naive_solve` does."""
    for seed in range(16):
        single = case.flow(1, scale, (60,), seed=seed, hidden_dims=[7, 20]).float()
        v = torch.randn(60, 1).float() * torch.logspace(-3, 6, 60)[:, None].float()
        module, theta = formula(single)
        assert torch.equal(module._sequential(v, theta)[0], naive_solve(single, v))


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.0, 3.0, 5.0])
@pytest.mark.parametrize("formula", [InverseAutoregressive, MaskedAutoregressive])
@torch.no_grad()
def test_round_trips_in_single_precision(formula, scale):
    """Of one coordinate after the other the passes round as the parallel direction has: it cancels that, and so does
    what refines a substitution.
    """
    errors, residuals = [], []
    for _ in range(20):
        flow = formula(20, [32, 32]).float()
        for parameter in flow.parameters():
            parameter.normal_(0, scale / parameter.shape[-1] ** 0.5)
        z, theta = torch.randn(200, 20, dtype=torch.float32), flow.theta()
        w = flow._parallel(z, theta)[0]
        size = w.abs() + flow._elementwise(z, theta)[1].abs()
        for found in (flow._sequential(w, theta)[0], naive_solve(flow, w)):
            errors.append((found - z).square().mean().sqrt())
            residuals.append(residual(copy.deepcopy(flow).double(), found.double(), w.double()) / size)
    assert (torch.stack(errors[::2]) / torch.stack(errors[1::2])).median() <= 1.05
    ours, naive = (torch.stack(residuals[k::2]).quantile(torch.tensor([0.5, 0.9, 0.99])) for k in (0, 1))
    assert (ours <= 1.25 * naive).all()


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("scale", [0.3, 1.0])
@pytest.mark.parametrize("case", AUTOREGRESSIVE, ids=name)
@torch.no_grad()
def test_levels_taken_together_change_nothing(case, scale):
    flow, w = case.flow(32, scale, (6,)), torch.randn(6, 32)
    expected, in_place, z = (substitute(flow, w, together) for together in TOGETHER)
    torch.testing.assert_close(in_place, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(z, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", AUTOREGRESSIVE, ids=name)
def test_a_solve_can_be_recorded(case):
    """No step depends on values while operations are written down, in many dimensions and with gradients."""
    flow = case.flow(40, 0.3, (4,))
    slow = flow.forward_and_ladj if flow.cheap_direction == "inverse" else flow.inverse_and_ladj
    parameters = [p for p in flow.parameters() if p.numel()]

    def gradients(w):
        z, ladj = slow(w)
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
def test_never_worse_than_one_coordinate_after_the_other(case, dim, scale):
    """On points the flow did not produce, far ones included."""
    flow = case.flow(dim, scale, (6,))
    w = torch.randn(6, dim) * torch.tensor([1e-3, 1.0, 1.0, 10.0, 1e3, 1e6])[:, None]
    z, naive = solve_for(flow, w), naive_solve(flow, w)
    _, shift = elementwise(flow)(z)
    rounding = EPS * (w.abs() + shift.abs())
    assert (residual(flow, z, w) <= residual(flow, naive, w) + 8 * rounding).all()


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("case", AUTOREGRESSIVE, ids=name)
@torch.no_grad()
def test_exact_after_d_passes_even_where_it_does_not_converge_before(case, dim, monkeypatch):
    """At large weights all D passes are needed and no more; each coordinate then went through the naive arithmetic."""
    flow = case.flow(dim, 3.0, (6,))
    w = 2 * torch.randn(6, dim)
    expected = naive_solve(flow, w)
    counter = count_passes(flow, monkeypatch)
    z = solve_for(flow, w)
    assert counter.passes <= dim
    if counter.passes == dim:
        assert torch.equal(z, expected)
    else:
        torch.testing.assert_close(z, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", AUTOREGRESSIVE, ids=name)
@pytest.mark.parametrize(("scale", "most"), [(None, 2), (0.01, 6), (0.1, 12)])
@torch.no_grad()
def test_few_passes_for_small_weights(case, scale, most, monkeypatch):
    """One or two passes at the start, where the conditioner is constant; far fewer than D = 32 while it is gentle."""
    flow = case.flow(32, scale, (6,))
    counter = count_passes(flow, monkeypatch)
    z = solve_for(flow, torch.randn(6, 32))
    assert counter.passes <= most
    assert z.isfinite().all()


@pytest.mark.parametrize("case", AUTOREGRESSIVE, ids=name)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("scale", "most"), [(0.3, 4), (3.0, autoregressive.PASSES)])
def test_a_whole_inversion_adds_few_passes_to_refine_the_root_and_two_for_the_gradient(
    case, grad, scale, most, monkeypatch
):
    flow = case.flow(8, scale, (4,))
    slow = flow.forward_and_ladj if flow.cheap_direction == "inverse" else flow.inverse_and_ladj
    counter = count_passes(flow, monkeypatch)
    with torch.set_grad_enabled(grad):
        slow(torch.randn(4, 8))
    assert 2 <= counter.passes - 2 * grad <= most


@pytest.mark.parametrize("case", AUTOREGRESSIVE, ids=name)
def test_masks_are_folded_once_per_inversion(case, monkeypatch):
    flow = case.flow(8, 1.0, (4,))
    conditioner, folds = formula(flow)[0].conditioner, []
    fold = conditioner.fold
    monkeypatch.setattr(conditioner, "fold", lambda: folds.append(1) or fold())
    flow.inverse_and_ladj(torch.randn(4, 8))
    flow.forward_and_ladj(torch.randn(4, 8))
    assert len(folds) == 2


@pytest.mark.parametrize("scale", [0.3, 1.0])
@pytest.mark.parametrize("dim", [1, 2, 5, 8])
@pytest.mark.parametrize("case", AUTOREGRESSIVE, ids=name)
def test_implicit_gradient_is_that_of_the_unrolled_solve(case, dim, scale, monkeypatch):
    flow = case.flow(dim, scale, (4,))
    w = torch.randn(4, dim, requires_grad=True)
    v, u = torch.randn(4, dim), torch.randn(4)
    parameters = list(flow.parameters())

    def gradients():
        slow = flow.forward_and_ladj if flow.cheap_direction == "inverse" else flow.inverse_and_ladj
        z, ladj = slow(w)
        loss = (z * v).sum() + (ladj * u).sum()
        return torch.autograd.grad(loss, [w, *parameters], allow_unused=True)

    implicit = gradients()
    monkeypatch.setattr(autoregressive, "tracing", lambda *_: True)
    for one, other in zip(implicit, gradients(), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * other.abs().max().item())


@pytest.mark.parametrize("static", [False, True])
def test_iterates_that_overflow_on_the_way_do_no_harm(static, monkeypatch):
    """Before they are final, late coordinates grow by 2^60 per pass. Past infinity, zero weights would give NaN.

    The masked product is dense, as that of a network is, and all numbers are powers of two, so that the root is exact.
    """
    if static:
        monkeypatch.setattr(solve, "tracing", lambda *_: True)
    dim, iterates = 32, []
    weights = 2.0**60 * torch.ones(dim, dim).tril(-1)

    def a_and_m(z):
        iterates.append(z.abs().max().item())
        return torch.zeros_like(z), z @ weights.mT

    root = torch.zeros(1, dim)
    root[0, 0] = 1
    w = root + root @ weights.mT
    assert torch.equal(solve.autoregressive_root(a_and_m, w, torch.arange(dim)), root)
    assert max(iterates) >= torch.finfo(torch.float64).max ** 0.5  # what an infinity is cut back to


@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_weights_at_which_iterates_overflow_inside_the_network(static, monkeypatch):
    """In single precision the passes of this network reach infinity in a hidden unit, times zero weights NaN.

    Coordinates that have a root in single precision are solved as well as one after the other, some beyond the bound
    on iterates; in double precision the same stack has all its roots.
    """
    if static:
        monkeypatch.setattr(solve, "tracing", lambda *_: True)
    dim, far = 48, 0
    monkeypatch.setattr(made, "FIXED_LEVELS", 24)
    for seed in range(3):
        torch.default_generator.manual_seed(seed)
        flow = InverseAutoregressive(dim, [64, 64], activation=torch.relu)
        for parameter in flow.parameters():
            parameter.normal_(0, 30 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 30)
        w = torch.randn(8, dim)
        assert solve_for(flow, w).isfinite().all()
        flow, w = flow.float(), w.float()
        z, naive = solve_for(flow, w), naive_solve(flow, w)
        rounding = torch.finfo(torch.float32).eps * (w.abs() + elementwise(flow)(naive)[1].abs())
        solvable = naive.isfinite() & residual(flow, naive, w).isfinite()
        assert torch.equal(substitute(flow, w, 10**9).isfinite(), substitute(flow, w, 0).isfinite())
        assert (residual(flow, z, w) <= residual(flow, naive, w) + 8 * rounding)[solvable].all()
        far += (naive[solvable].abs() > torch.finfo(torch.float32).max ** 0.5).sum().item()
    assert far > 10


def test_does_not_stop_at_a_standstill_that_the_next_pass_would_end():
    """In the third pass only the third coordinate moves, by less than rounding; the fourth magnifies that move."""

    def a_and_m(z):
        m = torch.zeros_like(z)
        m[..., 0] = 2.0
        m[..., 1] = z[..., 0] - 5
        m[..., 2] = 1e-16 * (z[..., 1] - 1)
        m[..., 3] = 1e9 * (z[..., 2] - 1)
        return torch.zeros_like(z), m

    w = torch.tensor([5.0, 1.0, 1.0, 2.0, 0.0])
    z = solve.autoregressive_root(a_and_m, w, torch.arange(5))
    torch.testing.assert_close(z + a_and_m(z)[1], w, rtol=0, atol=1e-15)


@pytest.mark.parametrize("case", AUTOREGRESSIVE, ids=name)
@torch.no_grad()
def test_finite_at_large_weights_and_far_points(case):
    flow = case.flow(32, 3.0, (2,))
    assert solve_for(flow, 1e100 * torch.randn(2, 32)).isfinite().all()
    single = copy.deepcopy(flow).float()
    z = solve_for(single, 3 * torch.randn(2, 32, dtype=torch.float32))
    assert z.isfinite().all()
    assert z.dtype == torch.float32


@pytest.mark.parametrize("case", AUTOREGRESSIVE, ids=name)
def test_backward_twice_and_only_where_needed(case):
    """The graph of an inversion can be used again; without anything to differentiate there is none."""
    flow = case.flow(3, 0.5, (4,))
    slow = flow.forward_and_ladj if flow.cheap_direction == "inverse" else flow.inverse_and_ladj
    w = torch.randn(4, 3, requires_grad=True)
    z, _ = slow(w)
    (first,) = torch.autograd.grad(z.sum(), w, retain_graph=True)
    (second,) = torch.autograd.grad(z.sum(), w)
    assert torch.equal(first, second)
    flow.requires_grad_(False)
    assert not slow(w.detach())[0].requires_grad


def test_order_decides_what_depends_on_what():
    """With order (2, 0, 1) coordinate 2 comes first, and 1 last."""
    flow = InverseAutoregressive(3, [16], order=[2, 0, 1])
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter)
    j = torch.autograd.functional.jacobian(lambda x: flow.forward_and_ladj(x)[0], torch.randn(3))
    depends = j != 0
    assert depends.tolist() == [[True, False, True], [True, True, True], [False, False, True]]


@torch.no_grad()
def test_context_reaches_the_first_coordinate():
    """Through the network, not only as a shift of its output: what the first coordinate adds is no linear function."""
    module = ConditionalInverseAutoregressive(3, 2, hidden_dims=[16])
    for parameter in module.parameters():
        parameter.normal_()
    contexts = torch.linspace(-1, 1, 5)[:, None] * torch.randn(2)
    moved = module.condition(contexts)(torch.zeros(3))[:, 0].diff()
    assert (moved != 0).all()
    assert moved.diff().abs().max() > 1e-3
