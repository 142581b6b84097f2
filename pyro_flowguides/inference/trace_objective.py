"""The evidence lower bound by Pyro's own traces, for whatever has no cheaper route."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import pyro
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO

from pyro_flowguides.diagnostics.weights import weigh
from pyro_flowguides.inference.flat_adam import Descent
from pyro_flowguides.inference.steps import Request, Step, Taken
from pyro_flowguides.programs.program import Program

__all__ = ["TraceObjective"]

#: Most particles of a step where they must run one after the other.
MAX_SEQUENTIAL = 4


class TraceObjective:
    """The ELBO from Pyro's own traces, enumerated sites summed out: for any model and guide.

    Args:
        program: model and guide.
        why: why the cheaper route was not taken.
        vectorize: run all particles at once where that gives the right numbers; one after the other otherwise.
    """

    def __init__(
        self,
        program: Program,
        why: str,
        vectorize: bool = True,
    ) -> None:
        self.program, self.parameters = program, program.parameters
        self.vectorized = vectorize and self._vectorizes()
        self.route = f"Pyro traces ({why}{'' if self.vectorized else '; one particle at a time'})"

    def _vectorizes(self) -> bool:
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                program = self.program
                self._elbo(2, True).loss(program.model, program.guide, *program.args, **program.kwargs)
                # That it runs does not prove it right. Weights of minibatches cannot be compared.
                if program.subsampled:
                    return True
                weighted = weigh(program, num_samples=3)
                return not (weighted.guide_note or weighted.model_note)
        except Exception:  # a program may fail in any way under a plate it was not written for
            return False

    def _elbo(self, particles: int, vectorized: bool) -> Any:
        if self.program.is_enumerating:
            return TraceEnum_ELBO(
                particles, self.program.nesting, vectorize_particles=vectorized, strict_enumeration_warning=False
            )
        return Trace_ELBO(particles, self.program.nesting, vectorize_particles=vectorized)

    def __call__(self, request: Request, generator: torch.Generator) -> Step:
        if request.importance > 1 or request.power != 1:
            raise ValueError("fit: importance weighting and tempering need a flow guide on a model that vectorizes")
        particles = request.particles if self.vectorized else min(request.particles, MAX_SEQUENTIAL)
        with pyro.validation_enabled(False), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Encountered NaN", UserWarning)  # counted, and reported where hopeless
            elbo = self._elbo(particles, self.vectorized)
            evaluate = elbo.differentiable_loss if torch.is_grad_enabled() else elbo.loss
            program = self.program
            loss = torch.as_tensor(evaluate(program.model, program.guide, *program.args, **program.kwargs))
        value = -float(loss.detach())
        if not math.isfinite(value):
            return Step(loss.new_zeros(()), math.nan, particles)
        return Step(loss, value, 0)

    def descend(
        self, request: Request, generator: torch.Generator, descent: Descent, rates: Sequence[float]
    ) -> list[Taken]:
        """Evaluate, and take a step down."""
        step = self(request, generator)
        return [Taken(step, math.isfinite(step.elbo) and descent.follow(step.loss, rates[0]))]
