"""Autoregressive decoders: what an output depends on, by autograd, and generation with caches against full passes."""

import functools
import itertools
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pyro_flowguides.vae.decoders import (
    AgnosticMADE,
    DiagonalBiLSTM,
    GatedPixelCNN,
    MaskedConv2d,
    PixelCNN,
    PixelCNNPlusPlus,
    PixelRNN,
    RowLSTM,
    WaveNet,
)
from pyro_flowguides.vae.decoders.causal_conv import WeightNormMaskedConv2d, WeightNormPaddedConv2d, spread
from pyro_flowguides.vae.decoders.pixelrnn import _skew, _unskew
from pyro_flowguides.vae.networks import data_dependent_initialization

CONTEXT = {"features": 3, "maps": 2}
GREY, COLOR, SERIES = (1, 5, 7), (3, 4, 5), (2, 17)

#: name -> network; every one small, with features, and with maps where it takes them.
CASES = {
    "pixelcnn": lambda: PixelCNN(GREY, 2, filters=5, reach=3, depth=5, **CONTEXT),
    "pixelcnn, color": lambda: PixelCNN(COLOR, 6, filters=12, reach=2, depth=3, groups=3, **CONTEXT),
    "gated": lambda: GatedPixelCNN(GREY, 2, filters=4, reach=3, depth=2, **CONTEXT),
    "gated, color": lambda: GatedPixelCNN(COLOR, 6, filters=12, reach=2, depth=3, groups=3, **CONTEXT),
    "gated, one channel after the other": lambda: GatedPixelCNN((2, 5, 1), 2, filters=12, reach=2, depth=2, groups=2),
    "pixelcnn++, one level": lambda: PixelCNNPlusPlus(COLOR, 4, filters=4, blocks=1, levels=1, **CONTEXT),
    "pixelcnn++, two levels": lambda: PixelCNNPlusPlus((1, 6, 4), 4, filters=4, blocks=2, levels=2, **CONTEXT),
    "pixelcnn++, three levels": lambda: PixelCNNPlusPlus((3, 8, 4), 4, filters=4, blocks=1, levels=3, **CONTEXT),
    "row lstm": lambda: PixelRNN(GREY, 2, recurrent=RowLSTM, hidden=5, depth=2, **CONTEXT),
    "row lstm, color": lambda: PixelRNN(COLOR, 6, recurrent=RowLSTM, hidden=6, depth=2, groups=3, **CONTEXT),
    "diagonal": lambda: PixelRNN(GREY, 2, recurrent=DiagonalBiLSTM, hidden=5, depth=2, **CONTEXT),
    "diagonal, color": lambda: PixelRNN(COLOR, 6, recurrent=DiagonalBiLSTM, hidden=6, depth=2, groups=3, **CONTEXT),
    "wavenet": lambda: WaveNet(SERIES, 3, dilations=[1, 2, 4], residual=4, hidden=3, skip=5, **CONTEXT),
    "wavenet, gaps": lambda: WaveNet((1, 17), 3, dilations=[3, 5], residual=4, hidden=3, skip=5, **CONTEXT),
    "made": lambda: AgnosticMADE((2, 3, 3), 4, hidden_dims=[40], orderings=1, features=3),
    "made, series": lambda: AgnosticMADE((1, 9), 2, hidden_dims=[40, 40], orderings=1, features=3),
    "made, a random ordering": lambda: (
        AgnosticMADE((2, 3, 3), 4, hidden_dims=[40, 40], orderings=8, features=3).double().member(5)
    ),
}


def build(name):
    """In double precision, in evaluation mode, at weights large enough that everything that may matter does."""
    network = CASES[name]().double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 10
            parameter.copy_(torch.randn_like(parameter) * (2 / fan_in) ** 0.5)
    return network


def context(network, size):
    features = torch.randn(size, network.features, dtype=torch.float64) if network.features else None
    maps = torch.randn(size, network.maps, *network.shape[1:], dtype=torch.float64) if network.maps else None
    return {"features": features, "maps": maps}


def dependence(network, points=16):
    """Which values the numbers at each place depend on: booleans ``(outputs, *space, *shape)``, at several points."""
    x, given = torch.randn(points, *network.shape, dtype=torch.float64, requires_grad=True), context(network, points)
    numbers = network(x, **given).sum(0).flatten()  # a datum of the batch does not depend on another one
    directions = torch.eye(len(numbers), dtype=torch.float64)
    (jacobian,) = torch.autograd.grad(numbers, x, directions, is_grads_batched=True)
    return (jacobian != 0).any(1).reshape(network.outputs, *network.shape[1:], *network.shape)


