"""Weight-normalized layers and their data-dependent initialization."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["WeightNorm", "WeightNormConv2d", "WeightNormLinear", "data_dependent_initialization"]


class WeightNorm(nn.Module):
    """A mixin that normalizes the weight of a linear layer or a convolution and scales every output by a gain.

    Args:
        *sizes, **options: those of the layer.
        init_scale: standard deviation of the outputs after the data-dependent initialization.
    """

    weight: Tensor
    bias: nn.Parameter
    #: From input, weight and bias to the output of the layer.
    apply_weight: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def __init__(self, *sizes: int, init_scale: float = 1.0, **options: int) -> None:
        super().__init__(*sizes, **options)
        self.init_scale = init_scale
        self.gain = nn.Parameter(self.weight.detach().flatten(1).norm(dim=1))

    def unnormalized_weight(self) -> Tensor:
        """Return the weight before normalization, with any mask applied."""
        return self.weight

    def effective_weight(self) -> Tensor:
        """Return the weight that the layer applies."""
        v = self.unnormalized_weight()
        factor = self.gain / v.flatten(1).norm(dim=1).clamp(min=torch.finfo(v.dtype).tiny)
        return v * factor.view(-1, *[1] * (v.dim() - 1))

    def output_moments(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of each output over the batch and, for images, over all pixels."""
        return y.mean((0, 2, 3)), y.std((0, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_weight(x, self.effective_weight(), self.bias)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set gain and bias so that the outputs for this batch have mean 0 and standard deviation ``init_scale``."""
        self.gain.fill_(1)
        mean, std = self.output_moments(self.apply_weight(x, self.effective_weight(), None))
        gain = self.init_scale / torch.where(std > 1e-6, std, 1.0)  # a constant output is only centered
        self.gain.copy_(gain)
        self.bias.copy_(-mean * gain)


class WeightNormLinear(WeightNorm, nn.Linear):
    r"""A linear layer with weight normalization.

    .. math:: y = g \odot \frac{V}{\lVert V \rVert} x + b

    The norms are those of the rows. Before :func:`data_dependent_initialization` the layer equals a
    :class:`torch.nn.Linear` with its default initialization.

    Args:
        in_features, out_features: widths.
        init_scale: standard deviation of the outputs after the initialization.

    Shapes:
        ``(..., in_features) -> (..., out_features)``.

    References:
        T. Salimans, D. Kingma (2016). Weight normalization. arXiv:1602.07868.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import WeightNormLinear, data_dependent_initialization
        >>> layer, x = WeightNormLinear(3, 2), torch.randn(100, 3)
        >>> with data_dependent_initialization(layer):
        ...     y = layer(x)
        >>> torch.allclose(y.std(0), torch.ones(2), atol=1e-5)
        True
    """

    def __init__(self, in_features: int, out_features: int, *, init_scale: float = 1.0) -> None:
        super().__init__(in_features, out_features, init_scale=init_scale)

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def output_moments(self, y: Tensor) -> tuple[Tensor, Tensor]:
        rows = y.flatten(0, -2)
        return rows.mean(0), rows.std(0)


class WeightNormConv2d(WeightNorm, nn.Conv2d):
    r"""A convolution with weight normalization as in :class:`WeightNormLinear`; the norms are those of the filters.

    Args:
        in_channels, out_channels, kernel_size: as for :class:`torch.nn.Conv2d`; the padding keeps the size (divided by
            the stride, rounded up).
        stride: 1 or 2.
        init_scale: standard deviation of the outputs after the initialization.

    Shapes:
        ``(N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride))``.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import WeightNormConv2d
        >>> WeightNormConv2d(1, 4, 3, stride=2)(torch.randn(5, 1, 7, 8)).shape
        torch.Size([5, 4, 4, 4])
    """

    bias: nn.Parameter

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, *, init_scale: float = 1.0
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, kernel_size // 2, init_scale=init_scale)

    def apply_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)


@contextmanager
def data_dependent_initialization(module: nn.Module) -> Iterator[None]:
    """Initialize the weight-normalized layers of a module from the data of the calls made within this context.

    Run the module once on a batch. Each layer is initialized immediately before its own call, so that its inputs come
    from layers that are initialized already. Other layers are left unchanged.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, WeightNorm)]
    hooks = [layer.register_forward_pre_hook(lambda layer, inputs: layer.initialize(*inputs)) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
