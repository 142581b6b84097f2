"""WaveNet: dilated causal convolutions for sequences."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_flowguides.vae.decoders.autoregressive_decoder import AutoregressiveNetwork, ContextProjection, GenerationStep

__all__ = ["WaveNet"]


class _Layer(nn.Module):
    """One gated layer; its causal convolution of kernel size 2 is a linear map of the pair (earlier, current)."""

    def __init__(self, residual: int, hidden: int, skip: int, features: int, maps: int, *, last: bool) -> None:
        super().__init__()
        self.pair = nn.Conv1d(2 * residual, 2 * hidden, 1)
        self.context_projection = ContextProjection(features, maps, 2 * hidden, spatial_dims=1)
        self.residual = None if last else nn.Conv1d(hidden, residual, 1)
        self.skip = nn.Conv1d(hidden, skip, 1)

    def forward(self, h: Tensor, earlier: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        signal, gate = (self.pair(torch.cat([earlier, h], 1)) + context).chunk(2, 1)
        gated = signal.tanh() * gate.sigmoid()
        return h if self.residual is None else h + self.residual(gated), self.skip(gated)


class WaveNet(AutoregressiveNetwork):
    r"""WaveNet: gated, dilated causal convolutions with residual and skip connections, for sequences.

    .. math::
        z_l = \tanh(W_l * h_l + V_l c) \odot \sigma(W'_l * h_l + V'_l c), \qquad h_{l+1} = h_l + R_l z_l, \qquad
        \theta = f\big(\textstyle\sum_l S_l z_l\big)

    :math:`W_l` has kernel size 2 and dilation :math:`d_l`. The parameters at time t read x at the times
    :math:`t - 1, \dots, t - 1 - \sum_l d_l`; all of them if the dilations are 1, 2, 4, …. Every layer reads the context
    c. The channels of one time step are drawn together.

    Cost: that of :class:`AutoregressiveNetwork`. :meth:`generate` keeps a queue of the last :math:`d_l` inputs of every
    layer, so that a step costs one application of every kernel, whatever the length of the sequence.

    Args:
        dilations: dilations of the layers.
        residual, hidden, skip: channels of the residual path, of the gates and of the skip path.

    The arguments ``features``, ``maps`` and the shapes are those of :class:`AutoregressiveNetwork`.

    References:
        A. van den Oord et al. (2016). WaveNet: a generative model for raw audio. arXiv:1609.03499.
        T. Le Paine et al. (2016). Fast Wavenet generation algorithm. arXiv:1611.09482.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import WaveNet
        >>> net = WaveNet((1, 30), outputs=2, dilations=[1, 2, 4], features=3)
        >>> net.receptive_field, net(torch.zeros(5, 1, 30), features=torch.randn(5, 3)).shape
        (8, torch.Size([5, 2, 30]))
    """

    supported_spatial_dims = (1,)

    def __init__(
        self,
        shape: Sequence[int],
        outputs: int,
        *,
        dilations: Sequence[int] = (1, 2, 4, 8, 16),
        residual: int = 32,
        hidden: int = 32,
        skip: int = 64,
        **options: int,
    ) -> None:
        super().__init__(shape, outputs, groups=1, **options)
        if not dilations or min(dilations) < 1:
            raise ValueError(f"WaveNet: dilations must be positive, got {list(dilations)}")
        self.dilations = tuple(dilations)
        self.first = nn.Conv1d(shape[0], residual, 1)
        layers = nn.ModuleList(
            _Layer(residual, hidden, skip, self.features, self.maps, last=number == len(dilations) - 1)
            for number in range(len(dilations))
        )
        self.layers = cast("Sequence[_Layer]", layers)
        self.head = nn.Sequential(nn.ReLU(), nn.Conv1d(skip, skip, 1), nn.ReLU(), nn.Conv1d(skip, outputs, 1))

    @property
    def receptive_field(self) -> int:
        """The number of earlier time steps that the parameters at one time read."""
        return 1 + sum(self.dilations)

    def _outputs(
        self, previous: Tensor, delays: Sequence[Callable[[Tensor], Tensor]], contexts: Mapping[nn.Module, Tensor]
    ) -> Tensor:
        """Return the outputs, given the data of the previous time step, and functions that delay the layers' inputs."""
        h, skips = self.first(previous), []
        for layer, delay in zip(self.layers, delays, strict=True):
            h, skip = layer(h, delay(h), contexts[layer.context_projection])
            skips.append(skip)
        return self.head(torch.stack(skips).sum(0))

    def evaluate(self, x: Tensor, contexts: dict[nn.Module, Tensor]) -> Tensor:
        return self._outputs(_shift(1, x), [partial(_shift, dilation) for dilation in self.dilations], contexts)

    def outputs_by_step(self, x: Tensor, contexts: dict[nn.Module, Tensor]) -> Iterator[tuple[GenerationStep, Tensor]]:
        start = x.new_zeros(len(x), self.first.out_channels, 1)
        delays = [partial(_exchange, deque([start] * dilation)) for dilation in self.dilations]
        previous = torch.zeros_like(x[..., :1])
        for step in self.steps():
            now = slice(step.position[0], step.position[0] + 1)
            here = {layer: c[..., now] if c.shape[-1] > 1 else c for layer, c in contexts.items()}
            yield step, self._outputs(previous, delays, here)[..., 0]
            previous = x[..., now]


def _shift(steps: int, x: Tensor) -> Tensor:
    """Delay a series by some time steps, and fill the start with zeros."""
    return F.pad(x, (steps, 0))[..., : x.shape[-1]]


def _exchange(queue: deque[Tensor], h: Tensor) -> Tensor:
    """Put the newest element into a queue, and return the oldest one."""
    queue.append(h)
    return queue.popleft()
