"""Adam on all parameters as one vector takes the steps of an optimizer that updates them one by one."""

import math

import pytest
import torch
from torch.testing import assert_close

from pyro_flowguides.inference.flat_adam import MAX_GRADIENT_NORM, FlatAdam
from pyro_flowguides.transforms import Planar


def make_parameters(dtypes=(torch.float64,)):
    torch.manual_seed(0)
    shapes = [(), (3,), (2, 4), (0,), (1, 2, 2)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for dtype in dtypes for shape in shapes]


def loss(parameters, scale):
    return scale * sum(((k + 1) * value.double().sin()).sum() for k, value in enumerate(parameters))


@pytest.mark.parametrize("dtypes", [(torch.float64,), (torch.float64, torch.float32)], ids=["one", "two"])
@pytest.mark.parametrize("scale", [0.1, 100.0], ids=["small", "clipped"])
def test_steps_are_those_of_adam_with_clipped_gradients(dtypes, scale):
    ours, theirs = make_parameters(dtypes), make_parameters(dtypes)
    adam, optimizer = FlatAdam(ours), torch.optim.Adam(theirs, lr=0.1, betas=(0.9, 0.99))
    for step in range(20):
        assert adam.step(loss(ours, scale), 0.1 / (1 + step))
        optimizer.zero_grad()
        loss(theirs, scale).backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs, MAX_GRADIENT_NORM)
        assert (norm > MAX_GRADIENT_NORM) == (scale > 1)
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        tolerance = 1e-12 if one.dtype == torch.float64 and len(dtypes) == 1 else 1e-5
        assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scale", [0.1, 100.0], ids=["small", "clipped"])
def test_a_scaled_parameter_takes_the_steps_of_the_unscaled_one(scale):
    """Clipping applies to the gradient by the unscaled parameters."""
    parameters, unscaled = make_parameters(), make_parameters()
    factors = [torch.full_like(value.detach(), 1.0 + 9 * (value.ndim == 2)) for value in unscaled]
    for value, factor in zip(parameters, factors, strict=True):
        value.detach().mul_(factor)
    scaled, plain = FlatAdam(parameters), FlatAdam(unscaled)
    scaled.set_scale(parameters[2], factors[2])
    for step in range(20):
        lr = 0.1 / (1 + step)
        scaled.step(loss(parameters, scale), lr)
        plain.step(loss([value * factor for value, factor in zip(unscaled, factors, strict=True)], scale), lr)
    for value, other, factor in zip(parameters, unscaled, factors, strict=True):
        assert_close(value, other * factor, rtol=1e-12, atol=1e-12)


def test_a_loss_and_its_gradient_give_the_same_steps():
    first, second = make_parameters(), make_parameters()
    by_loss, by_gradient = FlatAdam(first), FlatAdam(second)
    for _ in range(5):
        gradient = torch.cat([value.reshape(-1) for value in torch.autograd.grad(loss(second, 1.0), second)])
        by_gradient.step([gradient], 0.1)
        by_loss.step(loss(first, 1.0), 0.1)
    for one, other in zip(first, second, strict=True):
        assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_step_is_taken_where_the_gradient_is_not_finite(bad):
    parameters = make_parameters()
    adam = FlatAdam(parameters)
    adam.step(loss(parameters, 1.0), 0.1)
    before = adam.snapshot()[0]
    assert not adam.step(loss(parameters, bad), 0.1)
    assert_close(adam.snapshot()[0], before, rtol=0, atol=0)
    assert adam.step(loss(parameters, 1.0), 0.1)


def test_parameters_remain_the_same_objects_and_get_their_own_memory_back():
    parameters = make_parameters()
    values = [value.detach().clone() for value in parameters]
    adam = FlatAdam(parameters)
    assert len({value.untyped_storage().data_ptr() for value in parameters}) == 1
    for value, before in zip(parameters, values, strict=True):
        assert_close(value.detach(), before, rtol=0, atol=0)
    adam.release()
    filled = [value for value in parameters if value.numel()]
    assert len({value.untyped_storage().data_ptr() for value in filled}) == len(filled)
    for value, before in zip(parameters, values, strict=True):
        assert value.grad is None
        assert value.is_leaf
        assert value.requires_grad
        assert_close(value.detach(), before, rtol=0, atol=0)


@pytest.mark.parametrize("change", ["step", "restore"])
def test_a_flow_drops_its_cache_when_its_parameters_change(change):
    flow = Planar(2).double()
    with torch.no_grad():
        for value in flow.parameters():
            value.normal_()
    adam = FlatAdam(flow.parameters())
    y = flow(torch.randn(3, 2, dtype=torch.float64)).detach()
    x = flow.inv(y)
    if change == "step":
        adam.step(sum(value.sum() for value in flow.parameters()), 0.5)
    else:
        adam.restore([value + 1 for value in adam.snapshot()])
    assert not torch.allclose(flow.inv(y), x, atol=1e-3)
    assert_close(flow.inv(y), flow.inverse_and_ladj(y)[0])
