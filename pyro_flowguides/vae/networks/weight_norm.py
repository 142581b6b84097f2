"""Weight-normalized layers and their data-dependent initialization."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["WeightNormConv2d", "WeightNormLinear", "data_dependent_initialization"]


class _WeightNorm(nn.Module):
    """A linear layer whose weight is a direction times a gain per output."""

    weight: Tensor
    bias: Any
    gain: nn.Parameter
    init_scale: float
    #: From input, weight and bias to the output of the layer.
    apply_weight: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    #: Mean and standard deviation of each output of a batch.
    _over_all_but_channels: Callable[[Tensor], tuple[Tensor, Tensor]]

    def _add_gain(self, init_scale: float) -> None:
        self.init_scale = init_scale
        self.gain = nn.Parameter(self.weight.detach().flatten(1).norm(dim=1))

    def _direction(self) -> Tensor:
        """What is normalized: a layer with a mask multiplies it in here."""
        return self.weight

    def normalized_weight(self) -> Tensor:
        """The weight that the layer applies."""
        v = self._direction()
        factor = self.gain / v.flatten(1).norm(dim=1).clamp(min=torch.finfo(v.dtype).tiny)
        return v * factor.view(-1, *[1] * (v.dim() - 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_weight(x, self.normalized_weight(), self.bias)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Choose gain and bias so that the outputs for this batch have mean 0 and deviation ``init_scale``."""
        self.gain.fill_(1)
        mean, std = self._over_all_but_channels(self.apply_weight(x, self.normalized_weight(), None))
        gain = self.init_scale / torch.where(std > 1e-6, std, 1.0)  # an output that never varies stays as it is
        self.gain.copy_(gain)
        self.bias.copy_(-mean * gain)


class WeightNormLinear(_WeightNorm, nn.Linear):
    r"""A linear layer with weight normalization.

    .. math:: y = g \odot \frac{V}{\lVert V \rVert} x + b

    the norms being those of the rows. Until :func:`data_dependent_initialization` it starts like
    :class:`torch.nn.Linear`.

    Args:
        in_features, out_features: widths.
        init_scale: standard deviation of the outputs after the initialization.

    Shapes:
        ``(..., in_features) -> (..., out_features)``.

    References:
        T. Salimans, D. Kingma (2016). Weight normalization. arXiv:1602.07868.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae.networks import WeightNormLinear, data_dependent_initialization
        >>> layer, x = WeightNormLinear(3, 2), torch.randn(100, 3)
        >>> with data_dependent_initialization(layer):
        ...     y = layer(x)
        >>> torch.allclose(y.std(0), torch.ones(2), atol=1e-5)
        True
    """

    def __init__(self, in_features: int, out_features: int, *, init_scale: float = 1.0) -> None:
        super().__init__(in_features, out_features)
        self._add_gain(init_scale)

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def _over_all_but_channels(self, y: Tensor) -> tuple[Tensor, Tensor]:
        rows = y.flatten(0, -2)
        return rows.mean(0), rows.std(0)


class WeightNormConv2d(_WeightNorm, nn.Conv2d):
    r"""A convolution with weight normalization; the norms are those of the filters.

    Args:
        in_channels, out_channels, kernel_size: as for :class:`torch.nn.Conv2d`; the padding keeps the size (divided by
            the stride, rounded up).
        stride: 1 or 2.
        init_scale: standard deviation of the outputs after the initialization.

    Shapes:
        ``(N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride))``.

    References:
        T. Salimans, D. Kingma (2016). Weight normalization. arXiv:1602.07868.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae.networks import WeightNormConv2d
        >>> WeightNormConv2d(1, 4, 3, stride=2)(torch.randn(5, 1, 7, 8)).shape
        torch.Size([5, 4, 4, 4])
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, *, init_scale: float = 1.0
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2)
        self._add_gain(init_scale)

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)

    def _over_all_but_channels(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return y.mean((0, 2, 3)), y.std((0, 2, 3))


@contextmanager
def data_dependent_initialization(module: nn.Module) -> Iterator[None]:
    """Within this context the weight-normalized layers of a module initialize themselves at each call, before it.

    Run the module once on a batch of data. Layers are reached in the order of the calls, so that each sees its inputs
    as initialized layers before it produce them.

    Args:
        module: any; without weight-normalized layers nothing happens.

    References:
        T. Salimans, D. Kingma (2016). Weight normalization. arXiv:1602.07868.
    """

    def initialize(layer: _WeightNorm, inputs: tuple[Any, ...]) -> None:
        layer.initialize(*inputs)

    layers = [layer for layer in module.modules() if isinstance(layer, _WeightNorm)]
    hooks = [layer.register_forward_pre_hook(initialize) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
