"""Residual networks with weight normalization: those of Kingma et al. (2016), and ones for latent images."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from pyro_flowguides.vae.networks.dense import positive_scale
from pyro_flowguides.vae.networks.image_shapes import as_image_shape, flatten_batch, halve_size, params_last
from pyro_flowguides.vae.networks.weight_norm import WeightNormConv2d, WeightNormLinear

__all__ = ["RESIDUAL_SCALE", "ResNetDecoder", "ResNetEncoder", "ResidualBlock", "SpatialDecoder", "SpatialEncoder"]
__all__ += ["UpsampleConv2d"]

#: Feature maps of the stages, in the order of the encoder.
STAGE_WIDTHS = (16, 32, 32)
#: Residual blocks per stage.
BLOCKS_PER_STAGE = 2
#: Factor on the residual of a block, so that a deep network starts close to its skip connections.
RESIDUAL_SCALE = 0.1
#: Number of times that an image is halved to reach the size of a latent image.
HALVINGS = 2


class UpsampleConv2d(nn.Module):
    """A convolution to four times the channels, rearranged into an image of twice the size and cropped to ``size``.

    Shapes:
        ``(N, in_channels, H, W) -> (N, out_channels, *size)``.

    References:
        W. Shi et al. (2016). Real-time single image and video super-resolution using an efficient sub-pixel
        convolutional neural network. arXiv:1609.05158.
    """

    def __init__(self, in_channels: int, out_channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        self.convolution = WeightNormConv2d(in_channels, 4 * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.convolution(x), 2)[..., : self.size[0], : self.size[1]]


class ResidualBlock(nn.Module):
    r"""A residual block of two 3 × 3 convolutions, each preceded by an ELU: :math:`s(x) + 0.1\, f(x)`.

    The first convolution and the skip connection s may change the size and the number of channels, both alike.
    """

    def __init__(self, first: nn.Module, skip: nn.Module, channels: int) -> None:
        super().__init__()
        self.first, self.skip = first, skip
        self.second = WeightNormConv2d(channels, channels)

    @classmethod
    def same_size(cls, channels: int) -> ResidualBlock:
        """Return a block that keeps size and channels, with an identity as its skip connection."""
        return cls(WeightNormConv2d(channels, channels), nn.Identity(), channels)

    @classmethod
    def downsampling(cls, inputs: int, outputs: int) -> ResidualBlock:
        """Return a block that halves height and width, rounded up."""
        first, skip = (WeightNormConv2d(inputs, outputs, stride=2) for _ in range(2))
        return cls(first, skip, outputs)

    @classmethod
    def upsampling(cls, inputs: int, outputs: int, size: tuple[int, int]) -> ResidualBlock:
        """Return a block that doubles height and width, cropped to ``size``."""
        first, skip = (UpsampleConv2d(inputs, outputs, size) for _ in range(2))
        return cls(first, skip, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(F.elu(self.first(F.elu(x))))
        return self.skip(x) + RESIDUAL_SCALE * h


class ResNetEncoder(nn.Module):
    r"""Three stages of residual blocks, each of which halves the image, and a fully connected layer.

    The stages have 16, 32 and 32 feature maps and two blocks each, with 3 × 3 convolutions, ELU and weight
    normalization. The fully connected layer has ``hidden`` units.

    Arguments and shapes are those of :class:`GatedConvEncoder`.

    References:
        D. Kingma, T. Salimans, R. Jozefowicz, X. Chen, I. Sutskever, M. Welling (2016). Improving variational inference
        with inverse autoregressive flow. arXiv:1606.04934.
        K. He, X. Zhang, S. Ren, J. Sun (2016). Identity mappings in deep residual networks. arXiv:1603.05027.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import ResNetEncoder
        >>> ResNetEncoder((1, 28, 20))(torch.rand(2, 1, 28, 20)).shape
        torch.Size([2, 450])
    """

    def __init__(self, data_shape: Sequence[int], hidden: int = 450) -> None:
        super().__init__()
        channels, *size = as_image_shape("ResNetEncoder", data_shape)
        self.features = hidden
        layers: list[nn.Module] = [WeightNormConv2d(channels, STAGE_WIDTHS[0])]
        for inputs, outputs in itertools.pairwise([STAGE_WIDTHS[0], *STAGE_WIDTHS]):
            layers.append(ResidualBlock.downsampling(inputs, outputs))
            layers += [ResidualBlock.same_size(outputs) for _ in range(BLOCKS_PER_STAGE - 1)]
        dense = WeightNormLinear(STAGE_WIDTHS[-1] * math.prod(halve_size(size, len(STAGE_WIDTHS))), hidden)
        self.network = nn.Sequential(*layers, nn.ELU(), nn.Flatten(), dense, nn.ELU())

    def forward(self, x: Tensor) -> Tensor:
        return flatten_batch(self.network, x, 3)


class ResNetDecoder(nn.Module):
    r"""The mirror image of :class:`ResNetEncoder`.

    Args:
        latent_dim, data_shape, parameters_per_value: as for :class:`DenseDecoder`, as are the shapes.
        hidden: units of the fully connected layer.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import ResNetDecoder
        >>> ResNetDecoder(16, (1, 8, 8), parameters_per_value=2)(torch.randn(3, 2, 16)).shape
        torch.Size([3, 2, 1, 8, 8, 2])
    """

    def __init__(
        self, latent_dim: int, data_shape: Sequence[int], parameters_per_value: int, hidden: int = 450
    ) -> None:
        super().__init__()
        self.channels, *size = as_image_shape("ResNetDecoder", data_shape)
        sizes = [halve_size(size, times) for times in range(len(STAGE_WIDTHS) + 1)]
        widths = [*STAGE_WIDTHS[::-1], STAGE_WIDTHS[0]]
        first = (widths[0], *sizes[-1])
        layers: list[nn.Module] = [
            WeightNormLinear(latent_dim, hidden),
            nn.ELU(),
            WeightNormLinear(hidden, math.prod(first)),
            nn.Unflatten(-1, first),
        ]
        for (inputs, outputs), size_above in zip(itertools.pairwise(widths), sizes[-2::-1], strict=True):
            layers += [ResidualBlock.same_size(inputs) for _ in range(BLOCKS_PER_STAGE - 1)]
            layers.append(ResidualBlock.upsampling(inputs, outputs, size_above))
        last = WeightNormConv2d(widths[-1], self.channels * parameters_per_value, init_scale=RESIDUAL_SCALE)
        self.network = nn.Sequential(*layers, nn.ELU(), last)

    def forward(self, z: Tensor) -> Tensor:
        return params_last(flatten_batch(self.network, z, 1), self.channels)


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
