"""Fitting guides: warm start, objectives, steps, schedule, ``fit``."""

from pyro_flowguides.inference.fitting import FitDivergedError, FitResult, fit

__all__ = ["FitDivergedError", "FitResult", "fit"]
