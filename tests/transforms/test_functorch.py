"""torch.func: vmap over points and contexts, Jacobians in both modes, and per-sample gradients."""

import weakref

import pytest
import torch

from tests.transforms.families import CASES, CONDITIONAL, CONTEXT_DIM, PARAMETRIC, PLAIN, jacobian, name

DIM = 3
DIRECTIONS = ["forward_and_ladj", "inverse_and_ladj"]


def assert_same(one, other, tolerance=1e-10):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", PLAIN, ids=name)
def test_vmap_over_points(case, direction):
    call = getattr(case.flow(DIM, 0.5), direction)
    x = torch.randn(5, DIM)
    assert_same(torch.func.vmap(call)(x), call(x))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CONDITIONAL, ids=name)
def test_vmap_over_points_and_contexts(case, direction):
    module = case.build(DIM, 0.5)
    x, context = torch.randn(5, DIM), torch.randn(5, CONTEXT_DIM)

    def call(x, context):
        return getattr(module.condition(context), direction)(x)

    expected = call(x, context)
    assert_same(torch.func.vmap(call)(x, context), expected)
    over_contexts = torch.func.vmap(call, in_dims=(None, 0))(x[0], context)
    assert_same(over_contexts, call(x[0].expand(5, DIM), context))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_jacobians_in_both_modes(case, direction):
    flow = case.flow(DIM, 0.5)
    call = getattr(flow, direction)
    x = torch.randn(4, DIM)
    expected = jacobian(lambda v: call(v)[0], x)
    v = x.clone().requires_grad_()
    ladj = call(v)[1] + 0 * v.sum()  # ladj of a linear map does not depend on the point
    (slope,) = torch.autograd.grad(ladj.sum(), v)
    for mode in (torch.func.jacrev, torch.func.jacfwd):
        assert_same(torch.func.vmap(mode(call))(x), (expected, slope), 1e-8)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", PARAMETRIC, ids=name)
def test_per_sample_gradients_of_the_parameters(case, direction):
    module = case.build(DIM, 0.5)
    x, context = torch.randn(4, DIM), torch.randn(4, CONTEXT_DIM)
    parameters = {key: value for key, value in module.named_parameters() if value.numel()}

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, x, context):
            flow = self.module.condition(context) if case.conditional else self.module
            value, ladj = getattr(flow, direction)(x)
            return value.sin().sum() + ladj.sum()

    loss = Loss()

    def functional(parameters, x, context):
        named = {f"module.{key}": value for key, value in parameters.items()}
        return torch.func.functional_call(loss, named, (x, context))

    per_sample = torch.func.vmap(torch.func.grad(functional), in_dims=(None, 0, 0))(parameters, x, context)
    expected = torch.autograd.grad(loss(x, context), list(parameters.values()), allow_unused=True)
    for one, other in zip(per_sample.values(), expected, strict=True):
        other = torch.zeros(one.shape[1:]) if other is None else other
        torch.testing.assert_close(one.sum(0), other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_the_cache_stays_out_of_transformed_calls(case):
    """The flow keeps no tensor of a call inside vmap, from which a later call could be answered."""
    flow = case.flow(DIM, 0.5)
    x, inside = torch.randn(5, DIM), []

    def call(value):
        inside.append(weakref.ref(value))
        return flow(value)

    y = torch.func.vmap(call)(x)
    assert inside[0]() is None
    torch.testing.assert_close(y, flow.forward_and_ladj(x)[0])
    for inverse in (torch.func.vmap(flow.inv), flow.inv):
        torch.testing.assert_close(inverse(y), x, rtol=1e-8, atol=1e-8)
