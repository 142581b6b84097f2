"""Encoders and decoders of vectors, images and latent images."""

import pytest
import torch
from torch import nn

from pyro_flowguides.vae import (
    DenseDecoder,
    DenseEncoder,
    GatedConvDecoder,
    GatedConvEncoder,
    GaussianEncoder,
    ResNetDecoder,
    ResNetEncoder,
    SpatialDecoder,
    SpatialEncoder,
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
def test_every_output_map_is_one_parameter_of_one_channel(decoder):
    """Adding to the bias of an output map changes one parameter of one channel, at all pixels."""
    network, z = decoder(5, (3, 8, 8), 2), torch.randn(4, 5)
    last = network.network[-1]
    before = network(z)
    with torch.no_grad():
        last.bias[2 * 1 + 1] += 1  # channel 1, parameter 1
    change = torch.zeros(3, 8, 8, 2)
    change[1, :, :, 1] = 1
    torch.testing.assert_close(network(z) - before, change.expand(4, -1, -1, -1, -1))


@pytest.mark.parametrize("decoder", [GatedConvDecoder, ResNetDecoder])
def test_the_latent_vector_affects_the_image_from_the_start(decoder):
    network, z = decoder(16, (1, 28, 28), 1), torch.randn(64, 16)
    with data_dependent_initialization(network):
        network(z)
    assert network(z).std(0).mean() > 0.05


def test_the_gated_convolutions_are_those_of_the_paper():
    """Channels, kernels and strides are those of van den Berg et al. (2018), for images of 28 × 28."""

    def layers(module):
        convolutions = [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
        return [(m.out_channels, *m.kernel_size, m.stride[0]) for m in convolutions]

    encoder = [(64, 5, 5, 1), (64, 5, 5, 2), (128, 5, 5, 1), (128, 5, 5, 2), (128, 5, 5, 1), (512, 7, 7, 1)]
    assert layers(GatedConvEncoder((1, 28, 28))) == encoder
    decoder = [(128, 7, 7, 1), (128, 5, 5, 1), (64, 5, 5, 2), (64, 5, 5, 1), (64, 5, 5, 2), (64, 5, 5, 1), (1, 1, 1, 1)]
    assert layers(GatedConvDecoder(64, (1, 28, 28), 1)) == decoder


def test_the_gaussian_head_starts_from_the_standard_normal_at_zero_weights():
    encoder = GaussianEncoder(DenseEncoder((6,), [8]), latent_dim=3)
    nn.init.zeros_(encoder.head.weight)
    nn.init.zeros_(encoder.head.bias)
    loc, scale, context = encoder(torch.rand(4, 6))
    torch.testing.assert_close(loc, torch.zeros(4, 3))
    torch.testing.assert_close(scale, torch.ones(4, 3))
    assert context.shape == (4, encoder.context_dim) == (4, 8)


@pytest.mark.parametrize("network", [GatedConvEncoder, ResNetEncoder])
@pytest.mark.parametrize("shape", [(28, 28), (784,), (1, 3, 8)])
def test_data_that_are_not_images_raise_an_error(network, shape):
    with pytest.raises(ValueError, match=r"\(channels, height, width\)"):
        network(shape)


# -- latent images -----------------------------------------------------------------------------------------------------


def test_spatial_networks_take_any_leading_dimensions():
    encoder, x = SpatialEncoder((3, 9, 16), latent_dim=2 * 3 * 4, hidden=6), torch.rand(2, 3, 3, 9, 16)
    loc, scale, context = encoder(x)
    assert loc.shape == scale.shape == (2, 3, 24)
    assert context.shape == (2, 3, encoder.context_dim) == (2, 3, 6 * 3 * 4)
    for batch, alone in zip((loc, scale, context), encoder(x[1, 2]), strict=True):
        torch.testing.assert_close(batch[1, 2], alone)
    decoder, z = SpatialDecoder(24, (3, 9, 16), parameters_per_value=2, hidden=6), torch.randn(2, 3, 24)
    params = decoder(z)
    assert params.shape == (2, 3, 3, 9, 16, 2)
    torch.testing.assert_close(params[1, 2], decoder(z[1, 2]))


def test_latent_images_keep_the_spatial_layout():
    """A corner of the image affects the nearest corner of a large latent image, and not the opposite one."""
    encoder = SpatialEncoder((1, 128, 128), latent_dim=32 * 32, hidden=4)
    x = torch.rand(1, 128, 128, requires_grad=True)
    loc = encoder(x)[0].reshape(32, 32)
    near, far = (torch.autograd.grad(loc[i, i], x, retain_graph=True)[0][0, :4, :4] for i in (0, -1))
    assert near.abs().max() > 0
    assert (far == 0).all()


def test_latent_dim_must_fill_the_latent_image():
    with pytest.raises(ValueError, match=r"SpatialEncoder: .* latent_dim must be a multiple of 4, got 6"):
        SpatialEncoder((1, 8, 8), latent_dim=6)
    with pytest.raises(ValueError, match=r"SpatialDecoder: .* latent_dim must be a multiple of 4, got 6"):
        SpatialDecoder(6, (1, 8, 8), parameters_per_value=1)
