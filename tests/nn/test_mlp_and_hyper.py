"""MLPs that can be read and shifted from outside, hypernetworks, and orders."""

import copy
import pickle

import pytest
import torch

from pyro_flowguides.nn import MLP, HyperNetwork
from pyro_flowguides.nn.ordering import as_permutation


def randomize(net):
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter)
    return net.double()


@pytest.mark.parametrize("hidden_dims", [[], [8], [8, 5]], ids=str)
@pytest.mark.parametrize("inputs", [0, 1, 4])
def test_equals_a_stack_of_linear_layers(inputs, hidden_dims):
    net = randomize(MLP(inputs, hidden_dims, 3, activation=torch.tanh))
    layers = []
    for weight, bias in zip(net.weights, net.biases, strict=True):
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0]) if weight.shape[1] else torch.nn.Identity()
        if weight.shape[1]:
            layer.weight, layer.bias = weight, bias
            layers += [layer, torch.nn.Tanh()]
    x = torch.randn(2, 6, inputs, dtype=torch.float64)
    assert net(x).shape == (2, 6, 3)
    if inputs:
        torch.testing.assert_close(net(x), torch.nn.Sequential(*layers[:-1])(x))
    else:
        assert torch.equal(net(x), net(x)[0, 0].expand(2, 6, 3))  # without inputs it is a constant


@pytest.mark.parametrize("hidden_dims", [[], [8], [8, 8]], ids=str)
def test_starts_at_zero_with_a_gradient(hidden_dims):
    net = MLP(4, hidden_dims, 3)
    x = torch.randn(6, 4)
    assert not net(x).any()
    net(x).sum().backward()
    assert net.weights[-1].grad.abs().min() > 0
    if hidden_dims:
        assert net.weights[0].abs().max() <= 0.5  # 1 / sqrt(fan in)


@pytest.mark.parametrize("inputs", [0, 4])
def test_shifting_biases_is_a_projection_of_the_context(inputs):
    """Batched biases equal a network that reads the context as further inputs of the first layer."""
    net = randomize(MLP(inputs, [5], 2, activation=torch.tanh))
    projection = torch.randn(5, 3, dtype=torch.float64)
    context = torch.randn(7, 3, dtype=torch.float64)
    x = torch.randn(4, 7, inputs, dtype=torch.float64)
    folded = net.fold()
    folded["bias0"] = folded["bias0"] + context @ projection.mT
    wide = copy.deepcopy(net)
    wide.weights[0] = torch.nn.Parameter(torch.cat([net.weights[0], projection], -1))
    expected = wide(torch.cat([x, context.expand(4, 7, 3)], -1))
    torch.testing.assert_close(net.run(x, folded), expected)


def test_fold_returns_the_parameters_themselves_if_there_are_no_masks():
    net = MLP(3, [4], 2)
    folded = net.fold()
    assert folded["weight0"] is net.weights[0]
    assert list(folded) == ["weight0", "bias0", "weight1", "bias1"]
    assert net.depth == 2


def test_copies_and_meta():
    net = randomize(MLP(3, [4], 2))
    x = torch.randn(5, 3, dtype=torch.float64)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(x), net(x))
    assert net.to("meta")(x.to("meta")).shape == (5, 2)


@pytest.mark.parametrize(("inputs", "hidden_dims", "outputs"), [(-1, [], 1), (2, [0], 1), (2, [4, -3], 1), (2, [], 0)])
def test_widths_must_be_positive(inputs, hidden_dims, outputs):
    with pytest.raises(
        ValueError, match=r"MLP: (layer widths must be positive|(in|out)_features must be at least [01]), got"
    ):
        MLP(inputs, hidden_dims, outputs)


# -- hypernetworks -----------------------------------------------------------------------------------------------------

SHAPES = {"u": (3,), "matrix": (2, 3), "b": (), "nothing": (0,)}


