"""PixelRNN: row LSTM and diagonal bidirectional LSTM."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_flowguides.vae.decoders.autoregressive_decoder import AutoregressiveNetwork, ContextProjection, GenerationStep
from pyro_flowguides.vae.decoders.causal_conv import MaskedConv2d, shift_down
from pyro_flowguides.vae.decoders.image_networks import CachedWindow, MapRegion

__all__ = ["DiagonalBiLSTM", "PixelRNN", "RowLSTM"]


def _lstm_cell(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Return state and cell after one step; the gates are along dimension 1."""
    output, forget, enter, content = gates.chunk(4, 1)
    cell = forget.sigmoid() * cell + enter.sigmoid() * content.tanh()
    return output.sigmoid() * cell.tanh(), cell


class RowLSTM(nn.Module):
    r"""An LSTM that runs down the rows and updates all columns at once.

    .. math::
        (o, f, i, g) = K_{ss} * h_{\text{row} - 1} + K_{is} * x_{\text{row}}, \qquad
        c = \sigma(f) c_{\text{row} - 1} + \sigma(i) \tanh(g), \qquad h = \sigma(o) \tanh(c)

    Both convolutions are one-dimensional. :math:`K_{ss}` reads one column on either side; :math:`K_{is}` is masked
    (mask B) and reads one column to the left. A pixel (i, j) thus reads a triangle above it that widens by one column
    on either side per row.

    Args:
        channels: number of channels of the input.
        hidden: number of channels of the state.
        groups: groups of the mask.

    Shapes:
        ``(B, channels, H, W) -> (B, hidden, H, W)``.
    """

    def __init__(self, channels: int, hidden: int, groups: int = 1) -> None:
        super().__init__()
        self.hidden = hidden
        self.from_input = MaskedConv2d(channels, 4 * hidden, 0, 1, groups=groups)
        self.from_above = nn.Conv1d(hidden, 4 * hidden, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        gates = self.from_input(x)
        state = cell = x.new_zeros(len(x), self.hidden, x.shape[-1])
        states = []
        for row in range(x.shape[-2]):
            state, cell = _lstm_cell(gates[:, :, row] + self.from_above(state), cell)
            states.append(state)
        return torch.stack(states, -2)

    def new_cache(self, pixel: CachedWindow) -> _RowCache:
        """Return an empty cache for generation with this window."""
        return _RowCache(self, pixel)


class _RowCache:
    """The states of a row LSTM in generation: those of the row above, and of the current row up to the last visit."""

    def __init__(self, layer: RowLSTM, pixel: CachedWindow) -> None:
        self.layer, self.pixel = layer, pixel
        self.state, self.cell = layer.from_above.weight.new_zeros(2, pixel.size, layer.hidden, pixel.width)

    def next_row(self) -> None:
        self.gates, self.cell_above = self.layer.from_above(self.state), self.cell.clone()

    def __call__(self, x: Tensor) -> Tensor:
        column = slice(self.pixel.start, self.pixel.stop)
        gates = self.pixel.apply(self.layer.from_input, x)[..., 0, :] + self.gates[..., column]
        self.state[..., column], self.cell[..., column] = _lstm_cell(gates, self.cell_above[..., column])
        return self.state[..., None, column]


class DiagonalBiLSTM(nn.Module):
    r"""Two LSTMs that sweep the image along its diagonals, one from each upper corner.

    The cell at (i, j) of the first LSTM reads the states to its left and above it:

    .. math::
        (o, f, i, g) = K_{\text{left}} h_{i, j-1} + K_{\text{above}} h_{i-1, j} + K_{is} x_{ij}, \qquad
        c = \sigma(f) c_{i, j-1} + \sigma(i) \tanh(g)

    The second is its mirror image. Its states depend on pixels to the right, so they are shifted down by one row before
    both are added. A state thus depends on the inputs of its own pixel and of all earlier ones. Skewing the image, row
    i by i columns, turns each diagonal into a column, whose cells are computed in one step: height + width − 1 steps
    in all.

    Arguments and shapes are those of :class:`RowLSTM`.
    """

    def __init__(self, channels: int, hidden: int, groups: int = 1) -> None:
        super().__init__()
        self.hidden = hidden
        from_input = nn.ModuleList(MaskedConv2d(channels, 4 * hidden, groups=groups) for _ in range(2))
        from_neighbors = nn.ModuleList(nn.Linear(2 * hidden, 4 * hidden) for _ in range(2))
        self.from_input = cast("Sequence[MaskedConv2d]", from_input)
        self.from_neighbors = cast("Sequence[nn.Linear]", from_neighbors)

    def step(self, direction: int, gates: Tensor, left: Tensor, above: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """Return state and cell, ``(B, hidden)`` or ``(B, hidden, H)``, from those of the neighbors."""
        neighbors = torch.cat([left, above], 1).movedim(1, -1)
        return _lstm_cell(gates + self.from_neighbors[direction](neighbors).movedim(-1, 1), cell)

    def sweep(self, direction: int, x: Tensor) -> Tensor:
        """Run one LSTM from the upper left corner over the whole map."""
        gates = _skew(self.from_input[direction](x))
        state = cell = gates.new_zeros(len(x), self.hidden, x.shape[-2])
        states = []
        for diagonal in range(gates.shape[-1]):
            above = F.pad(state, (1, -1))
            # In the skewed map a row starts after the rows above it. Its states stay zero until then.
            started = torch.arange(x.shape[-2], device=x.device) <= diagonal
            state, cell = self.step(direction, gates[..., diagonal], state, above, cell)
            state, cell = state * started, cell * started
            states.append(state)
        return _unskew(torch.stack(states, -1), x.shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.sweep(0, x) + shift_down(self.sweep(1, x.flip(-1)).flip(-1))

    def new_cache(self, pixel: CachedWindow) -> _DiagonalCache:
        """Return an empty cache for generation with this window."""
        return _DiagonalCache(self, pixel)


def _skew(x: Tensor) -> Tensor:
    """Move row i by i columns to the right: ``(..., H, W) -> (..., H, H + W - 1)``."""
    height, width = x.shape[-2:]
    return F.pad(x, (0, height)).flatten(-2)[..., : height * (height + width - 1)].unflatten(-1, (height, -1))


def _unskew(x: Tensor, width: int) -> Tensor:
    """Invert :func:`_skew`."""
    height = x.shape[-2]
    return F.pad(x.flatten(-2), (0, height)).unflatten(-1, (height, -1))[..., :width]


class _DiagonalCache:
    """The states of a diagonal BiLSTM in generation; the LSTM from the right runs when a row is complete."""

    def __init__(self, layer: DiagonalBiLSTM, pixel: CachedWindow) -> None:
        self.layer, self.pixel = layer, pixel
        zeros = layer.from_neighbors[0].weight.new_zeros(pixel.size, layer.hidden, pixel.width + 1)
        # The LSTM from the left: states of the current row, with zeros left of the image first.
        self.state, self.cell = zeros.clone(), zeros.clone()
        # The LSTM from the right: states of the row above.
        self.right = zeros[..., 1:]
        #: The inputs of the current row, by column.
        self.inputs: dict[int, Tensor] = {}

    def next_row(self) -> None:
        self.above = self.state[..., 1:].clone()
        if not self.inputs:
            return
        gates = self.layer.from_input[1](torch.cat(list(self.inputs.values()), -1))[..., 0, :]
        state = cell = torch.zeros_like(self.right[..., 0])
        states = []
        for column in reversed(self.inputs):
            state, cell = self.layer.step(1, gates[..., column], state, self.right[..., column], cell)
            states.append(state)
        self.right = torch.stack(states[::-1], -1)

    def __call__(self, x: Tensor) -> Tensor:
        column = self.pixel.start
        self.inputs[column] = x
        gates = self.pixel.apply(self.layer.from_input[0], x)[..., 0, 0]
        neighbors = self.state[..., column], self.above[..., column], self.cell[..., column]
        state, cell = self.layer.step(0, gates, *neighbors)
        self.state[..., column + 1], self.cell[..., column + 1] = state, cell
        return (state + self.right[..., column])[..., None, None]


Recurrent: TypeAlias = RowLSTM | DiagonalBiLSTM


class _Layer(nn.Module):
    """A recurrent layer, and a 1×1 convolution back to the width of its input."""

    def __init__(self, recurrent: type[Recurrent], hidden: int, features: int, maps: int, groups: int) -> None:
        super().__init__()
        self.context_projection = ContextProjection(features, maps, 2 * hidden)
        self.recurrent = recurrent(2 * hidden, hidden, groups)
        self.widen = MaskedConv2d(hidden, 2 * hidden, groups=groups)


class PixelRNN(AutoregressiveNetwork):
    r"""PixelRNN: a masked 7×7 convolution, residual recurrent layers over the image, and two 1×1 layers.

    .. math:: h_{l+1} = h_l + W_l\, \mathrm{LSTM}_l(h_l + V_l c)

    With :class:`DiagonalBiLSTM` a pixel reads all earlier ones, with one exception: the last pixel of the row above
    reaches only the last four columns, because the LSTM from the right carries features that exclude their own pixel.
    With :class:`RowLSTM` a pixel reads a triangle above it.

    Cost: the density takes ``height`` sequential steps per layer with row LSTMs, ``height + width - 1`` with diagonal
    ones, each for all pixels of a row or diagonal. :meth:`generate` runs every cell once per pixel; the diagonal LSTM
    from the right runs over each row when it is complete.

    Args:
        recurrent: :class:`DiagonalBiLSTM` or :class:`RowLSTM`.
        hidden: channels of the states, a multiple of ``groups``; the residual path has twice as many.
        depth: number of recurrent layers.

    The arguments ``features``, ``maps``, ``groups`` and the shapes are those of :class:`AutoregressiveNetwork`.

    References:
        A. van den Oord, N. Kalchbrenner, K. Kavukcuoglu (2016). Pixel recurrent neural networks. arXiv:1601.06759.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import PixelRNN, RowLSTM
        >>> net = PixelRNN((1, 8, 8), outputs=1, recurrent=RowLSTM, hidden=4, depth=2, features=3)
        >>> net(torch.zeros(5, 1, 8, 8), features=torch.randn(5, 3)).shape
        torch.Size([5, 1, 8, 8])
    """

    def __init__(
        self,
        shape: Sequence[int],
        outputs: int,
        *,
        recurrent: type[Recurrent] = DiagonalBiLSTM,
        hidden: int = 18,
        depth: int = 3,
        **options: int,
    ) -> None:
        super().__init__(shape, outputs, **options)
        groups = self.groups
        self._check_width("hidden", hidden)
        self.first = MaskedConv2d(shape[0], 2 * hidden, 3, 3, 3, groups=groups, strict=True)
        layers = nn.ModuleList(_Layer(recurrent, hidden, self.features, self.maps, groups) for _ in range(depth))
        self.layers = cast("Iterable[_Layer]", layers)
        self.hidden = MaskedConv2d(2 * hidden, 2 * hidden, groups=groups)
        self.last = MaskedConv2d(2 * hidden, outputs, groups=groups)

    def _outputs(self, x: Tensor, region: MapRegion, recurrences: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
        """Return the outputs in a region of the image, given the recurrence of every layer there."""
        h = region.apply_to_map(self.first, x)
        for layer, recurrence in zip(self.layers, recurrences, strict=True):
            h = h + region.apply(layer.widen, recurrence(h + region.context(layer.context_projection)))
        return region.apply(self.last, F.relu(region.apply(self.hidden, F.relu(h))))

    def evaluate(self, x: Tensor, contexts: dict[nn.Module, Tensor]) -> Tensor:
        return self._outputs(x, MapRegion(contexts), [layer.recurrent for layer in self.layers])

    def outputs_by_step(self, x: Tensor, contexts: dict[nn.Module, Tensor]) -> Iterator[tuple[GenerationStep, Tensor]]:
        pixel = CachedWindow(len(x), self.shape[1:], contexts)
        caches = [layer.recurrent.new_cache(pixel) for layer in self.layers]
        for _, steps in itertools.groupby(self.steps(), lambda step: step.position[0]):
            for cache in caches:
                cache.next_row()
            for step in steps:
                pixel.move_to_pixel(*step.position)
                yield step, self._outputs(x, pixel, caches)[..., 0, 0]
