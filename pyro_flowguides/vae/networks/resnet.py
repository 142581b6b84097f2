"""Residual convolutional networks with weight normalization: the encoder and decoder of Kingma et al. (2016)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor, nn

from pyro_flowguides.vae.networks.image_shapes import as_image_shape, flatten_batch, halve_size, params_last
from pyro_flowguides.vae.networks.residual_blocks import RESIDUAL_SCALE, ResidualBlock
from pyro_flowguides.vae.networks.weight_norm import WeightNormConv2d, WeightNormLinear

__all__ = ["ResNetDecoder", "ResNetEncoder"]

#: Feature maps of the stages, in the order of the encoder.
STAGE_WIDTHS = (16, 32, 32)
#: Residual blocks per stage.
BLOCKS_PER_STAGE = 2


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

    References:
        D. Kingma et al. (2016). arXiv:1606.04934.

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