@pytest.mark.parametrize("hidden_dims", [(), (8,), (8, 8)], ids=str)
@pytest.mark.parametrize("batch", [(), (7,), (2, 7), (0,)], ids=str)
def test_hypernetwork_shapes(hidden_dims, batch):
    values = HyperNetwork(4, hidden_dims, SHAPES)(torch.randn(*batch, 4))
    assert {name: value.shape for name, value in values.items()} == {
        name: (*batch, *shape) for name, shape in SHAPES.items()
    }


def test_hypernetwork_under_vmap():
    """Inside, a scalar output of one context has no dimension at all."""
    hyper = randomize(HyperNetwork(4, (8,), SHAPES))
    context = torch.randn(7, 4, dtype=torch.float64)
    for name, value in torch.func.vmap(hyper)(context).items():
        torch.testing.assert_close(value, hyper(context)[name])


@pytest.mark.parametrize("hidden_dims", [(), (8,)], ids=str)
def test_named_outputs_of_a_hypernetwork_start_at_zero(hidden_dims):
    context = torch.randn(50, 4)
    assert not any(value.any() for value in HyperNetwork(4, hidden_dims, SHAPES)(context).values())
    values = HyperNetwork(4, hidden_dims, SHAPES, zero=["u", "b"])(context)
    assert not values["u"].any()
    assert not values["b"].any()
    assert values["matrix"].std(0).min() > 0.05
    assert values["matrix"].abs().max() < 10


def test_linear_amortization_is_linear():
    hyper = randomize(HyperNetwork(4, (), {"u": (2, 3)}))
    x, y = torch.randn(2, 5, 4, dtype=torch.float64)
    origin = hyper(torch.zeros(4, dtype=torch.float64))["u"]
    torch.testing.assert_close(hyper(x + y)["u"] - origin, hyper(x)["u"] + hyper(y)["u"] - 2 * origin)


@pytest.mark.parametrize("hidden_dims", [(), (8,)], ids=str)
def test_the_scale_is_a_factor_of_every_output(hidden_dims):
    hyper = randomize(HyperNetwork(4, hidden_dims, SHAPES))
    context = torch.randn(7, 4, dtype=torch.float64)
    plain = hyper(context)
    hyper.scale = 0.25
    for name, value in hyper(context).items():
        torch.testing.assert_close(value, 0.25 * plain[name])


def test_hypernetwork_errors():
    with pytest.raises(ValueError, match="HyperNetwork: context_dim must be at least 1, got 0"):
        HyperNetwork(0, (), SHAPES)


# -- orders ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [None, [0, 1, 2], (0, 1, 2), range(3), torch.arange(3)])
def test_natural_order(order):
    assert torch.equal(as_permutation("owner", 3, order), torch.arange(3))


def test_an_order_is_copied():
    order = torch.tensor([2, 0, 1])
    kept = as_permutation("owner", 3, order)
    order.zero_()
    assert kept.tolist() == [2, 0, 1]


def test_invalid_orders():
    with pytest.raises(ValueError, match=r"owner: order must be a permutation of 0\.\.3, got \[0, 1, 2\]"):
        as_permutation("owner", 4, [0, 1, 2])
    with pytest.raises(ValueError, match="owner: order"):
        as_permutation("owner", 2, [[0, 1]])


# -- derivatives of several numbers at once ----------------------------------------------------------------------------


@pytest.mark.parametrize("hidden_dims", [(), (8,), (5, 7)], ids=str)
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)], ids=str)
def test_pull_back(hidden_dims, batch):
    net = randomize(MLP(3, hidden_dims, 2))
    folded = net.fold()
    folded["bias0"] = folded["bias0"] + torch.randn(*batch, 1, dtype=torch.float64)  # a context with batch dimensions
    x = torch.randn(*batch, 3, dtype=torch.float64)
    output, hidden = net.run_with_hidden(x, folded)
    torch.testing.assert_close(output, net.run(x, folded))
    weight = folded[f"weight{net.depth - 1}"]
    rows = net.pull_back(weight.expand(*batch, *weight.shape), hidden, folded)
    full = torch.autograd.functional.jacobian(lambda x: net.run(x, folded).reshape(-1, 2).sum(0), x)  # (2, *batch, 3)
    torch.testing.assert_close(rows, full.movedim(0, -2))
    assert not rows.requires_grad
