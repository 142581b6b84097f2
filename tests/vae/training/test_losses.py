"""Losses, on terms with known answers."""

import pytest
import torch

from pyro_flowguides.vae import ELBOLoss, ImportanceWeightedLoss, SoftFreeBitsLoss, Terms


def made_up_terms(kl, log_likelihood=-10.0):
    """S = 2 draws of B = 3 data, with the given mean divergence of each group, spread over draws and data."""
    kl = torch.tensor(kl, dtype=torch.float64).requires_grad_()
    spread = torch.tensor([[-1.0, 0.0, 1.0], [2.0, -2.0, 0.0]], dtype=torch.float64)[..., None]
    ll = torch.full((2, 3), log_likelihood, dtype=torch.float64, requires_grad=True)
    return Terms(ll + spread[..., 0], kl + spread, torch.zeros(2, 3, 1)), kl


def test_the_plain_loss_is_the_negative_bound():
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
    loss_fn = SoftFreeBitsLoss(free_bits=4.0, rate=0.1, tolerance=0.05)
    low, high, right = (made_up_terms([value])[0] for value in (3.0, 5.0, 4.1))
    loss, metrics = loss_fn(low, step=0)
    assert loss.item() == pytest.approx(13)
    assert metrics["gamma"].item() == 1
    assert loss_fn.gamma.item() == pytest.approx(1 / 1.1)
    loss, metrics = loss_fn(low, step=1)
    assert loss.item() == pytest.approx(10 + 3 / 1.1)
    assert loss_fn.gamma.item() == pytest.approx(1 / 1.1**2)
    loss_fn(right, step=2)
    assert loss_fn.gamma.item() == pytest.approx(1 / 1.1**2)
    loss_fn(high, step=3)
    assert loss_fn.gamma.item() == pytest.approx(1 / 1.1)
    for step in range(5):
        loss_fn(high, step)
    assert loss_fn.gamma.item() == 1
    for step in range(200):
        loss_fn(low, step)
    assert loss_fn.gamma.item() == pytest.approx(1e-4)


def test_soft_free_bits_keep_a_gradient_below_the_target():
    terms, kl = made_up_terms([0.5])
    SoftFreeBitsLoss(free_bits=4.0)(terms, step=0)[0].backward()
    assert kl.grad.item() == pytest.approx(1)


def test_the_soft_weight_does_not_change_in_evaluation_or_during_warm_up():
    loss_fn, (low, _) = SoftFreeBitsLoss(free_bits=4.0, warmup_steps=10), made_up_terms([3.0])
    loss_fn(low, step=5)
    assert loss_fn.gamma.item() == 1
    loss_fn.eval()(low, step=50)
    assert loss_fn.gamma.item() == 1
    loss_fn.train()(low, step=50)
    assert loss_fn.gamma.item() < 1


def test_the_soft_weight_is_saved():
    loss_fn, (low, _) = SoftFreeBitsLoss(free_bits=4.0), made_up_terms([3.0])
    loss_fn(low, step=0)
    other = SoftFreeBitsLoss(free_bits=4.0)
    other.load_state_dict(loss_fn.state_dict())
    assert other.gamma.item() == loss_fn.gamma.item() < 1


def test_importance_weighted_loss():
    terms, _ = made_up_terms([2.0, 3.0])
    loss, metrics = ImportanceWeightedLoss()(terms, step=0)
    weights = (terms.log_likelihood - terms.kl.sum(-1)).exp()
    assert loss.item() == pytest.approx(-weights.mean(0).log().mean().item())
    assert metrics["bound"].item() == pytest.approx(-loss.item())
    assert metrics["elbo"].item() == pytest.approx(-15)


@pytest.mark.parametrize("loss_type", [ELBOLoss, SoftFreeBitsLoss])
@pytest.mark.parametrize("option", ["warmup_steps", "free_bits"])
def test_negative_options_are_refused(loss_type, option):
    with pytest.raises(ValueError, match=f"{loss_type.__name__}: {option} must not be negative, got -1"):
        loss_type(**{option: -1})
