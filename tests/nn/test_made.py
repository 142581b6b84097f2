"""MADE: an output depends on the inputs that come earlier in the order, on no other, and at sufficient width on all."""

import pytest
import torch

from pyro_flowguides.nn import MADE, MLP, made

WIDTHS = [[], [1], [4], [7], [40], [40, 40], [5, 40, 3], [64, 64]]


def trained(net, scale=1.0):
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, 0, scale)
    return net.double()


def dependence(net, points=8):
    """Which of the D inputs each of the (outputs, D) numbers depends on, by autograd, at several points."""
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
    """For random orders and any width, also far below D."""
    for _ in range(3):
        order = torch.randperm(dim)
        net = trained(MADE(dim, hidden_dims, outputs, order=order, lowest_degree=lowest_degree))
        for output in dependence(net):
            assert not (output & ~earlier(order)).any()


@pytest.mark.parametrize("activation", [torch.nn.functional.elu, torch.tanh])
@pytest.mark.parametrize("hidden_dims", [[], [12], [40], [40, 40], [12, 50, 12]], ids=str)
@pytest.mark.parametrize("dim", [1, 2, 5, 12])
@pytest.mark.parametrize("lowest_degree", [0, 1])
def test_depends_on_all_earlier_inputs(dim, hidden_dims, lowest_degree, activation):
    """With a unit of every degree in every layer no earlier input is lost; with no hidden layer either."""
    order = torch.randperm(dim)
    net = trained(MADE(dim, hidden_dims, 2, order=order, lowest_degree=lowest_degree, activation=activation), 0.5)
    for output in dependence(net, 16):
        assert torch.equal(output, earlier(order))


def test_narrow_nets_still_use_early_inputs():
    """Three units for twelve inputs: the last outputs depend on something."""
    net = trained(MADE(12, [3]))
    assert dependence(net)[0, -1].sum() >= 8


@pytest.mark.parametrize("hidden_dims", [[8], [8, 8]], ids=str)
def test_units_that_read_no_input_exist_at_lowest_degree_zero(hidden_dims):
    """They alone can carry a context to the output that comes first."""

    def first_sees_hidden_biases(lowest_degree):
        net = trained(MADE(4, hidden_dims, order=[2, 0, 1, 3], lowest_degree=lowest_degree))
        out = net(torch.randn(4, dtype=torch.float64))
        gradients = torch.autograd.grad(out[2], list(net.biases[:-1]), allow_unused=True)
        return any(g is not None and bool((g != 0).any()) for g in gradients)

    assert first_sees_hidden_biases(0)
    assert not first_sees_hidden_biases(1)


@pytest.mark.parametrize("width", [3, 11, 40])
def test_no_hidden_unit_is_wasted(width):
    """Each reads an input and feeds an output, and every degree has its share of them."""
    net = MADE(12, [width])
    reads, feeds = net.get_buffer("mask0").bool(), net.get_buffer("mask1").bool()
    assert reads.any(1).all()
    assert feeds.any(0).all()
    counts = torch.bincount(reads.sum(1), minlength=12)[1:]
    assert counts.max() - counts.min() <= 1


def test_one_input_is_a_constant():
    for hidden_dims in WIDTHS:
        net = trained(MADE(1, hidden_dims, 2))
        low, high = net(torch.tensor([[-3.0], [5.0]], dtype=torch.float64))
        # Rows of one product may be summed in different orders, so that equal rows differ by rounding.
        torch.testing.assert_close(low, high, rtol=1e-14, atol=1e-14)


def test_layout_of_several_outputs():
    """The first D numbers are the first output of each input."""
    net = trained(MADE(3, [16], 2))
    j = torch.autograd.functional.jacobian(net, torch.randn(3, dtype=torch.float64))
    assert j.shape == (6, 3)
    assert torch.equal(j[0] != 0, j[3] != 0)
    assert torch.equal(j[2] != 0, j[5] != 0)
    assert net(torch.randn(4, 5, 3, dtype=torch.float64)).shape == (4, 5, 6)


