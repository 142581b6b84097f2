"""Networks that parametrise flows and VAEs: conditioners, hypernetworks, encoders and decoders (pure torch)."""

from pyro_flowguides.nn.dense import DenseDecoder, DenseEncoder, GaussianEncoder
from pyro_flowguides.nn.hyper import HyperNetwork
from pyro_flowguides.nn.made import MADE
from pyro_flowguides.nn.mlp import MLP

__all__ = ["MADE", "MLP", "DenseDecoder", "DenseEncoder", "GaussianEncoder", "HyperNetwork"]
