"""Neural transport: NUTS in the space of a trained guide's base distribution."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, Trace_ELBO
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.reparam import NeuTraReparam
from torch.testing import assert_close

from tests.guides.zoo import F64, SCHOOLS, make_guide, number, schools, schools_log_density, shake, train


def skewed(y):
    """A model with a posterior on the half line with known moments: Gamma(2 + 3, 1 + sum y)."""
    rate = pyro.sample("rate", dist.Gamma(number(2.0), number(1.0)))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Exponential(rate), obs=y)


def test_potential_is_the_log_joint_of_the_transformed_model(make):
    """Take the potential from initialize_model, as MCMC does."""
    guide = make(schools)
    guide.setup(SCHOOLS)
    shake(guide)
    neutra = NeuTraReparam(guide)
    params, potential, _, _ = initialize_model(neutra.reparam(schools), model_args=(SCHOOLS,))
    assert list(params) == ["mu_shared_latent"]
    (noise,) = params.values()
    latent, ladj = guide.get_transform().forward_and_ladj(noise)
    assert_close(potential(params), -(schools_log_density(latent, SCHOOLS) + ladj), rtol=1e-9, atol=1e-9)
    sites = neutra.transform_sample(noise)
    assert_close(torch.cat([sites["mu"][None], sites["tau"].log()[None], sites["theta"]]), latent)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_gradient_of_the_potential(make, jit):
    guide = make(schools)
    guide.setup(SCHOOLS)
    shake(guide).requires_grad_(False)
    model = NeuTraReparam(guide).reparam(schools)
    params, potential, _, _ = initialize_model(model, model_args=(SCHOOLS,), jit_compile=jit, skip_jit_warnings=True)
    (noise,) = params.values()

    def gradient(function):
        leaf = noise.detach().clone().requires_grad_()
        return torch.autograd.grad(function(leaf), leaf)[0]

    def by_hand(leaf):
        latent, ladj = guide.get_transform().forward_and_ladj(leaf)
        return -(schools_log_density(latent, SCHOOLS) + ladj)

    for _ in range(3):  # TorchScript differentiates by itself from its second run on
        found = gradient(lambda leaf: potential({"mu_shared_latent": leaf}))
        assert_close(found, gradient(by_hand), rtol=1e-8, atol=1e-8)


def sample(guide, y, num_samples, **options):
    neutra = NeuTraReparam(guide.requires_grad_(False))
    nuts = NUTS(neutra.reparam(skewed), **options)
    mcmc = MCMC(nuts, num_samples=num_samples, warmup_steps=max(10, num_samples // 3), disable_progbar=True)
    mcmc.run(y)
    # The dimension of the draws comes first, then that of the model's plate.
    return neutra.transform_sample(mcmc.get_samples()["rate_shared_latent"].unsqueeze(-2))["rate"]


RATES = torch.tensor([0.2, 0.5, 0.8], dtype=F64)


def test_nuts_runs(make):
    guide = make(skewed)
    guide.setup(RATES)
    rate = sample(shake(guide), RATES, 10, max_tree_depth=3)
    assert rate.dtype == F64
    assert (rate > 0).all()
    assert len(rate.unique()) > 5


def test_nuts_finds_the_moments_of_a_known_posterior():
    guide = make_guide("planar", skewed)
    train(skewed, guide, 40, RATES, lr=0.05, elbo=Trace_ELBO(num_particles=16, vectorize_particles=True))
    rate = sample(guide, RATES, 200, max_tree_depth=4)
    shape, scale = 5.0, 1 / 2.5
    assert_close(rate.mean().item(), shape * scale, atol=0.25, rtol=0)
    assert_close(rate.std().item(), shape**0.5 * scale, atol=0.2, rtol=0)
