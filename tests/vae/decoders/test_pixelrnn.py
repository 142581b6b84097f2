"""The diagonal LSTM, compared with its recurrence evaluated pixel by pixel."""

import pytest
import torch

from pyro_flowguides.vae import DiagonalBiLSTM


def sweep_by_pixel(layer, direction, x):
    """Run one LSTM from the upper left corner, one cell at a time."""
    size, _, height, width = x.shape
    gates = layer.from_input[direction](x)
    zero = x.new_zeros(size, layer.hidden)
    states, cells = {}, {}
    for i in range(height):
        for j in range(width):
            left, above = states.get((i, j - 1), zero), states.get((i - 1, j), zero)
            cell = cells.get((i, j - 1), zero)
            states[i, j], cells[i, j] = layer.step(direction, gates[..., i, j], left, above, cell)
    return torch.stack([torch.stack([states[i, j] for j in range(width)], -1) for i in range(height)], -2)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (4, 1), (3, 5), (5, 3)])
def test_diagonal_sweeps_equal_the_recurrence(shape):
    """The second LSTM starts from the upper right corner, and its states are shifted down by one row."""
    layer, x = DiagonalBiLSTM(2, 3).double(), torch.randn(2, 2, *shape, dtype=torch.float64)
    left, right = sweep_by_pixel(layer, 0, x), sweep_by_pixel(layer, 1, x.flip(-1)).flip(-1)
    torch.testing.assert_close(layer.sweep(0, x), left)
    torch.testing.assert_close(layer(x)[..., :1, :], left[..., :1, :])
    torch.testing.assert_close(layer(x)[..., 1:, :], left[..., 1:, :] + right[..., :-1, :])
