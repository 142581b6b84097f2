"""Encoders and decoders for images and vectors, and weight normalization."""

import pytest
import torch
from torch import nn

from pyro_flowguides.vae.networks import (
    DenseDecoder,
    DenseEncoder,
    GatedConvDecoder,
    GatedConvEncoder,
    GaussianEncoder,
    ResNetDecoder,
    ResNetEncoder,
    WeightNormConv2d,
    WeightNormLinear,
    data_dependent_initialization,
)

ENCODERS = [DenseEncoder, GatedConvEncoder, ResNetEncoder]
DECODERS = [DenseDecoder, GatedConvDecoder, ResNetDecoder]
SHAPES = [(1, 28, 28), (1, 28, 20), (3, 8, 8), (2, 5, 7), (1, 4, 4)]


@pytest.fixture(autouse=True)
def _double_precision(_fresh_state):
    torch.set_default_dtype(torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_encoders_take_any_leading_dimensions(encoder, shape):
    network, x = encoder(shape), torch.rand(2, 3, *shape)
    features = network(x)
    assert features.shape == (2, 3, network.features)
    torch.testing.assert_close(features[1], network(x[1]))
    torch.testing.assert_close(features[1, 2], network(x[1, 2]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decoder", DECODERS)
def test_decoders_take_any_leading_dimensions(decoder, shape):
    network, z = decoder(5, shape, 2), torch.randn(2, 3, 5)
    params = network(z)
    assert params.shape == (2, 3, *shape, 2)
    torch.testing.assert_close(params[1], network(z[1]))
    torch.testing.assert_close(params[1, 2], network(z[1, 2]))


@pytest.mark.parametrize("decoder", [GatedConvDecoder, ResNetDecoder])
def test_channels_and_parameters_are_not_mixed_up(decoder):
    """Shifting the bias of one output map moves that parameter of that channel, everywhere in the image."""
    network, z = decoder(5, (3, 8, 8), 2), torch.randn(4, 5)
    last = network.network[-1]
    before = network(z)
    with torch.no_grad():
        last.bias[2 * 1 + 1] += 1  # channel 1, parameter 1
    wanted = torch.zeros(3, 8, 8, 2)
    wanted[1, :, :, 1] = 1
    torch.testing.assert_close(network(z) - before, wanted.expand(4, -1, -1, -1, -1))


@pytest.mark.parametrize("decoder", [GatedConvDecoder, ResNetDecoder])
def test_the_latent_vector_reaches_the_image_from_the_start(decoder):
    network, z = decoder(16, (1, 28, 28), 1), torch.randn(64, 16)
    with data_dependent_initialization(network):
        network(z)
    assert network(z).std(0).mean() > 0.05


def test_the_gated_convolutions_are_those_of_the_paper():
    """Channels, kernels and strides of the table in van den Berg et al. (2018), for images of 28 × 28."""

    def layers(module):
        kinds = nn.Conv2d, nn.ConvTranspose2d
        return [(m.out_channels, *m.kernel_size, m.stride[0]) for m in module.modules() if isinstance(m, kinds)]

    gated = [(64, 5, 5, 1), (64, 5, 5, 2), (128, 5, 5, 1), (128, 5, 5, 2), (128, 5, 5, 1), (512, 7, 7, 1)]
    assert layers(GatedConvEncoder((1, 28, 28))) == gated
    mirrored = [
        (128, 7, 7, 1),
        (128, 5, 5, 1),
        (64, 5, 5, 2),
        (64, 5, 5, 1),
        (64, 5, 5, 2),
        (64, 5, 5, 1),
        (1, 1, 1, 1),
    ]
    assert layers(GatedConvDecoder(64, (1, 28, 28), 1)) == mirrored


def test_the_gaussian_head():
    encoder = GaussianEncoder(DenseEncoder((6,), [8]), latent_dim=3)
    nn.init.zeros_(encoder.head.weight)
    nn.init.zeros_(encoder.head.bias)
    loc, scale, context = encoder(torch.rand(4, 6))
    torch.testing.assert_close(loc, torch.zeros(4, 3))
    torch.testing.assert_close(scale, torch.ones(4, 3))
    assert context.shape == (4, encoder.context_dim) == (4, 8)


@pytest.mark.parametrize("network", [GatedConvEncoder, ResNetEncoder])
@pytest.mark.parametrize("shape", [(28, 28), (784,), (1, 3, 8)])
def test_what_is_no_image_is_refused(network, shape):
    with pytest.raises(ValueError, match=r"\(channels, height, width\)"):
        network(shape)


# -- weight normalization ----------------------------------------------------------------------------------------------

LAYERS = [
    pytest.param(lambda: WeightNormLinear(6, 4, init_scale=0.3), (500, 6), id="linear"),
    pytest.param(lambda: WeightNormConv2d(2, 4, 3, init_scale=0.3), (50, 2, 5, 6), id="conv"),
    pytest.param(lambda: WeightNormConv2d(2, 4, 5, stride=2, init_scale=0.3), (50, 2, 5, 6), id="strided"),
]


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_weight_normalization_starts_as_the_plain_layer(make, shape):
    layer, x = make(), torch.randn(shape)
    torch.testing.assert_close(layer.normalized_weight(), layer.weight)
    torch.testing.assert_close(layer(x), layer.apply_weight(x, layer.weight, layer.bias))


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_the_length_of_the_direction_does_not_matter(make, shape):
    layer, x = make(), torch.randn(shape)
    before = layer(x)
    with torch.no_grad():
        layer.weight.mul_(torch.tensor([0.1, 1.0, 5.0, 100.0]).view(-1, *[1] * (layer.weight.dim() - 1)))
    torch.testing.assert_close(layer(x), before)


@pytest.mark.parametrize(("make", "shape"), LAYERS)
def test_data_dependent_initialization_standardizes_the_outputs(make, shape):
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
    checked = []

    def check(layer, inputs, output):
        mean, std = layer._over_all_but_channels(output)
        varies = std > 1e-3  # border pixels of a tiny image may leave an output constant
        checked.append(varies.double().mean().item())
        torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-8, rtol=0)
        torch.testing.assert_close(std[varies], torch.ones_like(std[varies]))

    for layer in network.modules():
        if isinstance(layer, WeightNormConv2d | WeightNormLinear):
            layer.register_forward_hook(check)
    network(x)
    assert len(checked) == 17
    assert min(checked) > 0.9


def test_an_output_that_never_varies_stays_finite():
    layer, x = WeightNormLinear(3, 2), torch.ones(10, 3)
    with data_dependent_initialization(layer):
        y = layer(x)
    assert y.isfinite().all()
    torch.testing.assert_close(y, torch.zeros(10, 2))


def test_plain_networks_are_left_alone():
    network, x = nn.Linear(3, 2), torch.randn(10, 3)
    before = network(x)
    with data_dependent_initialization(network):
        network(x)
    torch.testing.assert_close(network(x), before)
