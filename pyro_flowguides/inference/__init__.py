"""Fitting guides: the log density of a model, warm start, objectives, schedule, ``fit``; and what runs whole fits."""

from pyro_flowguides.inference.compare import Comparison, compare
from pyro_flowguides.inference.fit import FitDivergedError, FitResult, fit
from pyro_flowguides.inference.neutra import neutra_mcmc
from pyro_flowguides.inference.vsbc import VSBC, vsbc

__all__ = ["VSBC", "Comparison", "FitDivergedError", "FitResult", "compare", "fit", "neutra_mcmc", "vsbc"]
