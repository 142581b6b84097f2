"""Distributions of the latent vector: exact densities at large weights, in the cheap direction."""

import math

import pyro
import pytest
import torch
from pyro.distributions import Normal

from pyro_flowguides.flows import FLOWS
from pyro_flowguides.vae import MODELS, FlowPrior, StandardNormal, VampPrior
from tests.transforms.families import jacobian, randomize


@pytest.fixture(autouse=True)
def _double_precision(_fresh_state):
    torch.set_default_dtype(torch.float64)


def to_noise(prior, z):
    """The map whose density is that of the prior, through its distribution."""
    return prior(None).transforms[0].inv(z)


@pytest.mark.parametrize("flow", FLOWS)
def test_the_density_of_a_flow_prior(flow):
    prior = randomize(FlowPrior(3, flow, depth=2), 0.4)
    z = torch.randn(4, 3)
    noise, j = to_noise(prior, z), jacobian(lambda v: to_noise(prior, v), z)
    expected = Normal(0.0, 1.0).log_prob(noise).sum(-1) + torch.linalg.slogdet(j).logabsdet
    torch.testing.assert_close(prior(None).log_prob(z), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("flow", FLOWS)
def test_draws_of_a_flow_prior_are_draws_of_its_density(flow):
    prior = randomize(FlowPrior(2, flow, depth=2), 0.3)
    with torch.no_grad():
        noise = to_noise(prior, prior(None).sample((5000,)).clone())
    torch.testing.assert_close(noise.mean(0), torch.zeros(2), atol=0.06, rtol=0)
    torch.testing.assert_close(noise.mT.cov(), torch.eye(2), atol=0.09, rtol=0)


@pytest.mark.parametrize("flow", ["iaf", "maf"])
def test_the_density_of_an_autoregressive_prior_takes_one_pass(flow):
    calls = []

    def activation(x):
        calls.append(len(x))
        return torch.nn.functional.silu(x)

    prior = randomize(FlowPrior(5, flow, depth=3, hidden_dims=[8], activation=activation), 0.3)
    for log_prob in (prior(None).log_prob, lambda z: prior.log_prob(z, None)):
        calls.clear()
        log_prob(torch.randn(4, 5))
        assert calls == [4, 4, 4]


def test_standard_normal():
    z = torch.randn(4, 3)
    expected = -0.5 * (z * z).sum(-1) - 1.5 * math.log(2 * math.pi)
    torch.testing.assert_close(StandardNormal(3)(None).log_prob(z), expected)


def vamp(posterior="normal", components=5):
    return MODELS["vae"](
        (6,), latent_dim=2, hidden=[8], posterior=posterior, prior="vamp", prior_options={"components": components}
    )


@pytest.mark.parametrize("posterior", ["normal", "realnvp", "iaf"])
def test_a_vamp_prior_is_the_mixture_of_the_posteriors(posterior):
    vae = vamp(posterior)
    randomize(vae.encoder, 0.5)
    z = torch.randn(3, 4, 2)
    parts = [vae.posterior_at(u[None]).log_prob(z[..., None, :])[..., 0].exp() for u in vae.prior.pseudo_inputs]
    torch.testing.assert_close(vae.prior_distribution().log_prob(z), torch.stack(parts).mean(0).log())


def test_draws_of_a_vamp_prior_come_from_all_components():
    vae = vamp(components=3)
    vae.encoder.forward = lambda x: (x[:, :2], torch.full((len(x), 2), 1e-3), x)
    draws = vae.sample_prior(3000)
    nearest = torch.cdist(draws, vae.prior.pseudo_inputs[:, :2]).min(-1)
    assert nearest.values.max() < 0.01
    counts = nearest.indices.bincount(minlength=3)
    assert (counts - 1000).abs().max() < 4.5 * (3000 * 2 / 9) ** 0.5


def test_a_vamp_prior_in_a_plate():
    d = vamp().prior_distribution()
    with pyro.plate("data", 7):
        assert pyro.sample("z", d).shape == (7, 2)
    torch.testing.assert_close(d.expand([7]).log_prob(torch.ones(7, 2)), d.log_prob(torch.ones(2)).expand(7))


def test_pseudo_inputs_lie_in_the_range_of_the_data():
    prior = VampPrior(2, (50,), low=0.0, high=255.0, components=20)
    assert 0 <= prior.pseudo_inputs.min() < 100 < 150 < prior.pseudo_inputs.max() <= 255
    x = torch.randint(0, 256, (3, 50))
    prior.initialize(x)
    distance = (prior.pseudo_inputs[:, None] - x).abs().amax(-1).amin(1)
    assert distance.max() <= 0.021 * 255


def test_wrong_sizes():
    with pytest.raises(ValueError, match="latent_dim"):
        StandardNormal(0)
    with pytest.raises(ValueError, match="components"):
        VampPrior(2, (3,), components=0)
    with pytest.raises(ValueError, match="did you mean 'iaf'"):
        FlowPrior(2, "ia")
