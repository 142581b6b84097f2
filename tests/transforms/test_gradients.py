"""First derivatives of values and log-determinants, through both directions, to input, parameters and context."""

import inspect

import pytest
import torch
from torch.autograd import gradcheck

from tests.transforms.families import CASES, CONTEXT_DIM, name


def small(case):
    """Return options for a conditioner that suits finite differences: few weights and no kink (ELU has one)."""
    accepted = inspect.signature(case.formula).parameters
    return {key: value for key, value in {"hidden_dims": [5], "activation": torch.tanh}.items() if key in accepted}


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("case", CASES, ids=name)
@pytest.mark.parametrize("direction", ["forward_and_ladj", "inverse_and_ladj"])
def test_gradcheck(case, direction, dim):
    module = case.build(dim, 0.7, **small(case))
    point = torch.randn(2, dim, requires_grad=True)
    context = torch.randn(2, CONTEXT_DIM, requires_grad=True)
    parameters = [parameter for parameter in module.parameters() if parameter.numel()]

    if case.conditional:

        def outputs(value, context, *_):
            return getattr(module.condition(context), direction)(value)

        inputs = (point, context, *parameters)
    else:

        def outputs(value, *_):
            return getattr(module, direction)(value)

        inputs = (point, *parameters)
    # Fast mode checks random directions, along which a wrong derivative shows almost surely.
    assert gradcheck(outputs, inputs, fast_mode=True)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_gradients_of_the_round_trip_cancel(case):
    """x -> y -> x has the gradient of the identity, and none with respect to the parameters."""
    flow = case.flow(3, 0.5, (4,))
    x = torch.randn(4, 3, requires_grad=True)
    back, _ = flow.inverse_and_ladj(flow.forward_and_ladj(x)[0])
    v = torch.randn(4, 3)
    gradient, *others = torch.autograd.grad(
        back, [x, *(p for p in flow.parameters() if p.numel())], v, allow_unused=True
    )
    torch.testing.assert_close(gradient, v, rtol=0, atol=1e-8)
    for other in others:
        assert other is None or other.abs().max() <= 1e-8


@pytest.mark.parametrize("case", CASES, ids=name)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_gradients_are_finite_at_large_weights(case, scale):
    flow = case.flow(8, scale, (4,))
    parameters = [p for p in flow.parameters() if p.numel()]
    for call in (flow.forward_and_ladj, flow.inverse_and_ladj):
        value = torch.randn(4, 8, requires_grad=True)
        image, ladj = call(value)
        gradients = torch.autograd.grad(image.sum() + ladj.sum(), [value, *parameters], allow_unused=True)
        assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_gradients_are_finite_where_everything_is_zero(case):
    """At zero parameters, context and input; only columns, whose orthonormal factor is undefined at zero, are not."""
    module = case.build(3)
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if not key.endswith("columns"):
                parameter.zero_()
    flow = module.condition(torch.zeros(2, CONTEXT_DIM)) if case.conditional else module
    for call in (flow.forward_and_ladj, flow.inverse_and_ladj):
        value = torch.zeros(2, 3, requires_grad=True)
        image, ladj = call(value)
        gradients = torch.autograd.grad(image.sum() + ladj.sum(), [value, *flow.parameters()], allow_unused=True)
        assert image.isfinite().all()
        assert ladj.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)
