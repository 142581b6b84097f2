"""The path gradient's view of a flow: the pair of a draw as a function of y alone, without solving anything."""

import copy

import pytest
import torch

from pyro_flowguides.transforms import Compose, Planar, autoregressive, solve, sylvester
from tests.transforms.families import CASES, CONDITIONAL, name, randomise

DIM = 3


def no_solving(monkeypatch):
    def solver(*_):
        raise AssertionError("the root is known: nothing is to be solved")

    monkeypatch.setattr(solve, "_iterate", solver)
    monkeypatch.setattr(solve, "tanh_newton", solver)
    monkeypatch.setattr(sylvester, "_back_substitute", solver)


def density(x, ladj):
    """Any smooth function of a pair will do."""
    return (x.sin() * torch.arange(1.0, DIM + 1)).sum() + ladj.square().sum()


def flows(case):
    flow = case.flow(DIM, 0.5, (4,))
    return [flow, Compose([flow, randomise(Planar(DIM), 0.5), flow])]


@pytest.mark.parametrize("case", CASES, ids=name)
def test_forward_and_path(case, monkeypatch):
    """Values are those of the pair; the gradient is that of the inverse with its parameters held, at y."""
    for flow in flows(case):
        parameters = [p for p in flow.parameters() if p.numel()]
        x = torch.randn(4, DIM)
        expected_y, expected_ladj = flow.forward_and_ladj(x)
        leaf = expected_y.detach().clone().requires_grad_()
        held = copy.deepcopy(flow).requires_grad_(False)
        (by_y,) = torch.autograd.grad(density(*held.inverse_and_ladj(leaf)), leaf)
        through_y = torch.autograd.grad(expected_y, parameters, by_y, allow_unused=True) if parameters else ()

        with monkeypatch.context() as patch:
            if flow.fast != "inverse":  # MAF draws by solving; its path is then free
                no_solving(patch)
            y, path_x, ladj = flow.forward_and_path(x)
        for one, other in ((y, expected_y), (path_x, x), (ladj, expected_ladj)):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
        if parameters:
            value = density(path_x, ladj)
            (gradient,) = torch.autograd.grad(value, y, retain_graph=True)
            torch.testing.assert_close(gradient, by_y, rtol=1e-7, atol=1e-8)
            for one, other in zip(torch.autograd.grad(value, parameters, allow_unused=True), through_y, strict=True):
                if other is not None:
                    torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_inverse_on_path(case, monkeypatch):
    for flow in flows(case):
        x = torch.randn(4, DIM)
        y = flow.forward_and_ladj(x)[0].detach().requires_grad_()
        expected_x, expected_ladj = flow.inverse_and_ladj(y)
        (by_y,) = torch.autograd.grad(density(expected_x, expected_ladj), y)
        with monkeypatch.context() as patch:
            if flow.fast != "inverse":
                no_solving(patch)
            path_x, ladj = flow.inverse_on_path(y, x)
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
            if flow.fast != "inverse":
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
    """The encoder behind a context is a parameter like any other."""
    module = case.build(DIM, 0.5)
    context = torch.randn(4, module.context_dim, requires_grad=True)
    y, path_x, ladj = module.condition(context).forward_and_path(torch.randn(4, DIM))
    value = density(path_x, ladj)
    (by_y,) = torch.autograd.grad(value, y, retain_graph=True)
    (total,) = torch.autograd.grad(value, context, retain_graph=True)
    (through_y,) = torch.autograd.grad(y, context, by_y)
    torch.testing.assert_close(total, through_y)


@pytest.mark.parametrize("case", [case for case in CASES if hasattr(case.formula, "_attach")], ids=name)
def test_many_dimensions_go_another_way_to_the_same_derivatives(case, monkeypatch):
    """Autoregressive layers take a dense Jacobian in few dimensions and iterate in many."""
    dim = 7
    flow = case.flow(dim, 0.7, (4,))
    x = torch.randn(4, dim)
    found = []
    for limit in (dim, dim - 1):
        monkeypatch.setattr(autoregressive, "DENSE_DIM", limit)
        y, path_x, ladj = flow.forward_and_path(x)
        weights = torch.arange(1.0, dim + 1)
        value = (path_x.sin() * weights).sum() + ladj.square().sum()
        found.append((path_x, ladj, torch.autograd.grad(value, y)[0]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert found[0][2].abs().max() > 0.1
