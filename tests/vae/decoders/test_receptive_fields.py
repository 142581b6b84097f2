"""Receptive fields: which earlier values the outputs at a position depend on, compared with the documentation."""

import itertools

import pytest
import torch

from pyro_flowguides.vae import (
    AgnosticMADE,
    DiagonalBiLSTM,
    GatedPixelCNN,
    PixelCNN,
    PixelCNNPlusPlus,
    RowLSTM,
    WaveNet,
)
from pyro_flowguides.vae.decoders.causal_conv import split_reach
from tests.vae.decoders.cases import build_case, find_dependence, rank_values


def offsets(dependence, position):
    """Return the offsets of all pixels that any of the outputs at a position depends on."""
    pixels = dependence[(slice(None), *position)].any(0).any(0).nonzero()
    return {tuple(offset) for offset in (pixels - torch.tensor(position)).tolist()}


def box(reach):
    """Return the offsets of all earlier pixels within a reach."""
    above = {(-d, s) for d in range(1, reach + 1) for s in range(-reach, reach + 1)}
    return above | {(0, -s) for s in range(1, reach + 1)}


@pytest.mark.parametrize(("reach", "depth"), [(1, 1), (1, 3), (2, 1), (3, 2), (3, 3), (4, 6)])
def test_gated_pixelcnn_reads_the_whole_box_and_nothing_else(reach, depth):
    network = GatedPixelCNN((1, 2 * reach + 1, 2 * reach + 3), 1, filters=4, reach=reach, depth=depth).double()
    center = (reach + 1, reach + 1)
    assert offsets(find_dependence(network), center) == box(reach)


@pytest.mark.parametrize(("reach", "depth"), [(1, 1), (1, 3), (2, 2), (3, 3), (3, 2), (4, 6)])
def test_pixelcnn_reads_the_box_except_for_the_blind_spot(reach, depth):
    """A kernel of reach r reads r columns to the right in the rows above: with r = 1, d rows up allow d columns."""
    network = PixelCNN((1, 2 * reach + 1, 2 * reach + 3), 1, filters=6, reach=reach, depth=depth).double()
    center = (reach + 1, reach + 1)
    expected = {(0, 0)}
    for layer, layer_reach in enumerate(split_reach("PixelCNN", reach, depth)):
        kernel = box(layer_reach) | (set() if layer == 0 else {(0, 0)})
        expected = {(a + c, b + d) for a, b in expected for c, d in kernel}
    assert offsets(find_dependence(network), center) == expected
    if depth >= reach:
        rows, columns = range(reach + 1), range(-reach, reach + 1)
        assert expected == {(-d, s) for d, s in itertools.product(rows, columns) if s <= d and (d, s) != (0, 0)}


def test_default_pixelcnn_has_six_masked_convolutions_and_four_pointwise_blocks():
    network = PixelCNN((1, 28, 28), 1)
    kernels = [tuple(network.first.kernel_size), *(tuple(block.conv.kernel_size) for block in network.blocks)]
    assert kernels == [(2, 3)] * 6 + [(1, 1)] * 4
    assert network.first.out_channels == 12


@pytest.mark.parametrize("blocks", [1, 2])
def test_pixelcnnpp_with_one_level_reads_the_documented_rows(blocks):
    reach = 3 + 4 * blocks
    network = PixelCNNPlusPlus((1, reach + 3, 3), 1, filters=4, blocks=blocks, levels=1).double().eval()
    rows = {row for row, _ in offsets(find_dependence(network), (reach + 1, 1))}
    assert rows == set(range(-reach, 1))


def test_pixelcnnpp_has_no_blind_spot_within_reach():
    """In an image no larger than the reach, a pixel reads all earlier ones."""
    network = PixelCNNPlusPlus((1, 4, 4), 1, filters=6, blocks=1, levels=1).double().eval()
    expected = {(i - 3, j - 2) for i in range(4) for j in range(4) if (i, j) < (3, 2)}
    assert offsets(find_dependence(network), (3, 2)) == expected


def test_diagonal_pixelrnn_reads_everything_earlier():
    """The exception is the last pixel of the row above, which only the first convolution reads, three columns wide."""
    network = build_case("diagonal")
    dependence, (height, width) = find_dependence(network), network.shape[1:]
    pixels = list(itertools.product(range(height), range(width)))
    for i, j in pixels:
        earlier = {pixel for pixel in pixels if pixel < (i, j)}
        if width - 1 - j > 3:
            earlier -= {(i - 1, width - 1)}
        assert offsets(dependence, (i, j)) == {(row - i, column - j) for row, column in earlier}


def pixels_read(layer, shape, position):
    """Return the pixels that the state of a recurrent layer at a position depends on."""
    x = torch.randn(1, 1, *shape, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x)[(0, slice(None), *position)], x)
    return {tuple(pixel) for pixel in (jacobian != 0)[:, 0, 0].any(0).nonzero().tolist()}


def test_diagonal_lstm_reads_everything_up_to_its_own_pixel():
    expected = {(i, j) for i in range(4) for j in range(5) if (i, j) <= (2, 2)}
    assert pixels_read(DiagonalBiLSTM(1, 2).double(), (4, 5), (2, 2)) == expected


def test_row_lstm_reads_a_triangle():
    """It reads one column to the left in its own row, and one more column on either side in every row above."""
    expected = {(3 - d, j) for d in range(4) for j in range(4 - d - 1, 4 + d + 1)}
    assert pixels_read(RowLSTM(1, 2).double(), (4, 9), (3, 4)) == expected


@pytest.mark.parametrize("dilations", [[1], [1, 2, 4], [4, 2, 1], [1, 1, 3]])
def test_wavenet_reads_the_sums_of_its_dilations(dilations):
    network = WaveNet((1, 14), 2, dilations=dilations, residual=4, hidden=4, skip=4).double()
    delays = {-offset for (offset,) in offsets(find_dependence(network), (13,))}
    sums = {1 + sum(subset) for n in range(len(dilations) + 1) for subset in itertools.combinations(dilations, n)}
    assert delays == sums
    assert network.receptive_field == max(sums)


@pytest.mark.parametrize("hidden_dims", [[60], [60, 60]])
def test_every_ordering_of_made_uses_the_earlier_values(hidden_dims):
    """With wide layers an output reads almost all earlier values of its ordering, and orderings differ."""
    network = AgnosticMADE((1, 3, 4), 1, hidden_dims=hidden_dims, orderings=4).double()
    torch.nn.init.normal_(network.net.weights[-1])
    orders = []
    for number in range(4):
        member = network.member(number)
        dependence = find_dependence(member)[0].flatten(2).flatten(0, 1)
        ranks = rank_values(member).flatten()
        earlier = ranks[:, None] > ranks
        assert not (dependence & ~earlier).any()
        assert dependence.sum() >= 0.8 * earlier.sum()
        orders.append(tuple(ranks.tolist()))
    assert len(set(orders)) == 4
