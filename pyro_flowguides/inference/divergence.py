"""Fits that diverge: where the density stops being finite."""

import math
import warnings
from typing import cast

import pyro
import torch
from pyro import poutine

from pyro_flowguides.programs.program import Program
from pyro_flowguides.programs.types import Site

__all__ = ["FitDivergedError", "describe_divergence"]


class FitDivergedError(RuntimeError):
    """The bound or its gradient was not finite for too many steps in a row."""


def describe_divergence(program: Program, num_samples: int) -> str:
    """Name the first site whose log density is not finite at a draw of the guide, for the end of a message."""
    args, kwargs = program.args, program.kwargs
    with torch.no_grad(), pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(num_samples):
            drawn = poutine.trace(program.guide).get_trace(*args, **kwargs)
            try:
                trace = poutine.trace(poutine.replay(program.model, trace=drawn)).get_trace(*args, **kwargs)
                trace.compute_log_prob()
            except (ValueError, RuntimeError) as error:
                return f"; the model fails at a draw of the guide: {error}"
            for name, site in cast("dict[str, Site]", trace.nodes).items():
                if site["type"] == "sample" and not math.isfinite(float(site["log_prob_sum"])):
                    return f"; the log density is not finite at site {name!r}"
    return ""