def test_masks_are_multiplied_in_once_for_many_runs():
    net = trained(MADE(5, [16, 16], 2))
    folded = net.fold()
    x = torch.randn(7, 5, dtype=torch.float64)
    expected = net(x)
    for layer in range(net.depth):  # the masks are not needed any more
        net.get_buffer(f"mask{layer}").zero_()
    assert torch.equal(net.run(x, folded), expected)


def test_masked_weights_start_scaled_to_what_they_read():
    """Fan-in counts the inputs that a unit reads, so that units of low degree do not start weak."""
    net = MADE(50, [400])
    mask = net.get_buffer("mask0").bool()
    for degree in (1, 49):
        rows = mask.sum(-1) == degree
        spread = net.weights[0][rows][mask[rows]].std().item()
        assert spread == pytest.approx((1 / 3 / degree) ** 0.5, rel=0.35)
    assert torch.equal(net.weights[-1], torch.zeros_like(net.weights[-1]))


def test_state_dict_carries_order_and_masks():
    one, other = MADE(9, [16], order=torch.randperm(9)), MADE(9, [16], order=torch.randperm(9))
    trained(one), trained(other)
    other.load_state_dict(one.state_dict())
    x = torch.randn(4, 9, dtype=torch.float64)
    assert torch.equal(one(x), other(x))
    assert torch.equal(one.order, other.order)


@pytest.fixture(params=[1, 3, 24])
def _together(request, monkeypatch):
    """How many levels, and how many inputs or units, substitutions take together."""
    monkeypatch.setattr(made, "FIXED_LEVELS", request.param)
    monkeypatch.setattr(made, "DENSE_SIZE", request.param)


@pytest.mark.usefixtures("_together")
@pytest.mark.parametrize("lowest_degree", [0, 1])
@pytest.mark.parametrize("hidden_dims", [*WIDTHS, [7, 30]], ids=str)
@pytest.mark.parametrize("dim", [1, 2, 5, 40])
def test_substitutions_solve_their_equations(dim, hidden_dims, lowest_degree):
    """Forwards for inputs that depend on their own outputs; backwards for a linear system with the Jacobian."""
    net = trained(MADE(dim, hidden_dims, 2, order=torch.randperm(dim), lowest_degree=lowest_degree))
    with torch.no_grad():
        for weight in net.weights:
            weight /= max(weight.shape[-1], 1) ** 0.5
    folded = net.fold()
    given, v, *coefficients = torch.randn(4, 3, 2, dim, dtype=torch.float64)
    for together in (0, 1, 10**6):
        x = net.substitute(lambda a, b, w: w - a - b.sin(), [given], folded, together)
        a, b = net.run(x, folded).chunk(2, -1)
        torch.testing.assert_close(x + a + b.sin(), given, rtol=1e-12, atol=1e-12)
    _, hidden = net.run_with_hidden(x, folded)
    u = net.solve_transposed(v, coefficients, hidden, folded)
    jacobians = torch.func.vmap(torch.func.vmap(torch.func.jacrev(net)))(x).unflatten(-2, (2, dim))
    matrix = torch.eye(dim) + torch.einsum("k...i,...kij->...ij", torch.stack(coefficients), jacobians)
    torch.testing.assert_close((matrix.mT @ u[..., None])[..., 0], v, rtol=1e-9, atol=1e-9)


def test_as_many_steps_as_the_hidden_units_have_degrees():
    """Inputs that read the same units are placed together, so that steps do not grow with the dimension."""
    for dim in (30, 300):
        net, steps = trained(MADE(dim, [8, 16])), []

        def place(output, given, steps=steps):
            steps.append(given.numel() // 3)
            return given - output

        net.substitute(place, [torch.randn(3, dim, dtype=torch.float64)], net.fold())
        assert len(steps) <= 17
        assert sum(steps) == dim


def test_errors():
    with pytest.raises(ValueError, match=r"MADE: order must be a permutation of 0\.\.2, got \[0, 0, 1\]"):
        MADE(3, [4], order=[0, 0, 1])
    for widths in ([0], [4, -1]):
        with pytest.raises(ValueError, match="MADE: layer widths must be positive"):
            MADE(3, widths)
    assert issubclass(MADE, MLP)
