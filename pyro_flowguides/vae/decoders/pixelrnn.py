"""PixelRNN: row LSTM and diagonal bidirectional LSTM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_flowguides.vae.decoders.autoregressive_network import AutoregressiveNetwork, Canvas, ContextProjection, Draw
from pyro_flowguides.vae.decoders.causal_conv import CachedWindow, FullMap, MaskedConv2d, shift_down

__all__ = ["DiagonalBiLSTM", "PixelRNN", "RowLSTM"]


def _lstm(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """State and cell after one step; the gates are along dimension 1."""
    output, forget, enter, content = gates.chunk(4, 1)
    cell = forget.sigmoid() * cell + enter.sigmoid() * content.tanh()
    return output.sigmoid() * cell.tanh(), cell


class RowLSTM(nn.Module):
    r"""An LSTM that goes down the rows, all columns at once.

    .. math::
        (o, f, i, g) = K_{ss} * h_{\text{row} - 1} + K_{is} * x_{\text{row}}, \qquad
        c = \sigma(f) c_{\text{row} - 1} + \sigma(i) \tanh(g), \qquad h = \sigma(o) \tanh(c)

    Both convolutions are one-dimensional; :math:`K_{ss}` reads one column on either side, :math:`K_{is}` is masked
    (mask B) and reads one column to the left. A pixel (i, j) so sees a triangle above it that widens by one column per
    row.

    Args:
        channels: of the input.
        hidden: channels of the state.
        groups: of the mask.

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
            state, cell = _lstm(gates[:, :, row] + self.from_above(state), cell)
            states.append(state)
        return torch.stack(states, -2)

    def start(self, size: int, width: int) -> _RowMemory:
        return _RowMemory(self, size, width)


class _RowMemory:
    """A row LSTM visited pixel by pixel: the states of the row above, and of this row as far as it is known."""

    def __init__(self, layer: RowLSTM, size: int, width: int) -> None:
        self.layer = layer
        self.state, self.cell = layer.from_above.weight.new_zeros(2, size, layer.hidden, width)

    def next_row(self) -> None:
        self.gates, self.above = self.layer.from_above(self.state), self.cell.clone()

    def visit(self, x: Tensor, pixel: CachedWindow) -> Tensor:
        here = slice(pixel.start, pixel.stop)
        gates = pixel.conv(self.layer.from_input, x)[..., 0, :] + self.gates[..., here]
        self.state[..., here], self.cell[..., here] = _lstm(gates, self.above[..., here])
        return self.state[..., None, here]


