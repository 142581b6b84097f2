"""All autoregressive networks: causality by automatic differentiation, context, gradients, and error messages."""

import functools
import itertools

import pytest
import torch

from pyro_flowguides.vae import AgnosticMADE, GatedPixelCNN, PixelCNN, PixelCNNPlusPlus, PixelRNN, WaveNet
from tests.vae.decoders.cases import CASES, build_case, find_dependence, random_context, rank_values


@functools.cache
def case_dependence(name):
    return find_dependence(build_case(name))


@pytest.mark.parametrize("name", CASES)
def test_no_output_depends_on_its_own_or_later_values(name):
    """Output k belongs to channel k % channels."""
    network = build_case(name)
    dependence, ranks = case_dependence(name), rank_values(network)
    positions = itertools.product(*map(range, network.shape[1:]))
    for output, position in itertools.product(range(network.outputs), positions):
        own_rank = ranks[(output % network.shape[0], *position)]
        assert not dependence[(output, *position)][ranks >= own_rank].any()


@pytest.mark.parametrize("name", CASES)
def test_every_output_but_the_first_depends_on_some_value(name):
    network = build_case(name)
    dependence, ranks = case_dependence(name), rank_values(network)
    depends = dependence.flatten(len(network.shape)).any(-1)
    first = torch.stack([ranks[output % network.shape[0]] == 0 for output in range(network.outputs)])
    assert depends[~first].all()


@pytest.mark.parametrize("name", CASES)
def test_context_reaches_every_output(name):
    """Global features reach all outputs; a map reaches at least the outputs at the same position."""
    network, points = build_case(name), 16
    x, context = torch.randn(points, *network.shape, dtype=torch.float64), random_context(network, points)
    for kind, tensor in context.items():
        if tensor is None:
            continue
        outputs = network(x, **{**context, kind: tensor.requires_grad_()}).sum(0).flatten(1)
        directions = torch.eye(outputs.numel(), dtype=torch.float64)
        (jacobian,) = torch.autograd.grad(outputs.flatten(), tensor, directions, is_grads_batched=True)
        reached = (jacobian != 0).any(1).any(1).reshape(*outputs.shape, -1)
        assert (reached.any(-1) if kind == "features" else reached.diagonal(dim1=1, dim2=2)).all()


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_gets_a_gradient(name):
    network = build_case(name)
    x, context = torch.randn(2, *network.shape, dtype=torch.float64), random_context(network, 2)
    network(x, **context).square().sum().backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad.abs().max() > 1e-9, key


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
        (lambda: PixelCNN((4, 4), 1), r"PixelCNN: shape must be \(channels, height, width\)"),
        (lambda: WaveNet((1, 4, 4), 1), r"shape must be \(channels, length\)"),
        (lambda: AgnosticMADE((4,), 4), r"\(channels, length\) or \(channels, height, width\)"),
        (lambda: WaveNet((1, 4), 1, dilations=[1, 0]), "dilations must be positive"),
        (lambda: PixelCNN((3, 4, 4), 4, groups=3), "outputs a multiple"),
        (lambda: PixelCNN((3, 4, 4), 4, groups=2), "groups must be 1 or the number of channels 3"),
        (lambda: PixelCNN((1, 4, 4), 1, reach=0), "PixelCNN: reach and depth must be at least 1"),
        (lambda: GatedPixelCNN((1, 4, 4), 1, depth=0), "GatedPixelCNN: reach and depth must be at least 1"),
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
