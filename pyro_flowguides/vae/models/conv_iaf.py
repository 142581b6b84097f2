"""One inverse autoregressive step on a map of latent variables, by masked convolutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_flowguides.nn.precision import at_least_float32
from pyro_flowguides.transforms.solvers import autoregressive_root
from pyro_flowguides.transforms.updates import UPDATES
from pyro_flowguides.vae.decoders import MaskedConv2d
from pyro_flowguides.vae.networks.image_shapes import flatten_batch

__all__ = ["ConvIAF"]


class ConvIAF(nn.Module):
    r"""One inverse autoregressive step on a map of latent variables, by masked convolutions.

    .. math:: y_i = e^{a_i} x_i + m_i, \qquad (a_i, m_i) \text{ a function of } x_{<i} \text{ and of the context}

    in raster order of the pixels and, within a pixel, in the order of the channels, or in the reverse of both. The
    update is the gated one of :class:`~pyro_flowguides.transforms.InverseAutoregressive`, with its bounds. The network
    has three masked 3 × 3 convolutions with ELU between them; the context is added to the output of the first. The last
    one starts at zero, and so the step starts at the identity.

    Cost: one pass of the network forward; backward a fixed-point iteration of at most C·H·W passes.

    Args:
        channels: C of the latent map.
        context_channels: channels of the context.
        width: channels of the hidden layers, at least C.
        reverse: visit pixels and channels in reverse order.

    Shapes:
        x, y, a ``(..., C, H, W)``; context ``(..., context_channels, H, W)``, with the same leading dimensions.

    Raises:
        ValueError: if ``channels`` is not positive or exceeds ``width``.

    References:
        D. Kingma, T. Salimans, R. Jozefowicz, X. Chen, I. Sutskever, M. Welling (2016). Improving variational inference
        with inverse autoregressive flow. arXiv:1606.04934.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import ConvIAF
        >>> step = ConvIAF(channels=2, context_channels=3, width=8)
        >>> y, a = step(torch.randn(5, 2, 4, 4), torch.randn(5, 3, 4, 4))
        >>> y.shape, a.shape
        (torch.Size([5, 2, 4, 4]), torch.Size([5, 2, 4, 4]))
    """

    def __init__(self, channels: int, context_channels: int, width: int = 32, *, reverse: bool = False) -> None:
        super().__init__()
        if not 1 <= channels <= width:
            raise ValueError(f"ConvIAF: width must be at least the {channels} channels of the latents, got {width}")
        self.channels, self.reverse = channels, reverse
        self.first = MaskedConv2d(channels, width, 1, 1, 1, groups=channels, strict=True)
        self.context = nn.Conv2d(context_channels, width, 3, padding=1)
        self.second = MaskedConv2d(width, width, 1, 1, 1, groups=channels)
        self.last = MaskedConv2d(width, 2 * channels, 1, 1, 1, groups=channels)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return y and the elementwise log-scale a, whose sum is the ladj."""
        event = x.shape[-3:]
        log_scale, shift = self._affine_map(x.reshape(-1, *event), self._project(context))
        log_scale, shift = log_scale.reshape(x.shape), shift.reshape(x.shape)
        return x * log_scale.exp() + shift, log_scale

    def inverse(self, y: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and the elementwise log-scale a at x."""
        event, projected = y.shape[-3:], self._project(context)

        def affine_map(x: Tensor) -> tuple[Tensor, Tensor]:
            log_scale, shift = self._affine_map(x.unflatten(-1, event), projected)
            return log_scale.flatten(1), shift.flatten(1)

        x = autoregressive_root(affine_map, y.reshape(-1, event.numel()), self.rank(event))
        log_scale, _ = affine_map(x)
        return x.reshape(y.shape), log_scale.reshape(y.shape)

    def rank(self, event: Sequence[int]) -> Tensor:
        """Return the position of each coordinate of the flattened map ``(C, H, W)`` in the order."""
        channels, height, width = event
        device = self.last.weight.device
        rank = torch.arange(channels * height * width, device=device).reshape(height * width, channels).mT.flatten()
        return len(rank) - 1 - rank if self.reverse else rank

    def _affine_map(self, x: Tensor, projected: Tensor) -> tuple[Tensor, Tensor]:
        """Return the elementwise log-scale and shift for ``x (N, C, H, W)`` and a context ``(N, width, H, W)``."""
        h = self.first(self._in_order(x)) + projected
        h = self.last(F.elu(self.second(F.elu(h))))
        log_scale, shift = UPDATES["gated"](*at_least_float32(h).chunk(2, -3))
        return self._in_order(log_scale), self._in_order(shift)

    def _project(self, context: Tensor) -> Tensor:
        """Project the context to the hidden layer: ``(..., context_channels, H, W) -> (N, width, H, W)``."""
        projected = flatten_batch(lambda maps: self.context(self._in_order(maps)), context, 3)
        return projected.reshape(-1, *projected.shape[-3:])

    def _in_order(self, x: Tensor) -> Tensor:
        """Flip channels and pixels if they are visited in reverse order; it is its own inverse."""
        return x.flip((-3, -2, -1)) if self.reverse else x
