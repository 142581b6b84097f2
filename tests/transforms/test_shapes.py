"""Batch dimensions, broadcasting of contexts, and flows inside torch's and Pyro's classes."""

import copy

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import ComposeTransform

from pyro_flowguides.transforms import Compose, ConditionalCompose, Planar
from tests.transforms.families import CASES, CONDITIONAL, CONTEXT_DIM, PLAIN, name, randomize

DIM = 3
DIRECTIONS = ["forward_and_ladj", "inverse_and_ladj"]


def base(*batch):
    return dist.Normal(0.0, 1.0).expand([*batch, DIM]).to_event(1)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_any_leading_dimensions(case, direction):
    call = getattr(case.flow(DIM, 0.5), direction)
    points = torch.randn(2, 4, DIM)
    images, ladjs = call(points.reshape(-1, DIM))
    for batch in [(), (4,), (2, 4), (1, 2, 4), (0,), (3, 0)]:
        x = points.flatten()[: DIM * torch.Size(batch).numel()].reshape(*batch, DIM)
        y, ladj = call(x)
        assert (y.shape, ladj.shape) == (x.shape, batch)
        count = ladj.numel()
        torch.testing.assert_close(y.reshape(-1, DIM), images[:count], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(ladj.reshape(-1), ladjs[:count], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_memory_layout_does_not_matter(case, direction):
    call = getattr(case.flow(DIM, 0.5), direction)
    x = torch.randn(DIM, 4, 2).permute(2, 1, 0)
    for one, other in zip(call(x), call(x.contiguous()), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CONDITIONAL, ids=name)
def test_contexts_broadcast_against_points(case, direction):
    """(B, C) contexts against (S, B, D), (B, D), (D,) and (S, 1, D) points; (C,) and (S, 1, C) against (B, D)."""
    module = case.build(DIM, 0.5)
    samples, batch = 2, 4

    def one_by_one(x, context, shape):
        x, context = x.expand(*shape, DIM).reshape(-1, DIM), context.expand(*shape, CONTEXT_DIM)
        rows = [
            getattr(module.condition(c), direction)(v) for v, c in zip(x, context.reshape(-1, CONTEXT_DIM), strict=True)
        ]
        values, ladjs = zip(*rows, strict=True)
        return torch.stack(values).reshape(*shape, DIM), torch.stack(ladjs).reshape(shape)

    for points, contexts in [
        ((samples, batch), (batch,)),
        ((batch,), (batch,)),
        ((), (batch,)),
        ((samples, 1), (batch,)),
        ((batch,), ()),
        ((batch,), (samples, 1)),
        ((0,), ()),
    ]:
        x, context = torch.randn(*points, DIM), torch.randn(*contexts, CONTEXT_DIM)
        shape = torch.broadcast_shapes(points, contexts)
        value, ladj = getattr(module.condition(context), direction)(x)
        assert (value.shape, ladj.shape) == ((*shape, DIM), shape)
        if value.numel():
            expected, expected_ladj = one_by_one(x, context, shape)
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(ladj, expected_ladj, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_pyro_distribution(case):
    """Shapes, and the density of a draw: from the cache, and by the change of variables without it."""
    flow = case.flow(DIM, 0.3, (5,))
    batch = (5,) if case.conditional else ()
    d = dist.TransformedDistribution(base(), [flow])
    assert (d.batch_shape, d.event_shape) == (batch, (DIM,))
    z = d.rsample((2,))
    assert z.shape == (2, *batch, DIM)
    cached, computed = d.log_prob(z), d.log_prob(z.clone())
    assert cached.shape == (2, *batch)
    torch.testing.assert_close(cached, computed, rtol=1e-8, atol=1e-8)
    x, ladj = copy.deepcopy(flow).inverse_and_ladj(z)
    torch.testing.assert_close(cached, base().log_prob(x) - ladj, rtol=1e-8, atol=1e-8)
    assert d.expand((7, *batch)).rsample().shape == (7, *batch, DIM)


@pytest.mark.parametrize("case", CONDITIONAL, ids=name)
def test_the_batch_shape_is_that_of_the_context(case):
    module = case.build(DIM, 0.3)
    for contexts, batch in [((), ()), ((5,), ()), ((5,), (5,)), ((5,), (2, 5)), ((2, 1), (5,)), ((2, 5), ())]:
        flow = module.condition(torch.randn(*contexts, CONTEXT_DIM))
        expected = torch.broadcast_shapes(contexts, batch)
        for transforms in ([flow], [flow, case.flow(DIM)], [Compose([flow, case.flow(DIM)])]):
            d = dist.TransformedDistribution(base(*batch), transforms)
            assert d.batch_shape == expected
            z = d.rsample()
            assert z.shape == (*expected, DIM)
            assert d.log_prob(z).shape == expected
        assert dist.ConditionalTransformedDistribution(base(), [module]).condition(flow.context).batch_shape == contexts


@pytest.mark.parametrize("case", CASES, ids=name)
def test_inverse_object(case):
    flow = case.flow(DIM, 0.3, (4,))
    assert flow.inv.inv is flow
    x = torch.randn(4, DIM)
    y = flow(x)
    assert flow.inv(y) is x
    inverse = flow.inv
    back = inverse(y.clone())
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
    ladj = flow.log_abs_det_jacobian(x, y)
    torch.testing.assert_close(inverse.log_abs_det_jacobian(y, x), -ladj)
    assert (inverse.domain.event_dim, inverse.codomain.event_dim, inverse.bijective) == (1, 1, True)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_the_same_instance_twice(case):
    flow = case.flow(DIM, 0.3, (4,))
    x = torch.randn(4, DIM)
    once, first = flow.forward_and_ladj(x)
    twice, second = flow.forward_and_ladj(once)

    composed = Compose([flow, flow])
    y, ladj = composed.forward_and_ladj(x)
    torch.testing.assert_close(y, twice)
    torch.testing.assert_close(ladj, first + second)
    torch.testing.assert_close(composed.inverse_and_ladj(y)[0], x, rtol=1e-8, atol=1e-8)
    assert len(list(composed.parameters())) == len(list(flow.parameters()))

    for cache_size in (0, 1):
        chain = ComposeTransform([flow, flow], cache_size=cache_size)
        z = chain(x)
        torch.testing.assert_close(z, twice)
        torch.testing.assert_close(chain.log_abs_det_jacobian(x, z), first + second)
        torch.testing.assert_close(chain.inv(z.clone()), x, rtol=1e-8, atol=1e-8)

    d = dist.TransformedDistribution(base(4), [flow, flow])
    z = d.rsample()
    back, ladj = composed.inverse_and_ladj(z)
    expected = base(4).log_prob(back) - ladj
    for value in (z, z.clone()):
        torch.testing.assert_close(d.log_prob(value), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_with_cache_shares_the_parameters(case):
    flow = case.flow(DIM, 0.3, (4,))
    bare = flow.with_cache(0)
    assert flow.with_cache(1) is flow
    assert bare.with_cache(0) is bare
    assert [id(p) for p in bare.parameters()] == [id(p) for p in flow.parameters()]
    x = torch.randn(4, DIM)
    y = bare(x)
    torch.testing.assert_close(y, flow.forward_and_ladj(x)[0])
    assert bare.inv(y) is not x
    cached = bare.with_cache(1)
    assert cached.inv(cached(x)) is x
    assert cached.inv.inv is cached
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.mul_(0.5)
    torch.testing.assert_close(bare(x), flow.forward_and_ladj(x)[0])
    with pytest.raises(ValueError, match="cache_size must be 0 or 1, got 2"):
        flow.with_cache(2)


@pytest.mark.parametrize("case", PLAIN, ids=name)
def test_compose(case):
    """Value and ladj of a composition are those of its parts in order, also if nested, in both directions."""
    one, other = case.flow(DIM, 0.3, seed=1), randomize(Planar(DIM), 0.5)
    x = torch.randn(4, DIM)
    middle, first = one.forward_and_ladj(x)
    expected, second = other.forward_and_ladj(middle)
    for composed in (Compose([one, other]), Compose([Compose([one]), Compose([other])])):
        y, ladj = composed.forward_and_ladj(x)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(ladj, first + second)
        back, inverse_ladj = composed.inverse_and_ladj(y)
        torch.testing.assert_close(back, x, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(inverse_ladj, ladj, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("case", CONDITIONAL, ids=name)
def test_conditional_compose_takes_plain_parts(case):
    plain, conditional = randomize(Planar(DIM), 0.5), case.build(DIM, 0.3)
    context, x = torch.randn(4, CONTEXT_DIM), torch.randn(4, DIM)
    y, ladj = ConditionalCompose([plain, conditional]).condition(context).forward_and_ladj(x)
    middle, first = plain.forward_and_ladj(x)
    expected, second = conditional.condition(context).forward_and_ladj(middle)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(ladj, first + second)