@functools.cache
def case_dependence(name):
    return dependence(build(name))


def rank(network):
    """At which step each value is drawn, ``shape``."""
    ranks = torch.full(network.shape, -1)
    for number, (channels, position) in enumerate(network.steps()):
        assert (ranks[(channels, *position)] == -1).all()
        ranks[(channels, *position)] = number
    assert (ranks >= 0).all()
    return ranks


@pytest.mark.parametrize("name", CASES)
def test_no_output_depends_on_the_value_itself_or_on_later_ones(name):
    """The numbers of channel k (those with index k modulo the channels) before every value of the step of channel k."""
    network = build(name)
    found, ranks = case_dependence(name), rank(network)
    channels = network.shape[0]
    for output, position in itertools.product(
        range(network.outputs), itertools.product(*map(range, network.shape[1:]))
    ):
        own = ranks[(output % channels, *position)]
        assert not found[(output, *position)][ranks >= own].any()


@pytest.mark.parametrize("name", CASES)
def test_every_output_but_the_first_depends_on_something(name):
    network = build(name)
    found, ranks = case_dependence(name), rank(network)
    depends = found.flatten(len(network.shape)).any(-1)
    first = torch.stack([ranks[output % network.shape[0]] == 0 for output in range(network.outputs)])
    assert depends[~first].all()


# -- receptive fields --------------------------------------------------------------------------------------------------


def offsets(found, position):
    """Where the numbers at a position look: the offsets of all pixels that matter to any of them."""
    pixels = found[(slice(None), *position)].any(0).any(0).nonzero()
    return {tuple(offset) for offset in (pixels - torch.tensor(position)).tolist()}


def box(reach):
    above = {(-d, s) for d in range(1, reach + 1) for s in range(-reach, reach + 1)}
    return above | {(0, -s) for s in range(1, reach + 1)}


@pytest.mark.parametrize(("reach", "depth"), [(1, 1), (1, 3), (2, 1), (3, 2), (3, 3), (4, 6)])
def test_gated_pixelcnn_sees_the_whole_box_and_nothing_else(reach, depth):
    network = GatedPixelCNN((1, 2 * reach + 1, 2 * reach + 3), 1, filters=4, reach=reach, depth=depth).double()
    center = (reach + 1, reach + 1)
    assert offsets(dependence(network), center) == box(reach)


@pytest.mark.parametrize(("reach", "depth"), [(1, 1), (1, 3), (2, 2), (3, 3), (3, 2), (4, 6)])
def test_pixelcnn_sees_the_box_but_for_the_blind_spot(reach, depth):
    """Kernels of reach r see right by r in a row above; after d rows of unit steps no further than d columns."""
    network = PixelCNN((1, 2 * reach + 1, 2 * reach + 3), 1, filters=6, reach=reach, depth=depth).double()
    center = (reach + 1, reach + 1)
    expected = {(0, 0)}
    for layer, each in enumerate(spread(reach, depth)):
        seen = box(each) | (set() if layer == 0 else {(0, 0)})
        expected = {(a + c, b + d) for a, b in expected for c, d in seen}
    assert offsets(dependence(network), center) == expected
    if depth >= reach:
        rows, columns = range(reach + 1), range(-reach, reach + 1)
        assert expected == {(-d, s) for d, s in itertools.product(rows, columns) if s <= d and (d, s) != (0, 0)}


def test_the_default_is_six_masked_convolutions_and_four_pointwise_blocks():
    network = PixelCNN((1, 28, 28), 1)
    kernels = [tuple(network.first.kernel_size), *(tuple(block.conv.kernel_size) for block in network.blocks)]
    assert kernels == [(2, 3)] * 6 + [(1, 1)] * 4
    assert network.first.out_channels == 12


@pytest.mark.parametrize("blocks", [1, 2])
def test_pixelcnnpp_of_one_level_sees_the_rows_it_says(blocks):
    reach = 3 + 4 * blocks
    network = PixelCNNPlusPlus((1, reach + 3, 3), 1, filters=4, blocks=blocks, levels=1).double().eval()
    rows = {row for row, _ in offsets(dependence(network), (reach + 1, 1))}
    assert rows == set(range(-reach, 1))


