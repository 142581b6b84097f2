"""Training: losses, averages of the weights, data, settings, and the loop on Lightning Fabric."""

from pyro_flowguides.vae.training.ema import EMA
from pyro_flowguides.vae.training.losses import ELBOLoss, ImportanceWeightedLoss, SoftFreeBitsLoss

__all__ = ["EMA", "ELBOLoss", "ImportanceWeightedLoss", "SoftFreeBitsLoss"]
