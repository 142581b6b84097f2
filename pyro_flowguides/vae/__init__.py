"""Variational autoencoders with flow posteriors and learned priors."""

from pyro_flowguides.vae.autoregressive import (
    Autoregressive,
    IndependentChannels,
    PixelLikelihood,
    PixelLogisticMixture,
)
from pyro_flowguides.vae.base import IAFVAE, VAE, Terms
from pyro_flowguides.vae.ema import EMA
from pyro_flowguides.vae.hierarchical import ConvIAF, HierarchicalVAE
from pyro_flowguides.vae.likelihoods import (
    LIKELIHOODS,
    Bernoulli,
    Categorical,
    DiscretisedLogistic,
    DiscretisedLogisticMixture,
    Likelihood,
)
from pyro_flowguides.vae.objective import ImportanceWeightedObjective, Objective, SoftFreeBitsObjective
from pyro_flowguides.vae.posteriors import NormalPosterior
from pyro_flowguides.vae.priors import FlowPrior, StandardNormal, VampPrior
from pyro_flowguides.vae.recipes import MODELS, NETWORKS
from pyro_flowguides.vae.vlae import DECODERS, VLAE

__all__ = [
    "DECODERS",
    "EMA",
    "IAFVAE",
    "LIKELIHOODS",
    "MODELS",
    "NETWORKS",
    "VAE",
    "VLAE",
    "Autoregressive",
    "Bernoulli",
    "Categorical",
    "ConvIAF",
    "DiscretisedLogistic",
    "DiscretisedLogisticMixture",
    "FlowPrior",
    "HierarchicalVAE",
    "ImportanceWeightedObjective",
    "IndependentChannels",
    "Likelihood",
    "NormalPosterior",
    "Objective",
    "PixelLikelihood",
    "PixelLogisticMixture",
    "SoftFreeBitsObjective",
    "StandardNormal",
    "Terms",
    "VampPrior",
]