def test_pixelcnnpp_has_no_blind_spot_within_reach():
    """Everything earlier of an image that is not larger than the reach."""
    network = PixelCNNPlusPlus((1, 4, 4), 1, filters=6, blocks=1, levels=1).double().eval()
    found = dependence(network)
    assert offsets(found, (3, 2)) == {(i - 3, j - 2) for i in range(4) for j in range(4) if (i, j) < (3, 2)}


def test_diagonal_lstm_sees_everything_earlier():
    """But for the end of the row above, which only the first convolution sees, from three columns away."""
    found = case_dependence("diagonal")
    height, width = CASES["diagonal"]().shape[1:]
    pixels = list(itertools.product(range(height), range(width)))
    for i, j in pixels:
        earlier = {pixel for pixel in pixels if pixel < (i, j)}
        if width - 1 - j > 3:
            earlier -= {(i - 1, width - 1)}
        assert offsets(found, (i, j)) == {(row - i, column - j) for row, column in earlier}


def test_diagonal_lstm_alone_sees_everything_up_to_its_pixel():
    layer = DiagonalBiLSTM(1, 2).double()
    x = torch.randn(1, 1, 4, 5, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x)[0, :, 2, 2], x)
    seen = {tuple(pixel) for pixel in (jacobian != 0)[:, 0, 0].any(0).nonzero().tolist()}
    assert seen == {(i, j) for i in range(4) for j in range(5) if (i, j) <= (2, 2)}


def test_row_lstm_alone_sees_a_triangle():
    """One layer on its own: the row to the left by one, and above it one column more on either side for every row."""
    layer = RowLSTM(1, 2).double()
    x = torch.randn(1, 1, 4, 9, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x)[0, :, 3, 4], x)
    seen = {tuple(pixel) for pixel in (jacobian != 0)[:, 0, 0].any(0).nonzero().tolist()}
    assert seen == {(3 - d, j) for d in range(4) for j in range(4 - d - 1, 4 + d + 1)}


@pytest.mark.parametrize("dilations", [[1], [1, 2, 4], [4, 2, 1], [1, 1, 3]])
def test_wavenet_sees_as_far_as_it_says(dilations):
    network = WaveNet((1, 14), 2, dilations=dilations, residual=4, hidden=4, skip=4).double()
    back = {-offset for (offset,) in offsets(dependence(network), (13,))}
    sums = {1 + sum(subset) for n in range(len(dilations) + 1) for subset in itertools.combinations(dilations, n)}
    assert back == sums
    assert network.receptive_field == max(sums)


@pytest.mark.parametrize("hidden_dims", [[60], [60, 60]])
def test_every_ordering_of_made_uses_the_earlier_values(hidden_dims):
    """With wide layers almost all of them; under every ordering, and different ones under different orderings."""
    network = AgnosticMADE((1, 3, 4), 1, hidden_dims=hidden_dims, orderings=4).double()
    torch.nn.init.normal_(network.net.weights[-1])
    orders = []
    for number in range(4):
        member = network.member(number)
        found, ranks = dependence(member)[0].flatten(2).flatten(0, 1), rank(member).flatten()
        earlier = ranks[:, None] > ranks
        assert not (found & ~earlier).any()
        assert found.sum() >= 0.8 * earlier.sum()
        orders.append(tuple(ranks.tolist()))
    assert len(set(orders)) == 4


# -- generation --------------------------------------------------------------------------------------------------------


class Draws:
    """Draws with noise from a list, the same for every way of generating."""

    def __init__(self, network, seed=0):
        self.network, self.generator, self.numbers = network, torch.Generator().manual_seed(seed), []

    def __call__(self, numbers):
        self.numbers.append(numbers.clone())
        channels = self.network.shape[0]
        noise = torch.randn(len(numbers), channels, generator=self.generator, dtype=numbers.dtype)
        return numbers[:, :channels].tanh() + noise


def of_step(network, step):
    """Which numbers the channels of a step are drawn from."""
    channels = network.shape[0]
    return [k for k in range(network.outputs) if k % channels in range(channels)[step[0]]]


