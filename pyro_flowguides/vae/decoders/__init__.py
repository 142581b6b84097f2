"""Likelihoods, autoregressive networks over images and sequences, and the distributions made from them."""

from pyro_flowguides.vae.decoders.agnostic_made import AgnosticMADE
from pyro_flowguides.vae.decoders.autoregressive_distribution import AutoregressiveDistribution
from pyro_flowguides.vae.decoders.autoregressive_network import AutoregressiveNetwork
from pyro_flowguides.vae.decoders.causal_conv import MaskedConv2d, PaddedConv2d
from pyro_flowguides.vae.decoders.decoder_registry import DECODERS, make_decoder
from pyro_flowguides.vae.decoders.gated_pixelcnn import GatedPixelCNN
from pyro_flowguides.vae.decoders.likelihoods import (
    LIKELIHOODS,
    Bernoulli,
    Categorical,
    DiscretizedLogistic,
    DiscretizedLogisticMixture,
    Likelihood,
)
from pyro_flowguides.vae.decoders.pixel_likelihoods import IndependentChannels, PixelLikelihood, PixelLogisticMixture
from pyro_flowguides.vae.decoders.pixelcnn import PixelCNN
from pyro_flowguides.vae.decoders.pixelcnnpp import PixelCNNPlusPlus
from pyro_flowguides.vae.decoders.pixelrnn import DiagonalBiLSTM, PixelRNN, RowLSTM
from pyro_flowguides.vae.decoders.wavenet import WaveNet

__all__ = [
    "DECODERS",
    "LIKELIHOODS",
    "AgnosticMADE",
    "AutoregressiveDistribution",
    "AutoregressiveNetwork",
    "Bernoulli",
    "Categorical",
    "DiagonalBiLSTM",
    "DiscretizedLogistic",
    "DiscretizedLogisticMixture",
    "GatedPixelCNN",
    "IndependentChannels",
    "Likelihood",
    "MaskedConv2d",
    "PaddedConv2d",
    "PixelCNN",
    "PixelCNNPlusPlus",
    "PixelLikelihood",
    "PixelLogisticMixture",
    "PixelRNN",
    "RowLSTM",
    "WaveNet",
    "make_decoder",
]
