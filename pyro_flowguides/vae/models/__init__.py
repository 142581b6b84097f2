"""Variational autoencoders: models, posteriors, priors, and the recipes that build them by name."""

from pyro_flowguides.vae.models.base import IAFVAE, VAE, Terms
from pyro_flowguides.vae.models.hierarchical import ConvIAF, HierarchicalVAE
from pyro_flowguides.vae.models.normal_posterior import NormalPosterior
from pyro_flowguides.vae.models.priors import FlowPrior, StandardNormal, VampPrior
from pyro_flowguides.vae.models.recipes import MODELS, NETWORKS
from pyro_flowguides.vae.models.vlae import DECODERS, VLAE

__all__ = [
    "DECODERS",
    "IAFVAE",
    "MODELS",
    "NETWORKS",
    "VAE",
    "VLAE",
    "ConvIAF",
    "FlowPrior",
    "HierarchicalVAE",
    "NormalPosterior",
    "StandardNormal",
    "Terms",
    "VampPrior",
]
