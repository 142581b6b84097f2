"""The "shift" update of autoregressive flows: it preserves volume, inverts, and has the right path gradient."""

import pytest
import torch

from pyro_flowguides.flows import iaf, maf
from pyro_flowguides.transforms import InverseAutoregressive, MaskedAutoregressive
from tests.transforms.families import jacobian

BUILDERS = {"iaf": iaf, "maf": maf}


def build(name, dim, context_dim=0):
    flow = BUILDERS[name](dim, context_dim, depth=3, hidden_dims=[16], update="shift")
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter)
    return flow.double()


@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("dim", [1, 2, 7])
@pytest.mark.parametrize("name", BUILDERS)
def test_volume_is_preserved_while_points_move(name, dim, context_dim):
    flow = build(name, dim, context_dim)
    if context_dim:
        flow = flow.condition(torch.randn(context_dim, dtype=torch.float64))
    x = torch.randn(5, dim, dtype=torch.float64)
    y, ladj = flow.forward_and_ladj(x)
    assert torch.equal(ladj, torch.zeros(5, dtype=torch.float64))
    assert (y - x).abs().min() > 1e-3
    determinant = torch.linalg.slogdet(jacobian(lambda v: flow.forward_and_ladj(v)[0], x))
    torch.testing.assert_close(determinant.logabsdet, ladj, rtol=0, atol=1e-9)
    torch.testing.assert_close(flow.inverse_and_ladj(y)[0], x, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("family", [InverseAutoregressive, MaskedAutoregressive])
@pytest.mark.parametrize("dim", [3, 40])
def test_path_gradient(family, dim):
    """The score is the derivative of the density at fixed parameters."""
    flow = family(dim, [16], update="shift")
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    flow = flow.double()
    x = torch.randn(4, dim, dtype=torch.float64)
    y, _, score = flow.forward_and_score(x, x)
    free = y.detach().requires_grad_()
    (expected,) = torch.autograd.grad(flow.inverse_and_ladj(free)[0].square().sum() / 2, free)
    torch.testing.assert_close(score, expected, rtol=1e-6, atol=1e-6)


def test_the_unused_half_of_the_network_gets_no_gradient():
    flow = build("maf", 4)
    x, ladj = flow.inverse_and_ladj(torch.randn(5, 4, dtype=torch.float64))
    (x.square().sum() + ladj.sum()).backward()
    for part in flow.parts:
        weight = part.conditioner.weights[-1]
        assert weight.grad[:4].count_nonzero() == 0
        assert weight.grad[4:].count_nonzero() > 0
