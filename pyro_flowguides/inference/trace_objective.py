"""The evidence lower bound through Pyro's own traces, for programs that no cheaper objective can evaluate."""

import math
import warnings
from functools import partial

import pyro
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from torch import Tensor

from pyro_flowguides.diagnostics.weights import weigh
from pyro_flowguides.inference.objective import Evaluation, Route, StepOptions
from pyro_flowguides.programs.program import Program

__all__ = ["TraceObjective"]

#: Most particles of a step where they run one after the other.
MAX_SEQUENTIAL_PARTICLES = 4


class TraceObjective:
    """The ELBO from Pyro's traces, with enumerated sites summed out: for any model and guide.

    Args:
        program: model and guide.
        reason: why no cheaper objective is used.
        vectorize: ``True`` to run all particles at once where that gives the right numbers, ``False`` to run them one
            after the other.
    """

    def __init__(self, program: Program, reason: str, vectorize: bool = True) -> None:
        self.program, self.parameters = program, program.parameters
        self.is_vectorized = vectorize and self._can_vectorize()
        self.route = Route("traced" if self.is_vectorized else "sequential", reason)

    def _can_vectorize(self) -> bool:
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                self._loss(2, vectorize=True)
                # That it runs does not prove it right. Weights of minibatches cannot be compared.
                if self.program.subsampled:
                    return True
                weighted = weigh(self.program, num_samples=3)
                return not (weighted.guide_note or weighted.model_note)
        except Exception:  # a program may fail in any way under a plate it was not written for
            return False

    def _loss(self, num_particles: int, vectorize: bool) -> Tensor:
        """Estimate the negative bound, differentiable if gradients are enabled."""
        program = self.program
        kind = partial(TraceEnum_ELBO, strict_enumeration_warning=False) if program.is_enumerating else Trace_ELBO
        elbo = kind(num_particles, program.nesting, vectorize_particles=vectorize)
        estimate = elbo.differentiable_loss if torch.is_grad_enabled() else elbo.loss
        return torch.as_tensor(estimate(program.model, program.guide, *program.args, **program.kwargs))

    def __call__(self, options: StepOptions, generator: torch.Generator) -> Evaluation:
        """Estimate the bound with draws from the global generator.

        Raises:
            ValueError: for an importance-weighted or tempered bound.
        """
        if options.importance > 1 or options.power != 1:
            raise ValueError("fit: importance weighting and tempering need a flow guide on a model that vectorizes")
        num_particles = options.num_particles
        if not self.is_vectorized:
            num_particles = min(num_particles, MAX_SEQUENTIAL_PARTICLES)
        with pyro.validation_enabled(False), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Encountered NaN", UserWarning)  # such steps are counted by the fit
            loss = self._loss(num_particles, self.is_vectorized)
        bound = -float(loss.detach())
        if not math.isfinite(bound):
            return Evaluation(loss.new_zeros(()), math.nan, num_particles)
        return Evaluation(loss, bound, 0)
