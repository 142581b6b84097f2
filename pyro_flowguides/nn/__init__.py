"""Networks that parametrise flows and VAEs: conditioners, encoders, decoders, autoregressive decoders (pure torch)."""

from pyro_flowguides.nn.agnostic_made import AgnosticMADE
from pyro_flowguides.nn.autoregressive import AutoregressiveNetwork
from pyro_flowguides.nn.causal import MaskedConv2d, PaddedConv2d
from pyro_flowguides.nn.dense import DenseDecoder, DenseEncoder, GaussianEncoder
from pyro_flowguides.nn.gated import GatedConvDecoder, GatedConvEncoder
from pyro_flowguides.nn.gated_pixelcnn import GatedPixelCNN
from pyro_flowguides.nn.hyper import HyperNetwork
from pyro_flowguides.nn.made import MADE
from pyro_flowguides.nn.mlp import MLP
from pyro_flowguides.nn.pixelcnn import PixelCNN
from pyro_flowguides.nn.pixelcnnpp import PixelCNNPlusPlus
from pyro_flowguides.nn.pixelrnn import DiagonalBiLSTM, PixelRNN, RowLSTM
from pyro_flowguides.nn.resnet import ResNetDecoder, ResNetEncoder
from pyro_flowguides.nn.spatial import SpatialDecoder, SpatialEncoder
from pyro_flowguides.nn.wavenet import WaveNet
from pyro_flowguides.nn.weight_norm import WeightNormConv2d, WeightNormLinear, data_dependent_initialisation

__all__ = [
    "MADE",
    "MLP",
    "AgnosticMADE",
    "AutoregressiveNetwork",
    "DenseDecoder",
    "DenseEncoder",
    "DiagonalBiLSTM",
    "GatedConvDecoder",
    "GatedConvEncoder",
    "GatedPixelCNN",
    "GaussianEncoder",
    "HyperNetwork",
    "MaskedConv2d",
    "PaddedConv2d",
    "PixelCNN",
    "PixelCNNPlusPlus",
    "PixelRNN",
    "ResNetDecoder",
    "ResNetEncoder",
    "RowLSTM",
    "SpatialDecoder",
    "SpatialEncoder",
    "WaveNet",
    "WeightNormConv2d",
    "WeightNormLinear",
    "data_dependent_initialisation",
]
