"""Objectives: how they are evaluated at one step, what an evaluation holds, and the bound through Pyro's own traces."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, Protocol, TypeAlias

import pyro
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from torch import Tensor

from pyro_flowguides.diagnostics.weights import weigh
from pyro_flowguides.programs.batched_run import NEVER_OF_A_DRAW
from pyro_flowguides.programs.program import Program

__all__ = ["Evaluation", "Objective", "Route", "RouteKind", "StepOptions", "TraceObjective"]

#: Most particles of a step of a :class:`TraceObjective` where they run one after the other.
MAX_SEQUENTIAL_PARTICLES = 4
#: Attempts to run particles together before they are run one after the other.
NUM_ATTEMPTS = 3

RouteKind: TypeAlias = Literal["compiled", "recorded", "batched", "traced", "sequential"]

_DESCRIPTIONS: dict[RouteKind, str] = {
    "compiled": "compiled steps",
    "recorded": "recorded steps",
    "batched": "steps that run the model on a batch of particles",
    "traced": "Pyro's traces, all particles in one run",
    "sequential": "Pyro's traces, one particle at a time",
}


@dataclass(frozen=True)
class Route:
    """How the steps of a fit evaluate the bound.

    Attributes:
        kind: the kind of evaluation, from the fastest to the slowest: ``"compiled"``, the tensor operations of a step
            and its update as one compiled function; ``"recorded"``, the same operations replayed without the Python
            code of the model; ``"batched"``, the model run anew at every step on a batch of particles; ``"traced"``,
            Pyro's traces of guide and model with all particles in one run; ``"sequential"``, Pyro's traces of one
            particle after the other.
        reason: why no faster kind is used; may be empty.
    """

    kind: RouteKind
    reason: str = ""

    def __str__(self) -> str:
        return _DESCRIPTIONS[self.kind] + (f" ({self.reason})" if self.reason else "")


@dataclass(frozen=True)
class StepOptions:
    """How to evaluate an objective at one step.

    Attributes:
        num_particles: number of draws.
        path_gradient: follow the path gradient where the guide offers it.
        power: exponent of the target density; below 1 it tempers the target.
        importance: 1 for the ELBO; K for the importance-weighted bound of groups of K particles.
    """

    num_particles: int
    path_gradient: bool = True
    power: float = 1.0
    importance: int = 1

    @property
    def recording_key(self) -> tuple[int, bool]:
        """Identify the tensor operations of the step: options with the same key share a recording."""
        return self.num_particles, self.path_gradient


class Evaluation(NamedTuple):
    """One estimate of the bound.

    Attributes:
        loss_or_gradient: the loss to differentiate; where its gradient has been computed already, the gradient, as one
            vector for each group of parameters.
        elbo: the estimate; NaN if no particle was finite.
        num_dropped: number of particles left out because they were not finite.
        gap: half the variance of the log weights, which for a nearly exact guide is the gap between the bound and the
            log evidence; NaN if unknown.
    """

    loss_or_gradient: Tensor | Sequence[Tensor]
    elbo: float
    num_dropped: int
    gap: float = math.nan


class Objective(Protocol):
    """A bound to maximize by stochastic gradients.

    Attributes:
        parameters: the unconstrained parameters of guide and model, by name.
    """

    parameters: dict[str, Tensor]

    @property
    def route(self) -> Route:
        """How the bound is evaluated."""

    def __call__(self, options: StepOptions, generator: torch.Generator) -> Evaluation:
        """Estimate the bound.

        Args:
            options: how to evaluate it.
            generator: source of the noise, for objectives that draw it themselves.
        """


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
        self._has_worked = False
        self.is_vectorized = vectorize and self._can_vectorize()
        self.route = Route("traced" if self.is_vectorized else "sequential", reason)

    def _can_vectorize(self) -> bool:
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                self._try_vectorized()
                # That it runs does not prove it right. Weights of minibatches cannot be compared.
                if self.program.subsampled:
                    return True
                weighted = weigh(self.program, num_samples=3)
                return not (weighted.guide_note or weighted.model_note)
        except Exception:  # a program may fail in any way under a plate it was not written for
            return False

    def _try_vectorized(self) -> None:
        """Run a few particles at once, again where the model may just have failed at a draw."""
        for attempts_left in reversed(range(NUM_ATTEMPTS)):
            try:
                self._loss(2, vectorize=True)
            except Exception:  # as above
                if not attempts_left:
                    raise
            else:
                return

    def _loss(self, num_particles: int, vectorize: bool) -> Tensor:
        """Estimate the negative bound, differentiable if gradients are enabled."""
        program = self.program
        kind = partial(TraceEnum_ELBO, strict_enumeration_warning=False) if program.is_enumerating else Trace_ELBO
        elbo = kind(num_particles, program.nesting, vectorize_particles=vectorize)
        estimate = elbo.differentiable_loss if torch.is_grad_enabled() else elbo.loss
        return torch.as_tensor(estimate(program.model, program.guide, *program.args, **program.kwargs))

    def __call__(self, options: StepOptions, generator: torch.Generator) -> Evaluation:
        """Estimate the bound with draws from the global generator.

        Where the model raises an error, single particles are drawn instead, and those at which it does so again are
        dropped.

        Raises:
            ValueError: for an importance-weighted or tempered bound.
            Exception: the model's, if it has failed for every particle so far.
        """
        if options.importance > 1 or options.power != 1:
            raise ValueError("fit: importance weighting and tempering need a flow guide on a model that vectorizes")
        num_particles = options.num_particles
        if not self.is_vectorized:
            num_particles = min(num_particles, MAX_SEQUENTIAL_PARTICLES)
        with pyro.validation_enabled(False), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Encountered NaN", UserWarning)  # such steps are counted by the fit
            try:
                loss, num_dropped = self._loss(num_particles, self.is_vectorized), 0
            except NEVER_OF_A_DRAW:
                raise
            except Exception as error:  # a model may fail in any way where it is not defined
                loss, num_dropped = self._loss_where_defined(min(num_particles, MAX_SEQUENTIAL_PARTICLES), error)
        bound = -float(loss.detach())
        if not math.isfinite(bound):
            return Evaluation(loss.new_zeros(()), math.nan, num_particles)
        self._has_worked = True
        return Evaluation(loss, bound, num_dropped)

    def _loss_where_defined(self, num_particles: int, error: Exception) -> tuple[Tensor, int]:
        """Return the mean loss of single particles and the number of those left out."""
        losses = []
        for _ in range(num_particles):
            try:
                loss = self._loss(1, vectorize=False)
            except Exception:  # as above
                continue
            if bool(loss.isfinite()):
                losses.append(loss)
        if not losses and not self._has_worked:
            raise error
        return torch.stack(losses).mean() if losses else torch.tensor(math.nan), max(1, num_particles - len(losses))