@pytest.mark.parametrize("name", CASES)
def test_caches_change_nothing(name):
    """The same numbers at every step, to rounding, and so the same draws."""
    network = build(name)
    given = context(network, 3)
    cached, full = Draws(network), Draws(network)
    x = network.generate(cached, 3, **given, standardize=lambda x: 2 * x - 0.5)
    y = network.generate_by_full_passes(full, 3, **given, standardize=lambda x: 2 * x - 0.5)
    for step, one, other in zip(network.steps(), cached.numbers, full.numbers, strict=True):
        mine = of_step(network, step)
        torch.testing.assert_close(one[:, mine], other[:, mine], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_generation_costs_the_arithmetic_of_one_pass(name):
    """Of one pass for every step at a pixel: a single one, unless channels are drawn one after the other."""
    network = build(name)
    given = context(network, 2)

    def operations(job):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            job()
        return counter.get_total_flops()

    one_pass = operations(lambda: network(torch.zeros(2, *network.shape, dtype=torch.float64), **given))
    visits = len(list(network.steps())) // math.prod(network.shape[1:])
    assert 0 < operations(lambda: network.generate(Draws(network), 2, **given)) <= visits * one_pass


@pytest.mark.parametrize("name", CASES)
def test_generated_data_come_from_the_numbers_of_the_parallel_pass(name):
    """What the steps of generation saw is what one pass over the result gives."""
    network = build(name)
    given = context(network, 2)
    draws = Draws(network)
    x = network.generate(draws, 2, **given)
    numbers = network(x, **given)
    for step, seen in zip(network.steps(), draws.numbers, strict=True):
        mine = of_step(network, step)
        torch.testing.assert_close(numbers[(slice(None), mine, *step[1])], seen[:, mine], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_generation_leaves_no_trace(name):
    """Training mode is restored, dropout is off meanwhile, and no gradient is kept."""
    network = build(name).train()
    given = context(network, 2)
    if isinstance(network, AgnosticMADE):
        pytest.skip("an ensemble draws its ordering in training")
    first, second = (network.generate(Draws(network), 2, **given) for _ in range(2))
    assert network.training
    assert not first.requires_grad
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_context_reaches_every_output(name):
    """Global features everywhere; a map at least at its own pixel."""
    network, points = build(name), 16
    x, given = torch.randn(points, *network.shape, dtype=torch.float64), context(network, points)
    for kind, tensor in given.items():
        if tensor is None:
            continue
        numbers = network(x, **{**given, kind: tensor.requires_grad_()}).sum(0).flatten(1)
        (jacobian,) = torch.autograd.grad(
            numbers.flatten(), tensor, torch.eye(numbers.numel(), dtype=torch.float64), is_grads_batched=True
        )
        reached = (jacobian != 0).any(1).any(1).reshape(*numbers.shape, -1)
        assert (reached.any(-1) if kind == "features" else reached.diagonal(dim1=1, dim2=2)).all()


@pytest.mark.parametrize("name", ["pixelcnn++, two levels"])
def test_dropout_in_training_only(name):
    network = build(name)
    x, given = torch.randn(1, *network.shape, dtype=torch.float64), context(network, 1)
    torch.testing.assert_close(network(x, **given), network(x, **given), rtol=0, atol=0)
    network.train()
    assert not torch.equal(network(x, **given), network(x, **given))


# -- parts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (4, 1), (3, 5), (5, 3)])
def test_skew_moves_row_i_by_i_columns(shape):
    x = torch.randn(2, *shape)
    height, width = shape
    skewed = _skew(x)
    assert skewed.shape == (2, height, height + width - 1)
    for i in range(height):
        assert torch.equal(skewed[:, i, i : i + width], x[:, i])
    assert skewed.abs().gt(0).sum() == x.numel()
    assert torch.equal(_unskew(skewed, width), x)


@pytest.mark.parametrize("strict", [True, False])
def test_masks_of_the_three_channels(strict):
    """Red before green before blue, each seeing itself only under mask B; outputs cycle through the channels."""
    layer = MaskedConv2d(3, 6, 1, 1, 1, groups=3, strict=strict)
    center = layer.mask[:, :, -1, 1]
    one = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 0]], dtype=torch.bool) | (not strict) * torch.eye(3).bool()
    assert torch.equal(center, one.repeat(2, 1))
    assert layer.mask[:, :, 0].all()
    assert layer.mask[:, :, -1, 0].all()
    assert not layer.mask[:, :, -1, 2].any()


