"""Variational autoencoders: models, posteriors, priors, and the recipes that build them by name."""

from pyro_flowguides.vae.models.components import NETWORKS
from pyro_flowguides.vae.models.conv_iaf import ConvIAF
from pyro_flowguides.vae.models.hierarchical import HierarchicalVAE
from pyro_flowguides.vae.models.iafvae import IAFVAE
from pyro_flowguides.vae.models.normal_posterior import NormalPosterior
from pyro_flowguides.vae.models.priors import FlowPrior, Prior, StandardNormal, VampPrior
from pyro_flowguides.vae.models.recipes import MODELS
from pyro_flowguides.vae.models.vae import VAE, Terms
from pyro_flowguides.vae.models.vlae import VLAE

__all__ = [
    "IAFVAE",
    "MODELS",
    "NETWORKS",
    "VAE",
    "VLAE",
    "ConvIAF",
    "FlowPrior",
    "HierarchicalVAE",
    "NormalPosterior",
    "Prior",
    "StandardNormal",
    "Terms",
    "VampPrior",
]
