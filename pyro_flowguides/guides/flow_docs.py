"""Descriptions of registered flows, taken from the docstrings of their builders and layers.

The docstrings of the autoguides are made from them, and so are the tables of the documentation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pyro_flowguides import transforms
from pyro_flowguides.flows import FLOWS, Builder
from pyro_flowguides.transforms import Compose, Flow
from pyro_flowguides.transforms.docstrings import Docstring, parse_docstring

__all__ = ["FlowDescription", "describe_flow"]


@dataclass(frozen=True)
class FlowDescription:
    """The docstrings of a builder and of the layers that it builds.

    Attributes:
        builder: the builder's docstring.
        layer: the class of the first layer of a flow without a context.
        layer_docs: the docstring of that class.
    """

    builder: Docstring
    layer: type[Flow]
    layer_docs: Docstring

    @property
    def layer_path(self) -> str:
        """The dotted name of the layer's class, the public one if there is one."""
        name = self.layer.__name__
        is_public = getattr(transforms, name, None) is self.layer
        return f"{transforms.__name__ if is_public else self.layer.__module__}.{name}"


def describe_flow(name: str) -> FlowDescription:
    """Describe a registered flow.

    Example:
        >>> from pyro_flowguides.guides.flow_docs import describe_flow
        >>> describe_flow("radial").layer.__name__
        'Radial'
    """
    recipe = FLOWS[name]
    layer = _first_layer(recipe)
    return FlowDescription(parse_docstring(recipe.__doc__), layer, parse_docstring(layer.__doc__))


def _first_layer(builder: Builder) -> type[Flow]:
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        flow = builder(2)
    layer = flow.parts[0] if isinstance(flow, Compose) else flow
    assert isinstance(layer, Flow)
    return type(layer)
