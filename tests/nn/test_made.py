"""MADE: outputs depend only on inputs earlier in the order, and with enough hidden units on all of these."""

from functools import partial

import pytest
import torch

from pyro_flowguides.nn import MADE, MLP

WIDTHS = [[], [1], [4], [7], [40], [40, 40], [5, 40, 3], [64, 64]]


def randomize(net, scale=1.0):
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, 0, scale)
    return net.double()


def dependence(net, points=8):
    """Find the inputs that each of the (outputs, D) numbers depends on, by autograd, at several points."""
    x = torch.randn(points, net.in_features, dtype=torch.float64)
    j = torch.func.vmap(torch.func.jacrev(net))(x)
    return (j != 0).any(0).reshape(net.outputs, net.in_features, net.in_features)


def earlier(order):
    rank = torch.as_tensor(order).argsort()
    return rank[:, None] > rank[None, :]


@pytest.mark.parametrize("hidden_dims", WIDTHS, ids=str)
@pytest.mark.parametrize("dim", [1, 2, 5, 12])
@pytest.mark.parametrize("lowest_degree", [0, 1])
@pytest.mark.parametrize("outputs", [1, 3])
def test_depends_on_earlier_inputs_only(dim, hidden_dims, lowest_degree, outputs):
    """For random orders and for any width, even far below D."""
    for _ in range(3):
        order = torch.randperm(dim)
        net = randomize(MADE(dim, hidden_dims, outputs, order=order, lowest_degree=lowest_degree))
        for output in dependence(net):
            assert not (output & ~earlier(order)).any()


@pytest.mark.parametrize("activation", [torch.nn.functional.elu, torch.tanh])
@pytest.mark.parametrize("hidden_dims", [[], [12], [40], [40, 40], [12, 50, 12]], ids=str)
@pytest.mark.parametrize("dim", [1, 2, 5, 12])
@pytest.mark.parametrize("lowest_degree", [0, 1])
def test_depends_on_all_earlier_inputs(dim, hidden_dims, lowest_degree, activation):
    """No earlier input is lost if every layer has a unit of every degree, or if there is no hidden layer."""
    order = torch.randperm(dim)
    net = randomize(MADE(dim, hidden_dims, 2, order=order, lowest_degree=lowest_degree, activation=activation), 0.5)
    for output in dependence(net, 16):
        assert torch.equal(output, earlier(order))


def test_narrow_networks_still_use_early_inputs():
    """With three units for twelve inputs the last output still depends on most inputs."""
    net = randomize(MADE(12, [3]))
    assert dependence(net)[0, -1].sum() >= 8


@pytest.mark.parametrize("hidden_dims", [[8], [8, 8]], ids=str)
def test_lowest_degree_zero_adds_units_that_read_no_input(hidden_dims):
    """Only these can carry a context to the first output."""

    def first_sees_hidden_biases(lowest_degree):
        net = randomize(MADE(4, hidden_dims, order=[2, 0, 1, 3], lowest_degree=lowest_degree))
        out = net(torch.randn(4, dtype=torch.float64))
        gradients = torch.autograd.grad(out[2], list(net.biases[:-1]), allow_unused=True)
        return any(g is not None and bool((g != 0).any()) for g in gradients)

    assert first_sees_hidden_biases(0)
    assert not first_sees_hidden_biases(1)


@pytest.mark.parametrize("width", [3, 11, 40])
def test_no_hidden_unit_is_wasted(width):
    """Each reads an input and feeds an output, and the degrees have nearly equal numbers of units."""
    net = MADE(12, [width])
    reads, feeds = net.get_buffer("mask0").bool(), net.get_buffer("mask1").bool()
    assert reads.any(1).all()
    assert feeds.any(0).all()
    counts = torch.bincount(reads.sum(1), minlength=12)[1:]
    assert counts.max() - counts.min() <= 1


def test_one_input_is_a_constant():
    for hidden_dims in WIDTHS:
        net = randomize(MADE(1, hidden_dims, 2))
        low, high = net(torch.tensor([[-3.0], [5.0]], dtype=torch.float64))
        # Rows of one product may be summed in different orders, so that equal rows differ by rounding.
        torch.testing.assert_close(low, high, rtol=1e-14, atol=1e-14)


def test_layout_of_several_outputs():
    """The first D numbers are the first output of each input."""
    net = randomize(MADE(3, [16], 2))
    j = torch.autograd.functional.jacobian(net, torch.randn(3, dtype=torch.float64))
    assert j.shape == (6, 3)
    assert torch.equal(j[0] != 0, j[3] != 0)
    assert torch.equal(j[2] != 0, j[5] != 0)
    assert net(torch.randn(4, 5, 3, dtype=torch.float64)).shape == (4, 5, 6)


