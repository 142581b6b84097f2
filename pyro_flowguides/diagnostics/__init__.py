"""Assess a fitted guide: importance weights, verdict, importance resampling, ArviZ export, plots.

Everything works with any Pyro guide: Pyro's autoguides, hand-written guides, and the flow guides of this package.
"""

from pyro_flowguides.diagnostics.defensive import DefensiveCheck, defensive_log_weights
from pyro_flowguides.diagnostics.export import to_inference_data
from pyro_flowguides.diagnostics.fit_agreement import Agreement, agreement
from pyro_flowguides.diagnostics.plots import plot_elbo, plot_khat, plot_pairs, plot_ppc
from pyro_flowguides.diagnostics.psis import (
    ParetoSmoothed,
    effective_sample_size,
    importance_resample,
    khat_threshold,
    log_mean_weight,
    pareto_smooth,
    resample,
)
from pyro_flowguides.diagnostics.verdict import Diagnosis, diagnose, diagnose_draws
from pyro_flowguides.diagnostics.weights import WeightedDraws, log_weights

__all__ = [
    "Agreement",
    "DefensiveCheck",
    "Diagnosis",
    "ParetoSmoothed",
    "WeightedDraws",
    "agreement",
    "defensive_log_weights",
    "diagnose",
    "diagnose_draws",
    "effective_sample_size",
    "importance_resample",
    "khat_threshold",
    "log_mean_weight",
    "log_weights",
    "pareto_smooth",
    "plot_elbo",
    "plot_khat",
    "plot_pairs",
    "plot_ppc",
    "resample",
    "to_inference_data",
]
