"""Pyro models and guides, inspected once: their structure, their log density, and their runs on many draws."""

from pyro_flowguides.programs.batched_run import NotVectorizedError, RunMode
from pyro_flowguides.programs.log_density import LogDensity
from pyro_flowguides.programs.program import Program

__all__ = ["LogDensity", "NotVectorizedError", "Program", "RunMode"]
