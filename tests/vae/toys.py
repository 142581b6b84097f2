"""Models with known answers."""

import math

import torch
from torch import nn
from torch.distributions import MultivariateNormal, constraints

from pyro_flowguides.vae import VAE, StandardNormal
from pyro_flowguides.vae.decoders.likelihoods import Likelihood

NOISE = 0.5


class Gaussian(Likelihood):
    """A Gaussian with fixed deviation: the likelihood of probabilistic principal components."""

    parameters_per_value = 1
    low, high = -1.0, 1.0
    support = constraints.real
    expected_data = "real numbers"

    def log_prob(self, params, x):
        return -0.5 * ((x - params[..., 0]) / NOISE) ** 2 - math.log(NOISE * math.sqrt(2 * math.pi))

    def mean(self, params):
        return params[..., 0]

    def sample(self, params):
        return params[..., 0] + NOISE * torch.randn_like(params[..., 0])

    def standardize(self, x):
        return x


class ExactEncoder(nn.Module):
    """The posterior of the linear model below, which is diagonal; ``stretch`` makes its scale wrong."""

    latent_dim, context_dim = 2, 3

    def __init__(self, weight, stretch=1.0):
        super().__init__()
        precision = 1 + (weight * weight).sum(0) / NOISE**2
        self.register_buffer("to_mean", weight / NOISE**2 / precision)
        self.register_buffer("scale", stretch * precision.rsqrt())

    def forward(self, x):
        loc = x @ self.to_mean
        return loc, self.scale.expand_as(loc), x


def linear_vae(posterior, stretch=1.0, prior=None):
    """x = W z + noise in 3 dimensions with orthogonal columns; also the distribution of x."""
    weight = torch.tensor([[1.0, 0.5], [-1.0, 0.5], [0.0, 1.5]])
    decoder = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Unflatten(-1, (3, 1)))
    with torch.no_grad():
        decoder[0].weight.copy_(weight)
    vae = VAE(
        ExactEncoder(weight, stretch), decoder, Gaussian(), posterior, prior or StandardNormal(2), data_shape=(3,)
    )
    marginal = MultivariateNormal(torch.zeros(3), weight @ weight.mT + NOISE**2 * torch.eye(3))
    return vae, marginal
