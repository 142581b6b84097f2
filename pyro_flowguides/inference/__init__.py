"""Fitting guides: warm start, objectives, steps, schedule, ``fit``."""

from pyro_flowguides.inference.fitting import FitResult, fit
from pyro_flowguides.inference.run import FitDivergedError
from pyro_flowguides.inference.step_loop import Stepper

__all__ = ["FitDivergedError", "FitResult", "Stepper", "fit"]
