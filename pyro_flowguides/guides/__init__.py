"""Autoguides and amortized posteriors made from flow recipes."""

from pyro_flowguides.guides.amortized import AutoAmortizedFlow
from pyro_flowguides.guides.autoflow import (
    AutoFlow,
    AutoIAF,
    AutoMAF,
    AutoNICE,
    AutoPlanar,
    AutoRadial,
    AutoRealNVP,
    AutoSylvester,
)
from pyro_flowguides.guides.flow_posterior import FlowPosterior

__all__ = [
    "AutoAmortizedFlow",
    "AutoFlow",
    "AutoIAF",
    "AutoMAF",
    "AutoNICE",
    "AutoPlanar",
    "AutoRadial",
    "AutoRealNVP",
    "AutoSylvester",
    "FlowPosterior",
]
