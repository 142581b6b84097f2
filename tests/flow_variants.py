"""Registered flows with options other than the defaults, found by the names of the options that builders take."""

import inspect

from pyro_flowguides.flows import FLOWS

#: Options by a label; they apply to every flow that takes them all.
OPTIONS = {
    "householder": {"variant": "householder"},
    "triangular": {"variant": "triangular"},
    "gated": {"update": "gated"},
}


def find_variants(options=OPTIONS):
    """Return ``"flow-label" -> (flow, options)`` for all flows that take the options."""
    return {
        f"{flow}-{label}": (flow, values)
        for flow, builder in FLOWS.items()
        for label, values in options.items()
        if values.keys() <= inspect.signature(builder).parameters.keys()
    }
