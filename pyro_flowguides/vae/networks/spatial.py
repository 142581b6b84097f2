"""Encoder and decoder for latent images: residual networks that keep the spatial layout."""

from collections.abc import Sequence

from torch import Tensor, nn

from pyro_flowguides.vae.networks.dense import positive_scale
from pyro_flowguides.vae.networks.image_shapes import as_image_shape, flatten_batch, halve_size, params_last
from pyro_flowguides.vae.networks.resnet import RESIDUAL_SCALE, ResidualBlock
from pyro_flowguides.vae.networks.weight_norm import WeightNormConv2d

__all__ = ["SpatialDecoder", "SpatialEncoder"]

#: Number of times that the image is halved to reach the size of the latent image.
HALVINGS = 2


def _latent_shape(owner: str, latent_dim: int, data_shape: Sequence[int]) -> tuple[int, int, int]:
    """Return channels, height and width of the latent image; raise an error if ``latent_dim`` does not fit."""
    _, *size = as_image_shape(owner, data_shape)
    height, width = halve_size(size, HALVINGS)
    if latent_dim < 1 or latent_dim % (height * width):
        raise ValueError(
            f"{owner}: for images of {size[0]}×{size[1]} the latent image has {height}×{width} pixels; latent_dim must "
            f"be a multiple of {height * width}, got {latent_dim}"
        )
    return latent_dim // (height * width), height, width


class SpatialEncoder(nn.Module):
    r"""Location, scale and context of a latent image with a quarter of the height and width.

    Residual blocks of 3 × 3 convolutions, two of them with stride 2, compute the features. A 3 × 3 convolution maps the
    features to :math:`(\mu, \operatorname{softplus}^{-1} \sigma)`. The latent image is returned flattened; the
    flattened features are the context.

    Args:
        data_shape: ``(channels, height, width)``.
        latent_dim: c·h·w, a multiple of h·w, with h, w = height / 4, width / 4, rounded up.
        hidden: feature maps.

    Shapes:
        ``(..., *data_shape)`` -> loc ``(..., latent_dim)``, scale ``(..., latent_dim)``, context
        ``(..., hidden * h * w)``.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import SpatialEncoder
        >>> loc, scale, context = SpatialEncoder((3, 16, 16), latent_dim=32, hidden=8)(torch.rand(5, 3, 16, 16))
        >>> loc.shape, context.shape
        (torch.Size([5, 32]), torch.Size([5, 128]))
    """

    def __init__(self, data_shape: Sequence[int], latent_dim: int, hidden: int = 32) -> None:
        super().__init__()
        channels, height, width = _latent_shape("SpatialEncoder", latent_dim, data_shape)
        self.latent_dim, self.context_dim = latent_dim, hidden * height * width
        layers: list[nn.Module] = [WeightNormConv2d(data_shape[0], hidden), ResidualBlock.same_size(hidden)]
        for _ in range(HALVINGS):
            layers += [ResidualBlock.downsampling(hidden, hidden), ResidualBlock.same_size(hidden)]
        self.network = nn.Sequential(*layers, nn.ELU())
        self.head = WeightNormConv2d(hidden, 2 * channels, init_scale=RESIDUAL_SCALE)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = flatten_batch(self.network, x, 3)
        loc, raw = flatten_batch(self.head, features, 3).flatten(-3).chunk(2, -1)
        return loc, positive_scale(raw), features.flatten(-3)


class SpatialDecoder(nn.Module):
    """The mirror image of :class:`SpatialEncoder`: from a latent image to the parameters of a likelihood.

    Args:
        latent_dim, hidden: as for the encoder.
        data_shape, parameters_per_value: as for :class:`DenseDecoder`, as are the shapes.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import SpatialDecoder
        >>> SpatialDecoder(32, (3, 16, 16), parameters_per_value=2, hidden=8)(torch.randn(5, 32)).shape
        torch.Size([5, 3, 16, 16, 2])
    """

    def __init__(self, latent_dim: int, data_shape: Sequence[int], parameters_per_value: int, hidden: int = 32) -> None:
        super().__init__()
        shape = _latent_shape("SpatialDecoder", latent_dim, data_shape)
        self.channels, *size = data_shape
        layers: list[nn.Module] = [nn.Unflatten(-1, shape), WeightNormConv2d(shape[0], hidden)]
        for times in reversed(range(HALVINGS)):
            layers.append(ResidualBlock.same_size(hidden))
            layers.append(ResidualBlock.upsampling(hidden, hidden, halve_size(size, times)))
        last = WeightNormConv2d(hidden, self.channels * parameters_per_value, init_scale=RESIDUAL_SCALE)
        self.network = nn.Sequential(*layers, ResidualBlock.same_size(hidden), nn.ELU(), last)

    def forward(self, z: Tensor) -> Tensor:
        return params_last(flatten_batch(self.network, z, 1), self.channels)
