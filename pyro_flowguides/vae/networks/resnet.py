"""Residual convolutional networks with weight normalization: encoder and decoder of Kingma et al. (2016)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from pyro_flowguides.vae.networks.batching import flatten_batch
from pyro_flowguides.vae.networks.gated_conv import halved, image_size
from pyro_flowguides.vae.networks.weight_norm import WeightNormConv2d, WeightNormLinear

__all__ = ["ResNetDecoder", "ResNetEncoder", "UpsampleConv2d"]

#: Feature maps of the three stages, from the image inwards.
STAGES = (16, 32, 32)
#: Residual blocks per stage.
BLOCKS = 2
#: What a block adds is scaled by this, so that a deep network starts close to its skip connections.
RESIDUAL_SCALE = 0.1


class UpsampleConv2d(nn.Module):
    """A convolution to four times the channels, arranged as an image of twice the size and cropped.

    Args:
        in_channels, out_channels: channels.
        size: height and width of the output: twice those of the input, or one less.

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


class _Block(nn.Module):
    r"""A residual block of two 3 × 3 convolutions with ELU before each: :math:`s(x) + 0.1\, f(x)`.

    Args:
        first: the first convolution, which may change size and channels.
        skip: the same for the skip connection.
        channels: those of the output.
    """

    def __init__(self, first: nn.Module, skip: nn.Module, channels: int) -> None:
        super().__init__()
        self.first, self.skip = first, skip
        self.second = WeightNormConv2d(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(F.elu(self.first(F.elu(x))))
        return self.skip(x) + RESIDUAL_SCALE * h


def _plain(channels: int) -> _Block:
    return _Block(WeightNormConv2d(channels, channels), nn.Identity(), channels)


def _down(inputs: int, outputs: int) -> _Block:
    return _Block(WeightNormConv2d(inputs, outputs, stride=2), WeightNormConv2d(inputs, outputs, stride=2), outputs)


def _up(inputs: int, outputs: int, size: tuple[int, int]) -> _Block:
    return _Block(UpsampleConv2d(inputs, outputs, size), UpsampleConv2d(inputs, outputs, size), outputs)


class ResNetEncoder(nn.Module):
    r"""Three stages of residual blocks, each halving the image, and a fully connected layer.

    3 × 3 convolutions with 16, 32 and 32 feature maps, ELU, weight normalization, two blocks per stage, and a layer of
    ``hidden`` units.

    Args:
        data_shape: ``(channels, height, width)``, any size from 4 × 4.
        hidden: number of features.

    Shapes:
        ``(..., channels, height, width) -> (..., hidden)``.

    References:
        D. Kingma, T. Salimans, R. Jozefowicz, X. Chen, I. Sutskever, M. Welling (2016). Improving variational inference
        with inverse autoregressive flow. arXiv:1606.04934.
        K. He, X. Zhang, S. Ren, J. Sun (2016). Identity mappings in deep residual networks. arXiv:1603.05027.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae.networks import ResNetEncoder
        >>> ResNetEncoder((1, 28, 20))(torch.rand(2, 1, 28, 20)).shape
        torch.Size([2, 450])
    """

    def __init__(self, data_shape: Sequence[int], hidden: int = 450) -> None:
        super().__init__()
        channels, height, width = image_size("ResNetEncoder", data_shape)
        self.features = hidden
        last = halved((height, width), len(STAGES))
        layers: list[nn.Module] = [WeightNormConv2d(channels, STAGES[0])]
        for inputs, outputs in itertools.pairwise([STAGES[0], *STAGES]):
            layers += [_down(inputs, outputs), *(_plain(outputs) for _ in range(BLOCKS - 1))]
        dense = WeightNormLinear(STAGES[-1] * last[0] * last[1], hidden)
        self.network = nn.Sequential(*layers, nn.ELU(), nn.Flatten(), dense, nn.ELU())

    def forward(self, x: Tensor) -> Tensor:
        return flatten_batch(self.network, x, 3)


class ResNetDecoder(nn.Module):
    r"""The mirror image of :class:`ResNetEncoder`.

    Args:
        latent_dim: width of z.
        data_shape: ``(channels, height, width)``, any size from 4 × 4.
        parameters: numbers per value of the data.
        hidden: units of the fully connected layer.

    Shapes:
        ``(..., latent_dim) -> (..., channels, height, width, parameters)``.

    References:
        D. Kingma et al. (2016). arXiv:1606.04934.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae.networks import ResNetDecoder
        >>> ResNetDecoder(16, (1, 8, 8), parameters=2)(torch.randn(3, 2, 16)).shape
        torch.Size([3, 2, 1, 8, 8, 2])
    """

    def __init__(self, latent_dim: int, data_shape: Sequence[int], parameters: int, hidden: int = 450) -> None:
        super().__init__()
        self.channels, height, width = image_size("ResNetDecoder", data_shape)
        sizes = [halved((height, width), times) for times in range(len(STAGES) + 1)]
        maps = [*STAGES[::-1], STAGES[0]]
        first = (maps[0], *sizes[-1])
        layers: list[nn.Module] = [
            WeightNormLinear(latent_dim, hidden),
            nn.ELU(),
            WeightNormLinear(hidden, first[0] * first[1] * first[2]),
            nn.Unflatten(-1, first),
        ]
        for (inputs, outputs), size in zip(itertools.pairwise(maps), sizes[-2::-1], strict=True):
            layers += [*(_plain(inputs) for _ in range(BLOCKS - 1)), _up(inputs, outputs, size)]
        last = WeightNormConv2d(maps[-1], self.channels * parameters, init_scale=RESIDUAL_SCALE)
        self.network = nn.Sequential(*layers, nn.ELU(), last)

    def forward(self, z: Tensor) -> Tensor:
        return flatten_batch(self.network, z, 1).unflatten(-3, (self.channels, -1)).movedim(-3, -1)
