"""Training: losses, averages of the weights, images, settings, and the loop on Lightning Fabric."""

from pyro_flowguides.vae.training.ema import EMA
from pyro_flowguides.vae.training.image_files import load_images
from pyro_flowguides.vae.training.images import Images, Minibatches, derive_seed
from pyro_flowguides.vae.training.loop import TrainingDivergedError, train
from pyro_flowguides.vae.training.losses import ELBOLoss, ImportanceWeightedLoss, SoftFreeBitsLoss
from pyro_flowguides.vae.training.run_folder import load_model
from pyro_flowguides.vae.training.settings import Settings

__all__ = ["EMA", "ELBOLoss", "ImportanceWeightedLoss", "SoftFreeBitsLoss"]
__all__ += ["Images", "Minibatches", "derive_seed", "load_images"]
__all__ += ["Settings", "TrainingDivergedError", "load_model", "train"]
