"""Networks that parametrize flows (pure torch)."""

from pyro_flowguides.nn.hyper import HyperNetwork
from pyro_flowguides.nn.made import MADE
from pyro_flowguides.nn.mlp import MLP

__all__ = ["MADE", "MLP", "HyperNetwork"]