def test_folded_layers_contain_the_masks():
    net = randomize(MADE(5, [16, 16], 2))
    folded = net.fold()
    x = torch.randn(7, 5, dtype=torch.float64)
    expected = net(x)
    for layer in range(net.depth):  # the folded layers no longer need the masks
        net.get_buffer(f"mask{layer}").zero_()
    assert torch.equal(net.run(x, folded), expected)


def test_masked_weights_start_scaled_to_what_they_read():
    """Fan-in counts only the inputs that a unit reads, so that units of low degree do not start weak."""
    net = MADE(50, [400])
    mask = net.get_buffer("mask0").bool()
    for degree in (1, 49):
        rows = mask.sum(-1) == degree
        spread = net.weights[0][rows][mask[rows]].std().item()
        assert spread == pytest.approx((1 / 3 / degree) ** 0.5, rel=0.35)
    assert torch.equal(net.weights[-1], torch.zeros_like(net.weights[-1]))


def test_state_dict_carries_order_and_masks():
    one, other = MADE(9, [16], order=torch.randperm(9)), MADE(9, [16], order=torch.randperm(9))
    randomize(one), randomize(other)
    other.load_state_dict(one.state_dict())
    x = torch.randn(4, 9, dtype=torch.float64)
    assert torch.equal(one(x), other(x))
    assert torch.equal(one.order, other.order)


SUBSTITUTIONS = {
    "level by level": MADE.substitute,
    "level by level in place": partial(MADE.substitute_in_blocks, max_iterated=0),
    "iterated": partial(MADE.substitute_in_blocks, max_iterated=10**9),
}


@pytest.mark.parametrize("lowest_degree", [0, 1])
@pytest.mark.parametrize("hidden_dims", [*WIDTHS, [7, 30], [100, 80]], ids=str)
@pytest.mark.parametrize("dim", [1, 2, 5, 40, 80])
def test_substitutions_solve_their_equations(dim, hidden_dims, lowest_degree):
    """Forward for inputs that depend on their own outputs; back for a linear system with the Jacobian.

    Few dimensions or units make a single block, many make several.
    """
    net = randomize(MADE(dim, hidden_dims, 2, order=torch.randperm(dim), lowest_degree=lowest_degree))
    with torch.no_grad():
        for weight in net.weights:
            weight /= max(weight.shape[-1], 1) ** 0.5
    folded = net.fold()
    target, v, *coefficients = torch.randn(4, 3, 2, dim, dtype=torch.float64)
    for substitute in SUBSTITUTIONS.values():
        x = substitute(net, lambda a, b, w: w - a - b.sin(), [target], folded)
        a, b = net.run(x, folded).chunk(2, -1)
        torch.testing.assert_close(x + a + b.sin(), target, rtol=1e-12, atol=1e-12)
    _, hidden = net.run_with_hidden(x, folded)
    u = net.solve_transposed(v, coefficients, hidden, folded)
    jacobians = torch.func.vmap(torch.func.vmap(torch.func.jacrev(net)))(x).unflatten(-2, (2, dim))
    matrix = torch.eye(dim) + torch.einsum("k...i,...kij->...ij", torch.stack(coefficients), jacobians)
    torch.testing.assert_close((matrix.mT @ u[..., None])[..., 0], v, rtol=1e-9, atol=1e-9)


def count_solved(net, substitute):
    """Return how many inputs of three points each call of ``solve`` gets."""
    counts = []

    def solve(output, target):
        counts.append(target.numel() // 3)
        return target - output

    substitute(net, solve, [torch.randn(3, net.in_features, dtype=torch.float64)], net.fold())
    return counts


@pytest.mark.parametrize("name", ["level by level", "level by level in place"])
@pytest.mark.parametrize("dim", [30, 300])
def test_there_is_at_most_one_more_level_than_degrees(dim, name):
    """Inputs that read the same units are solved together, so that the steps do not grow with the dimension."""
    counts = count_solved(randomize(MADE(dim, [8, 16])), SUBSTITUTIONS[name])
    assert len(counts) <= 17
    assert sum(counts) == dim


def test_iteration_takes_few_passes_where_the_network_is_gentle():
    net = randomize(MADE(96, [100]), 0.01)
    assert len(count_solved(net, SUBSTITUTIONS["iterated"])) < 40
    assert len(count_solved(net, SUBSTITUTIONS["level by level"])) == 96


def test_errors():
    with pytest.raises(ValueError, match=r"MADE: order must be a permutation of 0\.\.2, got \[0, 0, 1\]"):
        MADE(3, [4], order=[0, 0, 1])
    for widths in ([0], [4, -1]):
        with pytest.raises(ValueError, match="MADE: layer widths must be positive"):
            MADE(3, widths)
    assert issubclass(MADE, MLP)