class DiagonalBiLSTM(nn.Module):
    r"""Two LSTMs that sweep the image along its diagonals, one from each upper corner.

    The cell at (i, j) of the first reads the states to its left and above,

    .. math::
        (o, f, i, g) = K_{\text{left}} h_{i, j-1} + K_{\text{above}} h_{i-1, j} + K_{is} x_{ij}, \qquad
        c = \sigma(f) c_{i, j-1} + \sigma(i) \tanh(g)

    the second its mirror image. The second is shifted down by one row before both are added, for its states depend on
    pixels to the right. A state so depends on the inputs of all earlier pixels and of its own. Skewing the image, row i
    by i columns, makes the cells of one diagonal a column, so that they are computed together: height + width − 1
    steps.

    Args:
        channels: of the input.
        hidden: channels of the state.
        groups: of the mask.

    Shapes:
        ``(B, channels, H, W) -> (B, hidden, H, W)``.
    """

    def __init__(self, channels: int, hidden: int, groups: int = 1) -> None:
        super().__init__()
        self.hidden = hidden
        self.from_input: Any = nn.ModuleList(MaskedConv2d(channels, 4 * hidden, groups=groups) for _ in range(2))
        self.from_before: Any = nn.ModuleList(nn.Linear(2 * hidden, 4 * hidden) for _ in range(2))

    def step(self, direction: int, gates: Tensor, before: Tensor, above: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """State and cell ``(B, hidden)`` or ``(B, hidden, H)``, channels in dimension 1."""
        joint = torch.cat([before, above], 1).movedim(1, -1)
        return _lstm(gates + self.from_before[direction](joint).movedim(-1, 1), cell)

    def sweep(self, direction: int, x: Tensor) -> Tensor:
        """One LSTM from the upper left corner over the whole map."""
        gates = _skew(self.from_input[direction](x))
        state = cell = gates.new_zeros(len(x), self.hidden, x.shape[-2])
        states = []
        for diagonal in range(gates.shape[-1]):
            above = F.pad(state, (1, -1))
            # The cells left of the image are zeros, also while the skewed rows have not begun.
            begun = torch.arange(x.shape[-2], device=x.device) <= diagonal
            state, cell = self.step(direction, gates[..., diagonal], state, above, cell)
            state, cell = state * begun, cell * begun
            states.append(state)
        return _unskew(torch.stack(states, -1), x.shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.sweep(0, x) + shift_down(self.sweep(1, x.flip(-1)).flip(-1))

    def start(self, size: int, width: int) -> _DiagonalMemory:
        return _DiagonalMemory(self, size, width)


def _skew(x: Tensor) -> Tensor:
    """Row i moved i columns to the right: ``(..., H, W) -> (..., H, H + W - 1)``."""
    height, width = x.shape[-2:]
    return F.pad(x, (0, height)).flatten(-2)[..., : height * (height + width - 1)].unflatten(-1, (height, -1))


def _unskew(x: Tensor, width: int) -> Tensor:
    """The inverse of :func:`_skew`."""
    height = x.shape[-2]
    return F.pad(x.flatten(-2), (0, height)).unflatten(-1, (height, -1))[..., :width]


class _DiagonalMemory:
    """A diagonal BiLSTM visited pixel by pixel; the LSTM from the right follows when a row is complete."""

    def __init__(self, layer: DiagonalBiLSTM, size: int, width: int) -> None:
        self.layer, self.width = layer, width
        weight = layer.from_before[0].weight
        # From the left: the states of this row, that left of the image first. From the right: those of the row above.
        self.state, self.cell = weight.new_zeros(2, size, layer.hidden, width + 1)
        self.right = weight.new_zeros(size, layer.hidden, width)
        self.inputs: list[Tensor] = [torch.empty(0)] * width
        self.first = True

    def next_row(self) -> None:
        self.above = self.state[..., 1:].clone()
        if not self.first:
            self.right = self._from_right()
        self.first = False

    def _from_right(self) -> Tensor:
        """The LSTM from the right over the row that has been completed."""
        gates = self.layer.from_input[1](torch.cat(self.inputs, -1))[..., 0, :]
        state = cell = torch.zeros_like(self.right[..., 0])
        states = []
        for column in reversed(range(self.width)):
            state, cell = self.layer.step(1, gates[..., column], state, self.right[..., column], cell)
            states.append(state)
        return torch.stack(states[::-1], -1)

    def visit(self, x: Tensor, pixel: CachedWindow) -> Tensor:
        column = pixel.start
        self.inputs[column] = x
        gates = pixel.conv(self.layer.from_input[0], x)[..., 0, 0]
        state, cell = self.layer.step(
            0, gates, self.state[..., column], self.above[..., column], self.cell[..., column]
        )
        self.state[..., column + 1], self.cell[..., column + 1] = state, cell
        return (state + self.right[..., column])[..., None, None]


class _Layer(nn.Module):
    """A recurrent layer, brought back to the width of its input by a 1×1 convolution and added to it."""

    recurrent: Any
    given: ContextProjection
    widen: MaskedConv2d

    def __init__(
        self, recurrent: type[RowLSTM | DiagonalBiLSTM], hidden: int, features: int, maps: int, groups: int
    ) -> None:
        super().__init__()
        self.given = ContextProjection(features, maps, 2 * hidden)
        self.recurrent = recurrent(2 * hidden, hidden, groups)
        self.widen = MaskedConv2d(hidden, 2 * hidden, groups=groups)


class PixelRNN(AutoregressiveNetwork):
    r"""PixelRNN: a masked 7×7 convolution, residual recurrent layers over the image, and two 1×1 layers.

    .. math:: h_{l+1} = h_l + W_l\, \mathrm{LSTM}_l(h_l + V_l c)

    With :class:`DiagonalBiLSTM` a pixel sees all earlier ones, except that the last pixel of the row above is seen from
    the last four columns only (a state from the right stands for features that do not see their own pixel); with
    :class:`RowLSTM` a triangle above it.

    Cost: the density takes ``height`` sequential steps per layer with row LSTMs, ``height + width - 1`` with diagonal
    ones, each for all pixels of a row or diagonal. :meth:`generate` runs every cell once per pixel (once per channel
    with ``groups``), the states being kept; the diagonal LSTM from the right runs over each row when it is complete.
    That is about the arithmetic of one pass for a whole image.

    Args:
        shape: ``(channels, height, width)``.
        outputs: numbers per pixel.
        recurrent: :class:`DiagonalBiLSTM` or :class:`RowLSTM`.
        hidden: channels of the states, a multiple of ``groups``; the residual path has twice as many.
        depth: number of recurrent layers.
        features, maps: context, read by every layer.
        groups: see :class:`AutoregressiveNetwork`.

    Shapes:
        x ``(B, *shape)`` -> ``(B, outputs, height, width)``.

    References:
        A. van den Oord, N. Kalchbrenner, K. Kavukcuoglu (2016). Pixel recurrent neural networks. arXiv:1601.06759.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae.decoders import PixelRNN, RowLSTM
        >>> net = PixelRNN((1, 8, 8), outputs=1, recurrent=RowLSTM, hidden=4, depth=2, features=3)
        >>> net(torch.zeros(5, 1, 8, 8), features=torch.randn(5, 3)).shape
        torch.Size([5, 1, 8, 8])
    """

    def __init__(
        self,
        shape: Sequence[int],
        outputs: int,
        *,
        recurrent: type[RowLSTM | DiagonalBiLSTM] = DiagonalBiLSTM,
        hidden: int = 18,
        depth: int = 3,
        features: int = 0,
        maps: int = 0,
        groups: int = 1,
    ) -> None:
        super().__init__(shape, outputs, features, maps, groups)
        self._check_width("hidden", hidden)
        self.first = MaskedConv2d(shape[0], 2 * hidden, 3, 3, 3, groups=groups, strict=True)
        self.layers: Any = nn.ModuleList(_Layer(recurrent, hidden, features, maps, groups) for _ in range(depth))
        self.hidden = MaskedConv2d(2 * hidden, 2 * hidden, groups=groups)
        self.last = MaskedConv2d(2 * hidden, outputs, groups=groups)

    def _at(
        self, x: Tensor, place: FullMap | CachedWindow, recurrences: Sequence[Callable[[Tensor], Tensor]]
    ) -> Tensor:
        h = place.read(self.first, x)
        for layer, recurrence in zip(self.layers, recurrences, strict=True):
            h = h + place.conv(layer.widen, recurrence(h + place.context(layer.given)))
        return place.conv(self.last, F.relu(place.conv(self.hidden, F.relu(h))))

    def evaluate(self, x: Tensor, contexts: dict[nn.Module, Tensor]) -> Tensor:
        return self._at(x, FullMap(contexts), [layer.recurrent for layer in self.layers])

    def _fill(self, canvas: Canvas, draw: Draw, contexts: dict[nn.Module, Tensor]) -> None:
        size, (height, width) = len(canvas.values), self.shape[1:]
        pixel = CachedWindow(size, height, width, contexts)
        memories = [layer.recurrent.start(size, width) for layer in self.layers]
        visits = [partial(memory.visit, pixel=pixel) for memory in memories]
        for step in self.steps():
            channels, (row, column) = step
            if column == 0 and channels.start == 0:
                for memory in memories:
                    memory.next_row()
            pixel.move(row, column, column + 1)
            canvas.put(step, draw(self._at(canvas.inputs, pixel, visits)[..., 0, 0]))
