"""The path gradient's view of a flow: the pair of a draw as a function of y alone, without solving anything."""

import pytest
import torch

from pyro_flowguides.nn import MADE, made
from pyro_flowguides.transforms import Compose, InverseAutoregressive, Planar, with_path_gradient
from pyro_flowguides.transforms import solvers as solve
from pyro_flowguides.transforms.families import sylvester
from tests.transforms.families import CASES, CONDITIONAL, jacobian, name, randomize

DIM = 3


def no_solving(monkeypatch):
    def solver(*_):
        raise AssertionError("the root is known: nothing is to be solved")

    monkeypatch.setattr(MADE, "substitute", solver)
    monkeypatch.setattr(solve, "solve_tanh", solver)
    monkeypatch.setattr(sylvester, "_back_substitute", solver)


def density(x, ladj):
    """Any smooth function of a pair will do."""
    return (x.sin() * torch.arange(1.0, DIM + 1)).sum() + ladj.square().sum()


def flows(case):
    flow = case.flow(DIM, 0.5, (4,))
    return [flow, Compose([flow, randomize(Planar(DIM), 0.5), flow])]


def base(x):
    """The log density of a draw's origin, and its score."""
    weights = torch.arange(1.0, x.shape[-1] + 1)
    return (x.sin() * weights).sum(-1), x.cos() * weights


@pytest.mark.parametrize("case", CASES, ids=name)
def test_forward_and_score(case, monkeypatch):
    """Values are those of the pair; the score is the derivative of the density at y, its parameters held."""
    for flow in flows(case):
        x = torch.randn(4, DIM)
        expected_y, expected_ladj = flow.forward_and_ladj(x)
        leaf = expected_y.detach().clone().requires_grad_()
        origin, pulled = flow.inverse_and_ladj(leaf)
        (expected,) = torch.autograd.grad((base(origin)[0] - pulled).sum(), leaf)
        with monkeypatch.context() as patch:
            if flow.cheap_direction != "inverse":  # MAF draws by solving; its path is then free
                no_solving(patch)
            y, ladj, score = flow.forward_and_score(x, base(x)[1])
        for one, other in ((y, expected_y), (ladj, expected_ladj)):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(score, expected, rtol=1e-7, atol=1e-8)
        assert not ladj.requires_grad
        assert not score.requires_grad
        assert y.requires_grad == expected_y.requires_grad


def test_on_path_has_the_derivative_of_the_score_alone():
    y = torch.randn(4, DIM, requires_grad=True)
    value, score = y.square().sum(-1), torch.randn(4, DIM)
    found = with_path_gradient(value, y, score)
    torch.testing.assert_close(found, value)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), y)[0], score)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_inverse_on_path(case, monkeypatch):
    for flow in flows(case):
        x = torch.randn(4, DIM)
        y = flow.forward_and_ladj(x)[0].detach().requires_grad_()
        expected_x, expected_ladj = flow.inverse_and_ladj(y)
        (by_y,) = torch.autograd.grad(density(expected_x, expected_ladj), y)
        with monkeypatch.context() as patch:
            if flow.cheap_direction != "inverse":
                no_solving(patch)
            path_x, ladj = flow.inverse_at(y, x, detach_parameters=True)
        torch.testing.assert_close(path_x, x, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(ladj, expected_ladj, rtol=1e-8, atol=1e-8)
        gradient, *others = torch.autograd.grad(
            density(path_x, ladj), [y, *(p for p in flow.parameters() if p.numel())], allow_unused=True
        )
        torch.testing.assert_close(gradient, by_y, rtol=1e-7, atol=1e-8)
        assert not any(other is not None for other in others)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_inverse_at_has_all_derivatives_of_the_inverse(case, monkeypatch):
    for flow in flows(case):
        x = torch.randn(4, DIM)
        y = flow.forward_and_ladj(x)[0].detach().requires_grad_()
        leaves = [y, *(p for p in flow.parameters() if p.numel())]
        expected = torch.autograd.grad(density(*flow.inverse_and_ladj(y)), leaves, allow_unused=True)
        with monkeypatch.context() as patch:
            if flow.cheap_direction != "inverse":
                no_solving(patch)
            known_x, ladj = flow.inverse_at(y, x)
        torch.testing.assert_close(known_x, x, rtol=1e-8, atol=1e-8)
        found = torch.autograd.grad(density(known_x, ladj), leaves, allow_unused=True)
        for one, other in zip(found, expected, strict=True):
            assert (one is None) == (other is None)
            if other is not None:
                torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("case", CONDITIONAL, ids=name)
def test_context_is_held_too(case):
    """The encoder behind a context is a parameter like any other: it is reached through the draw alone."""
    module = case.build(DIM, 0.5)
    context = torch.randn(4, module.context_dim, requires_grad=True)
    x = torch.randn(4, DIM)
    y, ladj, score = module.condition(context).forward_and_score(x, base(x)[1])
    leaf = y.detach().requires_grad_()
    origin, pulled = module.condition(context.detach()).inverse_and_ladj(leaf)
    (expected,) = torch.autograd.grad((base(origin)[0] - pulled).sum(), leaf)
    torch.testing.assert_close(score, expected, rtol=1e-7, atol=1e-8)
    (total,) = torch.autograd.grad(with_path_gradient(base(x)[0] - ladj, y, score).sum(), context, retain_graph=True)
    (through_y,) = torch.autograd.grad(y, context, expected)
    torch.testing.assert_close(total, through_y)


@pytest.mark.parametrize("size", [1, 4, 24])
@pytest.mark.parametrize("dim", [7, 40])
@pytest.mark.parametrize("case", [case for case in CASES if issubclass(case.formula, InverseAutoregressive)], ids=name)
def test_score_of_autoregressive_layers_is_that_of_the_dense_jacobian(case, dim, size, monkeypatch):
    """However many dimensions the back substitution takes together, and by whichever side of a network."""
    monkeypatch.setattr(made, "DENSE_SIZE", size)
    flow = case.flow(dim, 0.3, (4,), hidden_dims=[12, 30])
    x = torch.randn(4, dim)
    score = base(x)[1]
    leaf = x.clone().requires_grad_()
    (by_ladj,) = torch.autograd.grad(flow.forward_and_ladj(leaf)[1].sum(), leaf)
    dense = jacobian(lambda x: flow.forward_and_ladj(x)[0], x)
    expected = torch.linalg.solve(dense.mT, score - by_ladj)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(flow.forward_and_score(x, score)[2], expected, rtol=1e-9, atol=1e-9)
    y = flow.forward_and_ladj(x)[0].detach().requires_grad_()
    origin, ladj = flow.inverse_at(y, x, detach_parameters=True)
    (gradient,) = torch.autograd.grad(((origin * score).sum(-1) - ladj).sum(), y)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)
