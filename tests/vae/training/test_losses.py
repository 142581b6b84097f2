"""Objectives and averages of weights, on terms with known answers."""

import math

import pytest
import torch
from torch import nn

from pyro_flowguides.vae import EMA, ELBOLoss, ImportanceWeightedLoss, SoftFreeBitsLoss, Terms


def made_up_terms(kl, log_likelihood=-10.0):
    """S = 2 draws of B = 3 data, with the given mean divergence of each group, spread over draws and data."""
    kl = torch.tensor(kl, dtype=torch.float64).requires_grad_()
    spread = torch.tensor([[-1.0, 0.0, 1.0], [2.0, -2.0, 0.0]], dtype=torch.float64)[..., None]
    ll = torch.full((2, 3), log_likelihood, dtype=torch.float64, requires_grad=True)
    return Terms(ll + spread[..., 0], kl + spread, torch.zeros(2, 3, 1)), kl


def test_plain_objective_is_the_negative_bound():
    terms, _ = made_up_terms([2.0, 3.0])
    loss, metrics = ELBOLoss()(terms, step=0)
    assert loss.item() == pytest.approx(15)
    assert metrics["elbo"].item() == pytest.approx(-15)
    assert metrics["reconstruction"].item() == pytest.approx(-10)
    assert metrics["kl"].item() == pytest.approx(5)
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize(("step", "weight"), [(0, 0), (25, 0.25), (100, 1), (1000, 1)])
def test_warm_up_is_linear(step, weight):
    terms, kl = made_up_terms([2.0, 3.0])
    loss, metrics = ELBOLoss(warmup_steps=100)(terms, step)
    assert loss.item() == pytest.approx(10 + 5 * weight)
    assert metrics["elbo"].item() == pytest.approx(-15)
    assert metrics["kl_weight"].item() == pytest.approx(weight)
    loss.backward()
    torch.testing.assert_close(kl.grad, torch.full_like(kl, weight))


def test_hard_free_bits_hold_per_group():
    terms, kl = made_up_terms([0.5, 3.0])
    loss, _ = ELBOLoss(free_bits=1.0)(terms, step=0)
    assert loss.item() == pytest.approx(10 + 1 + 3)
    loss.backward()
    torch.testing.assert_close(kl.grad, torch.tensor([0.0, 1.0], dtype=torch.float64))


def test_soft_free_bits_steer_the_weight_towards_the_target():
    objective = SoftFreeBitsLoss(free_bits=4.0, rate=0.1, tolerance=0.05)
    low, high, right = (made_up_terms([value])[0] for value in (3.0, 5.0, 4.1))
    loss, metrics = objective(low, step=0)
    assert loss.item() == pytest.approx(13)
    assert metrics["gamma"].item() == 1
    assert objective.gamma.item() == pytest.approx(1 / 1.1)
    loss, metrics = objective(low, step=1)
    assert loss.item() == pytest.approx(10 + 3 / 1.1)
    assert objective.gamma.item() == pytest.approx(1 / 1.1**2)
    objective(right, step=2)
    assert objective.gamma.item() == pytest.approx(1 / 1.1**2)
    objective(high, step=3)
    assert objective.gamma.item() == pytest.approx(1 / 1.1)
    for step in range(5):
        objective(high, step)
    assert objective.gamma.item() == 1
    for step in range(200):
        objective(low, step)
    assert objective.gamma.item() == pytest.approx(1e-4)


def test_soft_free_bits_keep_a_gradient_below_the_target():
    terms, kl = made_up_terms([0.5])
    SoftFreeBitsLoss(free_bits=4.0)(terms, step=0)[0].backward()
    assert kl.grad.item() == pytest.approx(1)


def test_the_soft_weight_rests_in_evaluation_and_during_warm_up():
    objective, (low, _) = SoftFreeBitsLoss(free_bits=4.0, warmup_steps=10), made_up_terms([3.0])
    objective(low, step=5)
    assert objective.gamma.item() == 1
    objective.eval()(low, step=50)
    assert objective.gamma.item() == 1
    objective.train()(low, step=50)
    assert objective.gamma.item() < 1


def test_the_soft_weight_is_saved():
    objective, (low, _) = SoftFreeBitsLoss(free_bits=4.0), made_up_terms([3.0])
    objective(low, step=0)
    other = SoftFreeBitsLoss(free_bits=4.0)
    other.load_state_dict(objective.state_dict())
    assert other.gamma.item() == objective.gamma.item() < 1


def test_importance_weighted_objective():
    terms, _ = made_up_terms([2.0, 3.0])
    loss, metrics = ImportanceWeightedLoss()(terms, step=0)
    weights = (terms.log_likelihood - terms.kl.sum(-1)).exp()
    assert loss.item() == pytest.approx(-weights.mean(0).log().mean().item())
    assert metrics["bound"].item() == pytest.approx(-loss.item())
    assert metrics["elbo"].item() == pytest.approx(-15)


@pytest.mark.parametrize("objective", [ELBOLoss, SoftFreeBitsLoss])
@pytest.mark.parametrize("option", ["warmup_steps", "free_bits"])
def test_negative_options_are_refused(objective, option):
    with pytest.raises(ValueError, match=option):
        objective(**{option: -1})


# -- averages ----------------------------------------------------------------------------------------------------------


def line(value):
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, value)
    return module


def test_the_average_follows_its_recursion():
    module = line(0.0)
    ema, wanted = EMA(module, decay=0.5), 0.0
    for step, value in enumerate([1.0, 5.0, -2.0, 4.0, 0.0, 1.0, 7.0, 2.0, 3.0, 9.0, 8.0, 1.0], start=1):
        nn.init.constant_(module.weight, value)
        ema.update(module)
        decay = min(0.5, step / (step + 9))
        wanted = decay * wanted + (1 - decay) * value
        assert ema.averages["weight"].item() == pytest.approx(wanted, rel=1e-6)


def test_the_average_is_applied_for_a_while():
    module = line(0.0)
    ema = EMA(module, decay=0.0)
    nn.init.constant_(module.weight, 3.0)
    ema.update(module)
    nn.init.constant_(module.weight, 8.0)
    with ema.applied(module):
        assert module.weight.item() == 3
    assert module.weight.item() == 8
    with pytest.raises(ZeroDivisionError), ema.applied(module):
        math.fmod(1, 1 // 0)
    assert module.weight.item() == 8


def test_the_average_is_saved_and_copied():
    module = line(0.0)
    ema = EMA(module, decay=0.9)
    nn.init.constant_(module.weight, 3.0)
    ema.update(module)
    other = EMA(line(-1.0), decay=0.9)
    other.load_state_dict(ema.state_dict())
    for one in (ema, other):
        one.update(module)
    assert other.steps == 2
    assert other.averages["weight"].item() == ema.averages["weight"].item()
    assert other.averages["weight"] is not ema.averages["weight"]


def test_another_module_is_refused():
    ema = EMA(line(0.0))
    with pytest.raises(ValueError, match="bias"):
        ema.update(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="other parameters"):
        ema.load_state_dict({"steps": 0, "averages": {}})
    with pytest.raises(ValueError, match="decay"):
        EMA(line(0.0), decay=1.0)
