"""Autoguides and amortized posteriors made from flow recipes; ``Auto<title>`` is the autoguide of a registered flow."""

from pyro_flowguides.guides.amortized import AutoAmortizedFlow
from pyro_flowguides.guides.autoflow import AutoFlow, RegisteredFlowGuide
from pyro_flowguides.guides.flow_posterior import FlowPosterior
from pyro_flowguides.guides.registered import find_guide, guide_names

__all__ = ["AutoAmortizedFlow", "AutoFlow", "FlowPosterior"]
__all__ += guide_names()


def __getattr__(name: str) -> type[RegisteredFlowGuide]:
    return find_guide(__name__, name)


def __dir__() -> list[str]:
    return sorted({*__all__, *guide_names()})
