"""What can be said of a fitted guide: weights, verdict, importance resampling, ArviZ export, plots.

All of it works on any Pyro guide: Pyro's autoguides, hand-written guides, and the flow guides of this package.
"""

from pyro_flowguides.diagnostics.defensive import WiderLook, defensive_log_weights
from pyro_flowguides.diagnostics.export import to_inference_data
from pyro_flowguides.diagnostics.fit_agreement import Agreement, agreement
from pyro_flowguides.diagnostics.plots import plot_elbo, plot_khat, plot_pairs, plot_ppc
from pyro_flowguides.diagnostics.psis import (
    ParetoSmoothed,
    effective_sample_size,
    khat_threshold,
    log_mean_weight,
    pareto_smooth,
)
from pyro_flowguides.diagnostics.resampling import importance_resample, resample
from pyro_flowguides.diagnostics.verdict import Diagnosis, diagnose, judge
from pyro_flowguides.diagnostics.weights import WeightedDraws, log_weights

__all__ = [
    "Agreement",
    "Diagnosis",
    "ParetoSmoothed",
    "WeightedDraws",
    "WiderLook",
    "agreement",
    "defensive_log_weights",
    "diagnose",
    "effective_sample_size",
    "importance_resample",
    "judge",
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
