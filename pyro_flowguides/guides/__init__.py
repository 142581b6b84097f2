"""Autoguides made from flow recipes."""

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

__all__ = ["AutoFlow", "AutoIAF", "AutoMAF", "AutoNICE", "AutoPlanar", "AutoRadial", "AutoRealNVP", "AutoSylvester"]
