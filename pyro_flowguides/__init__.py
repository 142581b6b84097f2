"""Flow posteriors for Pyro: transforms, recipes and autoguides, trained with reverse KL, and an honest verdict."""

from pyro_flowguides import diagnostics, flows, inference, nn, transforms
from pyro_flowguides.diagnostics import (
    Agreement,
    Diagnosis,
    agreement,
    diagnose,
    importance_resample,
    plot_khat,
    plot_pairs,
    plot_ppc,
    to_inference_data,
)
from pyro_flowguides.guides import (
    AutoAmortizedFlow,
    AutoFlow,
    AutoIAF,
    AutoMAF,
    AutoNICE,
    AutoPlanar,
    AutoRadial,
    AutoRealNVP,
    AutoSylvester,
    FlowPosterior,
)
from pyro_flowguides.inference import (
    VSBC,
    Comparison,
    FitDivergedError,
    FitResult,
    compare,
    fit,
    neutra_mcmc,
    vsbc,
)

__version__ = "0.1.0"

__all__ = [
    "VSBC",
    "Agreement",
    "AutoAmortizedFlow",
    "AutoFlow",
    "AutoIAF",
    "AutoMAF",
    "AutoNICE",
    "AutoPlanar",
    "AutoRadial",
    "AutoRealNVP",
    "AutoSylvester",
    "Comparison",
    "Diagnosis",
    "FitDivergedError",
    "FitResult",
    "FlowPosterior",
    "agreement",
    "compare",
    "diagnose",
    "diagnostics",
    "fit",
    "flows",
    "importance_resample",
    "inference",
    "neutra_mcmc",
    "nn",
    "plot_khat",
    "plot_pairs",
    "plot_ppc",
    "to_inference_data",
    "transforms",
    "vsbc",
]
