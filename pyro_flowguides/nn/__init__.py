"""Networks that parametrise flows and VAEs: conditioners, hypernetworks, encoders and decoders (pure torch)."""

from pyro_flowguides.nn.dense import DenseDecoder, DenseEncoder, GaussianEncoder
from pyro_flowguides.nn.gated import GatedConvDecoder, GatedConvEncoder
from pyro_flowguides.nn.hyper import HyperNetwork
from pyro_flowguides.nn.made import MADE
from pyro_flowguides.nn.mlp import MLP
from pyro_flowguides.nn.resnet import ResNetDecoder, ResNetEncoder
from pyro_flowguides.nn.weight_norm import WeightNormConv2d, WeightNormLinear, data_dependent_initialisation

__all__ = [
    "MADE",
    "MLP",
    "DenseDecoder",
    "DenseEncoder",
    "GatedConvDecoder",
    "GatedConvEncoder",
    "GaussianEncoder",
    "HyperNetwork",
    "ResNetDecoder",
    "ResNetEncoder",
    "WeightNormConv2d",
    "WeightNormLinear",
    "data_dependent_initialisation",
]
