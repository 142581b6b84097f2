"""Studies that run whole fits: comparing guides, calibration by simulation, NUTS through a fitted guide."""

from pyro_flowguides.studies.calibration import vsbc
from pyro_flowguides.studies.calibration_result import VSBC
from pyro_flowguides.studies.comparison import compare
from pyro_flowguides.studies.comparison_result import Comparison
from pyro_flowguides.studies.neural_transport import neutra_mcmc

__all__ = ["VSBC", "Comparison", "compare", "neutra_mcmc", "vsbc"]
