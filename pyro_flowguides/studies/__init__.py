"""Studies that run whole fits: comparing guides, calibration by simulation, NUTS through a fitted guide."""

from pyro_flowguides.studies.calibration import VSBC, vsbc
from pyro_flowguides.studies.comparison import Comparison, compare
from pyro_flowguides.studies.neural_transport import neutra_mcmc

__all__ = ["VSBC", "Comparison", "compare", "neutra_mcmc", "vsbc"]
