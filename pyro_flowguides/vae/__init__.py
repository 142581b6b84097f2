"""Variational autoencoders with flow posteriors, learned priors and autoregressive decoders."""

from pyro_flowguides.vae import decoders, models, networks, training
from pyro_flowguides.vae.decoders import *  # noqa: F403
from pyro_flowguides.vae.models import *  # noqa: F403
from pyro_flowguides.vae.networks import *  # noqa: F403
from pyro_flowguides.vae.training import *  # noqa: F403

__all__ = ["decoders", "models", "networks", "training"]
__all__ += decoders.__all__
__all__ += models.__all__
__all__ += networks.__all__
__all__ += training.__all__