def test_every_parameter_gets_a_gradient():
    """But for masked weights; and in a network whose last layer is not at zero."""
    for name in CASES:
        network = build(name).train(False)
        x, given = torch.randn(2, *network.shape, dtype=torch.float64), context(network, 2)
        network(x, **given).square().sum().backward()
        for key, parameter in network.named_parameters():
            assert parameter.grad is not None, (name, key)


def test_weight_norm_is_of_the_masked_filters():
    """Norms as the gain says, whatever stands under the mask; what is under it stays unread."""
    layer = WeightNormMaskedConv2d(2, 3, 1, 1, 1, strict=True).double()
    with torch.no_grad():
        layer.weight.masked_fill_(~layer.mask, 1e3)
        layer.gain.copy_(torch.tensor([0.5, 1.0, 2.0]))
    folded = layer.folded()
    torch.testing.assert_close(folded.flatten(1).norm(dim=1), layer.gain)
    assert (folded[~layer.mask] == 0).all()
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer.apply_weight(x, folded, layer.bias))


def test_every_convolution_of_pixelcnnpp_starts_from_data():
    """After the initialization all outputs have mean 0, and deviation 1, or 0.1 for what a block adds."""
    network = PixelCNNPlusPlus((3, 8, 8), 10, filters=6, blocks=2, levels=2, dropout=0.0, **CONTEXT).double()
    x, given = torch.randn(20, 3, 8, 8, dtype=torch.float64), context(network, 20)
    outputs = {}
    layers = {name: layer for name, layer in network.named_modules() if hasattr(layer, "gain")}
    hooks = [
        layer.register_forward_hook(lambda _, inputs, output, name=name: outputs.update({name: output}))
        for name, layer in layers.items()
    ]
    with data_dependent_initialization(network):
        network(x, **given)
    for hook in hooks:
        hook.remove()
    plain = {name for name, part in network.named_modules() if type(part) is torch.nn.Conv2d}
    assert all(name.endswith("given.maps") for name in plain)
    assert outputs.keys() == layers.keys()
    for name, output in outputs.items():
        assert isinstance(layers[name], (WeightNormPaddedConv2d, WeightNormMaskedConv2d))
        torch.testing.assert_close(output.mean((0, 2, 3)), torch.zeros(output.shape[1]).double(), rtol=0, atol=1e-9)
        expected = 0.1 if name.endswith("second") else 1.0
        torch.testing.assert_close(output.std((0, 2, 3)), torch.full((output.shape[1],), expected).double())


# -- errors ------------------------------------------------------------------------------------------------------------


def test_wrong_shapes_are_named():
    network = PixelCNN((1, 4, 4), 1, reach=1, depth=1, features=3)
    with pytest.raises(ValueError, match=r"x must have shape \(B, \(1, 4, 4\)\), got \(2, 1, 4, 5\)"):
        network(torch.zeros(2, 1, 4, 5), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"features must have shape \(2, 3\), got None"):
        network(torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError, match=r"maps must have shape None, got \(2, 1, 4, 4\)"):
        network(torch.zeros(2, 1, 4, 4), torch.zeros(2, 3), torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError, match=r"features must have shape \(5, 3\), got \(2, 3\)"):
        network.generate(torch.clone, 5, torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PixelCNN((4, 4), 1), r"shape must be \(channels, height, width\)"),
        (lambda: WaveNet((1, 4, 4), 1), r"shape must be \(channels, length\)"),
        (lambda: WaveNet((1, 4), 1, dilations=[1, 0]), "dilations must be positive"),
        (lambda: PixelCNN((3, 4, 4), 4, groups=3), "outputs a multiple"),
        (lambda: PixelCNN((3, 4, 4), 4, groups=2), "groups must be 1 or the number of channels 3"),
        (lambda: PixelCNN((1, 4, 4), 1, reach=0), "reach and depth must be at least 1"),
        (lambda: GatedPixelCNN((3, 4, 4), 3, filters=4, groups=3), "filters must be a positive multiple of groups 3"),
        (lambda: PixelRNN((3, 4, 4), 3, hidden=4, groups=3), "hidden must be a positive multiple of groups 3"),
        (lambda: PixelCNNPlusPlus((1, 6, 6), 1, levels=3), r"sides divisible by 2\*\*\(levels - 1\)"),
        (lambda: AgnosticMADE((2, 4), 3), "multiple of the channels 2"),
        (lambda: AgnosticMADE((1, 4), 1, orderings=0), "orderings at least 1"),
    ],
)
def test_wrong_sizes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
