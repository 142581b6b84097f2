"""Flow posteriors for Pyro: transforms, recipes and autoguides, trained with reverse KL, and an honest verdict."""

import importlib
from typing import TYPE_CHECKING

from pyro_flowguides import diagnostics, flows, guides, inference, nn, programs, studies, transforms
from pyro_flowguides.diagnostics import (
    Agreement,
    Diagnosis,
    agreement,
    diagnose,
    importance_resample,
    plot_elbo,
    plot_khat,
    plot_pairs,
    plot_ppc,
    to_inference_data,
)
from pyro_flowguides.guides import AutoAmortizedFlow, AutoFlow, FlowPosterior
from pyro_flowguides.guides.autoflow import RegisteredFlowGuide
from pyro_flowguides.guides.registered import find_guide, guide_names
from pyro_flowguides.inference import FitDivergedError, FitResult, Stepper, fit
from pyro_flowguides.studies import VSBC, Comparison, compare, neutra_mcmc, vsbc

if TYPE_CHECKING:
    from pyro_flowguides import vae

__version__ = "0.1.0"

__all__ = [
    "VSBC",
    "Agreement",
    "AutoAmortizedFlow",
    "AutoFlow",
    "Comparison",
    "Diagnosis",
    "FitDivergedError",
    "FitResult",
    "FlowPosterior",
    "Stepper",
    "agreement",
    "compare",
    "diagnose",
    "diagnostics",
    "fit",
    "flows",
    "guides",
    "importance_resample",
    "inference",
    "neutra_mcmc",
    "nn",
    "plot_elbo",
    "plot_khat",
    "plot_pairs",
    "plot_ppc",
    "programs",
    "studies",
    "to_inference_data",
    "transforms",
    "vae",
    "vsbc",
]
__all__ += guide_names()


def __getattr__(name: str) -> type[RegisteredFlowGuide]:
    """Return the autoguide of a registered flow, or import ``pyro_flowguides.vae``, which nothing else needs."""
    if name == "vae":
        return importlib.import_module("pyro_flowguides.vae")  # type: ignore[return-value]
    return find_guide(__name__, name)


def __dir__() -> list[str]:
    return sorted({*__all__, *guide_names()})
