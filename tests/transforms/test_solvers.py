"""The scalar equation t + k tanh t = q, and the smooth bounds that keep k above −1."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyro_flowguides.transforms.bounds import MARGIN, above_minus_one, shrink_factor, soft_bound
from pyro_flowguides.transforms.solvers import MAX_NEWTON_STEPS, count_newton_steps, tanh_root

EPS = torch.finfo(torch.float64).eps
TINY = torch.finfo(torch.float64).tiny
properties = settings(max_examples=300, deadline=None, derandomize=True, database=None)

slopes = st.one_of(st.floats(-0.99, 1e6), st.floats(-0.99, -0.9), st.floats(-1e-3, 1e-3))
levels = st.one_of(st.floats(-1e6, 1e6), st.floats(-10, 10), st.floats(-1e-6, 1e-6))
reals = st.floats(-1e300, 1e300)


def number(value):
    return torch.tensor(value, dtype=torch.float64)


def left_side(k, t):
    return t + k * t.tanh()


@properties
@given(slopes, levels)
def test_the_residual_is_of_the_size_of_rounding(k, q):
    k, q = number(k), number(q)
    t = tanh_root(k, q)
    scale = t.abs() + (k * t.tanh()).abs() + q.abs()
    assert (left_side(k, t) - q).abs() <= 4 * EPS * scale + TINY


@properties
@given(slopes, levels)
def test_odd_with_the_sign_of_the_right_hand_side(k, q):
    k, q = number(k), number(q)
    t = tanh_root(k, q)
    assert tanh_root(k, -q) == -t
    assert t * q >= 0


@properties
@given(slopes, levels, levels)
def test_monotone_in_the_right_hand_side(k, q, other):
    k = number(k)
    q, other = number(min(q, other)), number(max(q, other))
    low, high = tanh_root(k, q), tanh_root(k, other)
    steepest = 1 / min(1.0, 1 + k.item())  # of the root as a function of q
    rounding = 8 * EPS * steepest**2 * (q.abs() + other.abs()) + TINY
    assert low <= high + rounding
    assert high - low <= (other - q) * steepest + rounding


@properties
@given(slopes, levels)
def test_gradients_are_those_of_the_implicit_function(k, q):
    k, q = number(k).requires_grad_(), number(q).requires_grad_()
    t = tanh_root(k, q)
    by_k, by_q = torch.autograd.grad(t, (k, q))
    with torch.no_grad():
        slope = 1 + k / t.cosh() ** 2
        accuracy = 1e-12 + 100 * EPS * k.abs() / slope  # 1 - tanh² cancels where tanh is near one
        assert (by_q * slope - 1).abs() <= accuracy
        assert (by_k * slope + t.tanh()).abs() <= accuracy


@pytest.mark.parametrize("k", [-0.99, -0.5, 0.0, 2.0, 1e3, 1e6, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dense_grid_including_the_kink(k, dtype):
    """Around q = k the left side bends from slope 1 + k to slope 1. The fixed number of steps under vmap suffices."""
    q = torch.cat(
        [torch.linspace(-20, 20, 2001), k * (1 + torch.linspace(-0.1, 0.1, 2001)), torch.logspace(-30, 30, 601)]
    ).to(dtype)
    k = torch.full_like(q, k)
    for t in (tanh_root(k, q), torch.func.vmap(tanh_root)(k, q)):
        assert t.dtype == dtype
        residual = left_side(k, t) - q
        assert (residual.abs() <= 4 * torch.finfo(dtype).eps * (t.abs() + (k * t.tanh()).abs() + q.abs())).all()


@pytest.mark.parametrize(
    ("k", "most"), [(0.0, 4), (-0.5, 4), (1.0, 4), (-0.99, 7), (100.0, 8), (1e9, 22), (1e30, 24), (math.nan, 24)]
)
def test_steps_are_counted_in_advance(k, most):
    """For the most extreme slope; the dense grid above shows that they suffice."""
    k = torch.tensor([0.1, k, -0.1])
    assert count_newton_steps(k) <= most
    assert (
        count_newton_steps(k[:0])
        == torch.func.vmap(lambda k: k * count_newton_steps(k))(torch.ones(1))
        == MAX_NEWTON_STEPS
    )


def test_nan_stays_nan_and_spoils_no_other_element():
    k, q = torch.tensor([math.nan, 0.5, 0.5]), torch.tensor([1.0, math.nan, 1.0])
    assert tanh_root(k, q).isnan().tolist() == [True, True, False]


@properties
@given(reals)
def test_shrunk_products_stay_above_minus_one_by_the_margin(s):
    s = number(s)
    product = s * shrink_factor(s)
    assert product >= -0.99 - 4 * EPS
    assert product * s >= 0
    assert shrink_factor(s) >= 0
    assert above_minus_one(s) == product


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shrink_keeps_its_margin_at_any_magnitude(dtype):
    s = -torch.logspace(-20, 18, 400, dtype=dtype)
    product = (s * shrink_factor(s)).double()
    assert (product >= -0.99 - 1e-6).all()
    assert (product[1:] <= product[:-1] + 1e-6).all()


def test_bounds_are_smooth_and_monotone():
    s = torch.linspace(-30, 30, 601, requires_grad=True)
    for bound in (above_minus_one, lambda value: soft_bound(value, 20.0)):
        (slope,) = torch.autograd.grad(bound(s).sum(), s)
        assert (slope > 0).all()
        assert torch.autograd.gradcheck(bound, s.detach()[::60].requires_grad_())
    assert soft_bound(torch.tensor([-1e9, 0.0, 1e9]), 2.0).tolist() == [-2.0, 0.0, 2.0]
    (at_zero,) = torch.autograd.grad(shrink_factor(zero := torch.zeros((), requires_grad=True)), zero)
    assert at_zero == pytest.approx((1 - MARGIN) / 8)
