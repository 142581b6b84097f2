"""Fitting guides: warm start, objectives, steps, schedule, ``fit``."""

from pyro_flowguides.inference.divergence import FitDivergedError
from pyro_flowguides.inference.fitting import FitResult, fit
from pyro_flowguides.inference.stepper import Stepper

__all__ = ["FitDivergedError", "FitResult", "Stepper", "fit"]
