"""Steps on all parameters as one vector are those of an optimizer that takes them one by one."""

import math

import pytest
import torch
from torch.testing import assert_close

from pyro_flowguides.inference.flat_adam import GRADIENT_NORM, Descent
from pyro_flowguides.transforms import Planar


def make_parameters(dtypes=(torch.float64,)):
    torch.manual_seed(0)
    shapes = [(), (3,), (2, 4), (0,), (1, 2, 2)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for dtype in dtypes for shape in shapes]


def loss(parameters, scale):
    return scale * sum(((k + 1) * value.double().sin()).sum() for k, value in enumerate(parameters))


@pytest.mark.parametrize("dtypes", [(torch.float64,), (torch.float64, torch.float32)], ids=["one", "two"])
@pytest.mark.parametrize("scale", [0.1, 100.0], ids=["small", "clipped"])
def test_it_is_adam_with_clipped_gradients(dtypes, scale):
    ours, theirs = make_parameters(dtypes), make_parameters(dtypes)
    descent, optimizer = Descent(ours), torch.optim.Adam(theirs, lr=0.1, betas=(0.9, 0.99))
    for step in range(20):
        assert descent.follow(loss(ours, scale), 0.1 / (1 + step))
        optimizer.zero_grad()
        loss(theirs, scale).backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs, GRADIENT_NORM)
        assert (norm > GRADIENT_NORM) == (scale > 1)
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        tolerance = 1e-12 if one.dtype == torch.float64 and len(dtypes) == 1 else 1e-5
        assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scale", [0.1, 100.0], ids=["small", "clipped"])
def test_a_parameter_in_units_takes_the_steps_of_its_measure(scale):
    """Clipping sees the gradient by the measure, too."""
    measured, measures = make_parameters(), make_parameters()
    units = [torch.full_like(value.detach(), 1.0 + 9 * (value.ndim == 2)) for value in measures]
    for value, unit in zip(measured, units, strict=True):
        value.detach().mul_(unit)
    in_units, plain = Descent(measured), Descent(measures)
    in_units.measure(measured[2], units[2])
    for step in range(20):
        in_units.follow(loss(measured, scale), 0.1 / (1 + step))
        plain.follow(loss([value * unit for value, unit in zip(measures, units, strict=True)], scale), 0.1 / (1 + step))
    for value, measure, unit in zip(measured, measures, units, strict=True):
        assert_close(value, measure * unit, rtol=1e-12, atol=1e-12)


def test_a_loss_and_its_gradients_are_followed_alike():
    first, second = make_parameters(), make_parameters()
    by_loss, by_gradient = Descent(first), Descent(second)
    for _ in range(5):
        gradient = torch.cat([value.reshape(-1) for value in torch.autograd.grad(loss(second, 1.0), second)])
        by_gradient.follow([gradient], 0.1)
        by_loss.follow(loss(first, 1.0), 0.1)
    for one, other in zip(first, second, strict=True):
        assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_not_followed(bad):
    parameters = make_parameters()
    descent = Descent(parameters)
    descent.follow(loss(parameters, 1.0), 0.1)
    before = descent.values()[0]
    assert not descent.follow(loss(parameters, bad), 0.1)
    assert_close(descent.values()[0], before, rtol=0, atol=0)
    assert descent.follow(loss(parameters, 1.0), 0.1)


def test_the_parameters_stay_the_same_objects_and_get_their_own_memory_back():
    parameters = make_parameters()
    values = [value.detach().clone() for value in parameters]
    descent = Descent(parameters)
    assert len({value.untyped_storage().data_ptr() for value in parameters}) == 1
    for value, before in zip(parameters, values, strict=True):
        assert_close(value.detach(), before, rtol=0, atol=0)
    descent.release()
    filled = [value for value in parameters if value.numel()]
    assert len({value.untyped_storage().data_ptr() for value in filled}) == len(filled)
    for value, before in zip(parameters, values, strict=True):
        assert value.grad is None
        assert value.is_leaf
        assert value.requires_grad
        assert_close(value.detach(), before, rtol=0, atol=0)


@pytest.mark.parametrize("change", ["follow", "assign"])
def test_a_flow_knows_that_its_parameters_moved(change):
    flow = Planar(2).double()
    with torch.no_grad():
        for value in flow.parameters():
            value.normal_()
    descent = Descent(flow.parameters())
    y = flow(torch.randn(3, 2, dtype=torch.float64)).detach()
    x = flow.inv(y)
    if change == "follow":
        descent.follow(sum(value.sum() for value in flow.parameters()), 0.5)
    else:
        descent.assign([value + 1 for value in descent.values()])
    assert not torch.allclose(flow.inv(y), x, atol=1e-3)
    assert_close(flow.inv(y), flow.inverse_and_ladj(y)[0])
