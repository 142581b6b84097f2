"""Variational autoencoders: models, posteriors, priors, and the recipes that build them by name."""

from pyro_flowguides.vae.models.hierarchical import HierarchicalVAE
from pyro_flowguides.vae.models.ladder import ConvIAF
from pyro_flowguides.vae.models.latents import FlowPrior, NormalPosterior, Prior, StandardNormal, VampPrior
from pyro_flowguides.vae.models.recipes import MODELS, NETWORKS
from pyro_flowguides.vae.models.vae import IAFVAE, VAE, Terms
from pyro_flowguides.vae.models.vlae import VLAE

__all__ = ["IAFVAE", "MODELS", "NETWORKS", "VAE", "VLAE", "ConvIAF", "HierarchicalVAE", "Terms"]
__all__ += ["FlowPrior", "NormalPosterior", "Prior", "StandardNormal", "VampPrior"]
