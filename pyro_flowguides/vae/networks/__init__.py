"""Encoders, decoders and weight normalization (pure torch)."""

from pyro_flowguides.vae.networks.dense import DenseDecoder, DenseEncoder, GaussianEncoder
from pyro_flowguides.vae.networks.gated_conv import GatedConvDecoder, GatedConvEncoder
from pyro_flowguides.vae.networks.resnet import ResNetDecoder, ResNetEncoder, SpatialDecoder, SpatialEncoder
from pyro_flowguides.vae.networks.weight_norm import WeightNormConv2d, WeightNormLinear, data_dependent_initialization

__all__ = ["DenseDecoder", "DenseEncoder", "GatedConvDecoder", "GatedConvEncoder", "GaussianEncoder", "ResNetDecoder"]
__all__ += ["ResNetEncoder", "SpatialDecoder", "SpatialEncoder"]
__all__ += ["WeightNormConv2d", "WeightNormLinear", "data_dependent_initialization"]
