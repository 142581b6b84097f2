"""Weight normalization and its data-dependent initialization."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pyro_flowguides.vae import ResNetEncoder, WeightNormConv2d, WeightNormLinear, data_dependent_initialization

#: A layer with ``init_scale`` 0.3, the shape of its inputs, and the plain layer as a function of input and weight.
LAYERS = [
    pytest.param(lambda: WeightNormLinear(6, 4, init_scale=0.3), (500, 6), F.linear, id="linear"),
    pytest.param(
        lambda: WeightNormConv2d(2, 4, 3, init_scale=0.3),
        (50, 2, 5, 6),
        lambda x, weight, bias: F.conv2d(x, weight, bias, padding=1),
        id="conv",
    ),
    pytest.param(
        lambda: WeightNormConv2d(2, 4, 5, stride=2, init_scale=0.3),
        (50, 2, 5, 6),
        lambda x, weight, bias: F.conv2d(x, weight, bias, stride=2, padding=2),
        id="strided",
    ),
]


@pytest.fixture(autouse=True)
def _double_precision(_fresh_state):
    torch.set_default_dtype(torch.float64)


@pytest.mark.parametrize(("make", "shape", "plain"), LAYERS)
def test_initially_equals_the_plain_layer(make, shape, plain):
    layer, x = make(), torch.randn(shape)
    torch.testing.assert_close(layer(x), plain(x, layer.weight, layer.bias))


@pytest.mark.parametrize(("make", "shape", "plain"), LAYERS)
def test_gains_are_the_norms_of_the_weights(make, shape, plain):
    layer, x = make(), torch.randn(shape)
    gain = torch.tensor([0.5, 1.0, 2.0, 3.0])
    norms = layer.weight.flatten(1).norm(dim=1)
    with torch.no_grad():
        layer.gain.copy_(gain)
    weight = layer.weight * (gain / norms).view(-1, *[1] * (layer.weight.dim() - 1))
    torch.testing.assert_close(layer(x), plain(x, weight, layer.bias))


@pytest.mark.parametrize(("make", "shape", "plain"), LAYERS)
def test_the_length_of_the_direction_has_no_effect(make, shape, plain):
    layer, x = make(), torch.randn(shape)
    before = layer(x)
    with torch.no_grad():
        layer.weight.mul_(torch.tensor([0.1, 1.0, 5.0, 100.0]).view(-1, *[1] * (layer.weight.dim() - 1)))
    torch.testing.assert_close(layer(x), before)


@pytest.mark.parametrize(("make", "shape", "plain"), LAYERS)
def test_data_dependent_initialization_standardizes_the_outputs(make, shape, plain):
    layer, x = make(), 3 * torch.randn(shape) + 7
    with data_dependent_initialization(layer):
        layer(x)
    y = layer(x).movedim(-3 if x.dim() == 4 else -1, 0).flatten(1)
    torch.testing.assert_close(y.mean(1), torch.zeros(4), atol=1e-9, rtol=0)
    torch.testing.assert_close(y.std(1), torch.full((4,), 0.3))


def test_every_layer_of_a_network_is_initialized_on_initialized_inputs():
    network, x = ResNetEncoder((1, 8, 8), hidden=20), torch.rand(64, 1, 8, 8)
    with data_dependent_initialization(network):
        network(x)
    varying = []

    def check(layer, inputs, output):
        y = output.movedim(1, 0).flatten(1)
        mean, std = y.mean(1), y.std(1)
        varies = std > 1e-3  # at the border of a tiny image an output may be constant
        varying.append(varies.double().mean().item())
        torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-8, rtol=0)
        torch.testing.assert_close(std[varies], torch.ones_like(std[varies]))

    for layer in network.modules():
        if isinstance(layer, WeightNormConv2d | WeightNormLinear):
            layer.register_forward_hook(check)
    network(x)
    assert len(varying) == 17
    assert min(varying) > 0.9


def test_a_constant_output_is_only_centered():
    layer, x = WeightNormLinear(3, 2), torch.ones(10, 3)
    with data_dependent_initialization(layer):
        layer(x)
    torch.testing.assert_close(layer(x), torch.zeros(10, 2))
    torch.testing.assert_close(layer.gain, torch.ones(2))


def test_plain_layers_are_left_unchanged():
    network, x = nn.Linear(3, 2), torch.randn(10, 3)
    before = network(x)
    with data_dependent_initialization(network):
        network(x)
    torch.testing.assert_close(network(x), before)


def test_outside_the_context_calls_change_nothing():
    layer, x = WeightNormLinear(3, 2), torch.randn(10, 3)
    with data_dependent_initialization(layer):
        layer(x)
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    layer(5 * x + 1)
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())
