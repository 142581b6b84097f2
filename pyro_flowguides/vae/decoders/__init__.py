"""Likelihoods, autoregressive networks over images and sequences, and the distributions made from them."""

from pyro_flowguides.vae.decoders.agnostic_made import AgnosticMADE
from pyro_flowguides.vae.decoders.autoregressive_decoder import AutoregressiveDistribution, AutoregressiveNetwork
from pyro_flowguides.vae.decoders.causal_conv import MaskedConv2d, PaddedConv2d
from pyro_flowguides.vae.decoders.decoder_registry import DECODERS, make_decoder
from pyro_flowguides.vae.decoders.likelihoods import (
    LIKELIHOODS,
    Bernoulli,
    Categorical,
    DiscretizedLogistic,
    DiscretizedLogisticMixture,
    Likelihood,
)
from pyro_flowguides.vae.decoders.pixel_likelihoods import IndependentChannels, PixelLikelihood, PixelLogisticMixture
from pyro_flowguides.vae.decoders.pixelcnn import GatedPixelCNN, PixelCNN
from pyro_flowguides.vae.decoders.pixelcnnpp import PixelCNNPlusPlus
from pyro_flowguides.vae.decoders.pixelrnn import DiagonalBiLSTM, PixelRNN, RowLSTM
from pyro_flowguides.vae.decoders.wavenet import WaveNet

__all__ = ["LIKELIHOODS", "Bernoulli", "Categorical", "DiscretizedLogistic", "DiscretizedLogisticMixture", "Likelihood"]
__all__ += ["IndependentChannels", "PixelLikelihood", "PixelLogisticMixture"]
__all__ += ["AutoregressiveDistribution", "AutoregressiveNetwork", "MaskedConv2d", "PaddedConv2d"]
__all__ += ["AgnosticMADE", "DiagonalBiLSTM", "GatedPixelCNN", "PixelCNN", "PixelCNNPlusPlus", "PixelRNN", "RowLSTM"]
__all__ += ["DECODERS", "WaveNet", "make_decoder"]
