"""Flows at known pairs: the path gradient and the derivatives of the inverse, without solving anything."""

from contextlib import contextmanager

import pytest
import torch

from pyro_flowguides.nn import MADE
from pyro_flowguides.transforms import Compose, InverseAutoregressive, Planar, solvers, with_path_gradient
from pyro_flowguides.transforms.families import sylvester
from tests.transforms.families import CASES, CONDITIONAL, jacobian, name, randomize

DIM = 3


@pytest.fixture
def solving_fails(monkeypatch):
    """Return a context in which solvers fail, for flows whose forward direction does not solve."""

    @contextmanager
    def context(flow):
        def solver(*_, **__):
            raise AssertionError("the root is known, and yet it is solved for")

        with monkeypatch.context() as patch:
            if flow.cheap_direction != "inverse":
                for owner, name in [
                    (MADE, "substitute"),
                    (MADE, "substitute_in_blocks"),
                    (solvers, "solve_tanh"),
                    (sylvester, "solve_tanh"),
                ]:
                    patch.setattr(owner, name, solver)
            yield

    return context


def some_function(x, ladj):
    """Return a smooth function of a pair."""
    return (x.sin() * torch.arange(1.0, DIM + 1)).sum() + ladj.square().sum()


def flows(case):
    """Return the flow alone, and between others."""
    flow = case.flow(DIM, 0.5, (4,))
    return [flow, Compose([flow, randomize(Planar(DIM), 0.5), flow])]


def base(x):
    """Return the log density of a draw's origin, and its score."""
    weights = torch.arange(1.0, x.shape[-1] + 1)
    return (x.sin() * weights).sum(-1), x.cos() * weights


@pytest.mark.parametrize("case", CASES, ids=name)
def test_forward_and_score(case, solving_fails):
    """Values are those of the pair; the score is the derivative of the density at y, with its parameters held."""
    for flow in flows(case):
        x = torch.randn(4, DIM)
        expected_y, expected_ladj = flow.forward_and_ladj(x)
        leaf = expected_y.detach().clone().requires_grad_()
        origin, inverse_ladj = flow.inverse_and_ladj(leaf)
        (expected,) = torch.autograd.grad((base(origin)[0] - inverse_ladj).sum(), leaf)
        with solving_fails(flow):
            y, ladj, score = flow.forward_and_score(x, base(x)[1])
        for one, other in ((y, expected_y), (ladj, expected_ladj)):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(score, expected, rtol=1e-7, atol=1e-8)
        assert not ladj.requires_grad
        assert not score.requires_grad
        assert y.requires_grad == expected_y.requires_grad


def test_with_path_gradient_keeps_values_and_has_the_score_as_derivative():
    y = torch.randn(4, DIM, requires_grad=True)
    value, score = y.square().sum(-1), torch.randn(4, DIM)
    on_path = with_path_gradient(value, y, score)
    torch.testing.assert_close(on_path, value)
    torch.testing.assert_close(torch.autograd.grad(on_path.sum(), y)[0], score)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_inverse_at_with_detached_parameters_depends_on_y_only(case, solving_fails):
    for flow in flows(case):
        x = torch.randn(4, DIM)
        y = flow.forward_and_ladj(x)[0].detach().requires_grad_()
        expected_x, expected_ladj = flow.inverse_and_ladj(y)
        (by_y,) = torch.autograd.grad(some_function(expected_x, expected_ladj), y)
        with solving_fails(flow):
            path_x, ladj = flow.inverse_at(y, x, detach_parameters=True)
        torch.testing.assert_close(path_x, x, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(ladj, expected_ladj, rtol=1e-8, atol=1e-8)
        gradient, *others = torch.autograd.grad(
            some_function(path_x, ladj), [y, *(p for p in flow.parameters() if p.numel())], allow_unused=True
        )
        torch.testing.assert_close(gradient, by_y, rtol=1e-7, atol=1e-8)
        assert not any(other is not None for other in others)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_inverse_at_has_all_derivatives_of_the_inverse(case, solving_fails):
    for flow in flows(case):
        x = torch.randn(4, DIM)
        y = flow.forward_and_ladj(x)[0].detach().requires_grad_()
        leaves = [y, *(p for p in flow.parameters() if p.numel())]
        expected = torch.autograd.grad(some_function(*flow.inverse_and_ladj(y)), leaves, allow_unused=True)
        with solving_fails(flow):
            known_x, ladj = flow.inverse_at(y, x)
        torch.testing.assert_close(known_x, x, rtol=1e-8, atol=1e-8)
        gradients = torch.autograd.grad(some_function(known_x, ladj), leaves, allow_unused=True)
        for one, other in zip(gradients, expected, strict=True):
            assert (one is None) == (other is None)
            if other is not None:
                torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("case", CONDITIONAL, ids=name)
def test_context_is_held_too(case):
    """The encoder behind a context is a parameter like any other: its gradient comes through the draw alone."""
    module = case.build(DIM, 0.5)
    context = torch.randn(4, module.context_dim, requires_grad=True)
    x = torch.randn(4, DIM)
    y, ladj, score = module.condition(context).forward_and_score(x, base(x)[1])
    leaf = y.detach().requires_grad_()
    origin, inverse_ladj = module.condition(context.detach()).inverse_and_ladj(leaf)
    (expected,) = torch.autograd.grad((base(origin)[0] - inverse_ladj).sum(), leaf)
    torch.testing.assert_close(score, expected, rtol=1e-7, atol=1e-8)
    (total,) = torch.autograd.grad(with_path_gradient(base(x)[0] - ladj, y, score).sum(), context, retain_graph=True)
    (through_y,) = torch.autograd.grad(y, context, expected)
    torch.testing.assert_close(total, through_y)


@pytest.mark.parametrize("hidden_dims", [[], [5, 30], [12, 30], [90, 70]], ids=str)
@pytest.mark.parametrize("dim", [7, 40, 80])
@pytest.mark.parametrize("case", [case for case in CASES if issubclass(case.formula, InverseAutoregressive)], ids=name)
def test_score_of_autoregressive_layers_is_that_of_the_dense_jacobian(case, dim, hidden_dims):
    """For one block and for several blocks of the back substitution, with fewer inputs than units or fewer units."""
    flow = case.flow(dim, 0.3 if dim < 80 else 0.1, (4,), hidden_dims=hidden_dims)
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
