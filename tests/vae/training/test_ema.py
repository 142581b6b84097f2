"""Averages of the weights."""

import math

import pytest
import torch
from torch import nn

from pyro_flowguides.transforms import Planar
from pyro_flowguides.vae import EMA


def one_weight(value):
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, value)
    return module


def test_the_average_follows_its_recursion():
    module = one_weight(0.0)
    ema, expected = EMA(module, decay=0.5), 0.0
    for step, value in enumerate([1.0, 5.0, -2.0, 4.0, 0.0, 1.0, 7.0, 2.0, 3.0, 9.0, 8.0, 1.0], start=1):
        nn.init.constant_(module.weight, value)
        ema.update(module)
        decay = min(0.5, step / (step + 9))
        expected = decay * expected + (1 - decay) * value
        assert ema.averages["weight"].item() == pytest.approx(expected, rel=1e-6)


def test_the_average_is_applied_within_a_context():
    module = one_weight(0.0)
    ema = EMA(module, decay=0.0)
    nn.init.constant_(module.weight, 3.0)
    ema.update(module)
    nn.init.constant_(module.weight, 8.0)
    with ema.applied(module):
        assert module.weight.item() == 3
    assert module.weight.item() == 8
    with pytest.raises(ZeroDivisionError), ema.applied(module):
        math.fmod(1, 1 // 0)
    assert module.weight.item() == 8


def test_the_average_is_saved_and_copied():
    module = one_weight(0.0)
    ema = EMA(module, decay=0.9)
    nn.init.constant_(module.weight, 3.0)
    ema.update(module)
    other = EMA(one_weight(-1.0), decay=0.9)
    other.load_state_dict(ema.state_dict())
    for one in (ema, other):
        one.update(module)
    assert other.steps == 2
    assert other.averages["weight"].item() == ema.averages["weight"].item()
    assert other.averages["weight"] is not ema.averages["weight"]


def test_a_module_with_other_parameters_is_refused():
    ema = EMA(one_weight(0.0))
    with pytest.raises(ValueError, match="bias"):
        ema.update(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="other parameters"):
        ema.load_state_dict({"steps": 0, "averages": {}})
    with pytest.raises(ValueError, match="bias"):
        ema.copy_to(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="decay"):
        EMA(one_weight(0.0), decay=1.0)


def test_averages_are_copied_into_a_module():
    ema, other = EMA(one_weight(3.0)), one_weight(8.0)
    ema.copy_to(other)
    assert other.weight.item() == 3


def test_cached_values_of_a_flow_do_not_outlive_a_change_of_its_weights():
    """An inverse under the averages is that of the averages, although the flow has cached its own."""
    flow = Planar(3)
    ema = EMA(flow)
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=1.0)
    x = torch.randn(4, 3)
    y = flow(x)
    with ema.applied(flow):
        assert not torch.allclose(flow.inv(y), x)
    torch.testing.assert_close(flow.inv(y), x)
