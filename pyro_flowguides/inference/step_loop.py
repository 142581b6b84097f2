"""Steps that follow the gradient of an objective: one at a time, or several in one call of a compiled function."""

import math
import statistics
import time
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch

from pyro_flowguides.inference.compiled_steps import CompiledSteps, compile_steps
from pyro_flowguides.inference.density_objective import DensityObjective
from pyro_flowguides.inference.flat_adam import FlatAdam
from pyro_flowguides.inference.objective import Evaluation, Objective, Route, StepOptions
from pyro_flowguides.programs.batched_run import first_line

__all__ = ["CompileMode", "CompiledStepLoop", "StepLoop", "StepOutcome", "make_step_loop"]

#: Whether to compile steps: always, never, on a GPU and where it saves time, or on a GPU only.
CompileMode: TypeAlias = bool | Literal["auto", "gpu"]

#: Seconds that inductor takes per operation on one core, and the share of a step's time that compiling saves.
COMPILE_SECONDS, COMPILE_SAVES = 0.04, 0.5
#: Steps that are timed before the gain of compiling is estimated.
NUM_TIMED_STEPS = 20
#: Most characters of a compiler's message that a route repeats.
MAX_FAILURE_LENGTH = 120


class StepOutcome(NamedTuple):
    """A step of an optimizer.

    Attributes:
        evaluation: the estimate of the bound.
        was_taken: whether the parameters were changed; not if the bound or its gradient was not finite.
    """

    evaluation: Evaluation
    was_taken: bool


class StepLoop:
    """Evaluate an objective and follow its gradient, one step at a time.

    Args:
        objective: the bound to maximize.
        adam: optimizer of all parameters of the objective.
        generator: source of the noise.
    """

    def __init__(self, objective: Objective, adam: FlatAdam, generator: torch.Generator) -> None:
        self.objective, self.adam, self.generator = objective, adam, generator

    @property
    def route(self) -> Route:
        """How steps evaluate the bound."""
        return self.objective.route

    def advance(self, options: StepOptions, lrs: Sequence[float], num_remaining: int = 0) -> list[StepOutcome]:
        """Take one or more steps.

        Args:
            options: options of all steps.
            lrs: step sizes of the next steps; no more steps are taken than there are step sizes.
            num_remaining: number of steps of this kind still to come, by which the gain of compiling is judged.

        Returns:
            the outcome of every step; only the last may not have been taken.
        """
        evaluation = self.objective(options, self.generator)
        was_taken = math.isfinite(evaluation.elbo) and self.adam.step(evaluation.loss_or_gradient, lrs[0])
        return [StepOutcome(evaluation, was_taken)]


class CompiledStepLoop(StepLoop):
    """Take several steps in one call of a compiled function, where it saves more time than compiling takes.

    Every step sees the noise that it would see if steps were taken one at a time. A step that the compiled function
    cannot take, because a particle is not finite, is taken by itself.

    Args:
        mode: ``True`` to compile every kind of step; ``"gpu"`` to compile on a GPU; ``"auto"`` to compile there, and on
            a CPU where the number of remaining steps repays it.

    Attributes:
        failure: why steps could not be compiled; empty if they could, or if nothing has been tried.
    """

    def __init__(
        self, objective: DensityObjective, adam: FlatAdam, generator: torch.Generator, mode: CompileMode
    ) -> None:
        super().__init__(objective, adam, generator)
        self.objective: DensityObjective = objective
        self.failure = ""
        self._compiles_always = mode is True or adam.device.type == "cuda"
        self._compiles_by_time = mode == "auto"
        self._compiled: dict[tuple[int, bool], CompiledSteps] = {}
        self._seconds: dict[tuple[int, bool], list[float]] = {}
        #: Number of remaining steps above which compiling saves time.
        self._break_even: dict[tuple[int, bool], float] = {}
        self._num_steps = self._num_compiled_steps = 0

    @property
    def route(self) -> Route:
        """How steps evaluate the bound: compiled as far as they were, and why not where compiling failed."""
        route = self.objective.route
        reasons = [f"not compiled: {self.failure}"] if self.failure else []
        if not self._num_compiled_steps:
            return Route(route.kind, "; ".join([*filter(None, [route.reason]), *reasons]))
        if self._num_compiled_steps < self._num_steps:
            reasons.insert(0, f"{self._num_compiled_steps} of {self._num_steps} steps; the others {route.kind}")
        return Route("compiled", "; ".join(reasons))

    def advance(self, options: StepOptions, lrs: Sequence[float], num_remaining: int = 0) -> list[StepOutcome]:
        """Take as many steps as one call of the compiled function takes, or one step."""
        compiled = self._get_compiled(options, num_remaining)
        if compiled is None:
            outcomes = self._advance_timed(options, lrs)
        else:
            lrs = lrs[: compiled.steps_per_call]
            outcomes = self._call(compiled, options, lrs)
            self._num_compiled_steps += len(outcomes)
            if len(outcomes) < len(lrs):
                outcomes += super().advance(options, lrs[len(outcomes) :])
        self._num_steps += len(outcomes)
        return outcomes

    def _call(self, compiled: CompiledSteps, options: StepOptions, lrs: Sequence[float]) -> list[StepOutcome]:
        """Take steps in one call, fewer than asked for where one is not finite.

        The generator is left after the noise of the steps that were taken.
        """
        state = self.generator.get_state()
        noises = [self.objective.noise(options.num_particles, self.generator) for _ in lrs]
        rows = compiled(noises, noises[0].new_tensor(options.power), lrs=lrs).tolist()
        outcomes = [StepOutcome(Evaluation((), elbo, 0, gap), True) for elbo, gap in rows if math.isfinite(elbo)]
        if len(outcomes) < len(lrs):
            self.generator.set_state(state)
            for _ in outcomes:
                self.objective.noise(options.num_particles, self.generator)
        return outcomes

    def _advance_timed(self, options: StepOptions, lrs: Sequence[float]) -> list[StepOutcome]:
        """Take one step; from the time of the first ones, find out how many remaining steps repay compiling."""
        key = options.recording_key
        begin = time.perf_counter()
        outcomes = super().advance(options, lrs)
        seconds = self._seconds.setdefault(key, [])
        if len(seconds) < NUM_TIMED_STEPS:
            seconds.append(time.perf_counter() - begin)
        elif key not in self._break_even and key in self.objective.recordings:
            num_operations = len(self.objective.recordings[key].recording.graph.nodes)
            self._break_even[key] = COMPILE_SECONDS * num_operations / (COMPILE_SAVES * statistics.median(seconds))
        return outcomes

    def _get_compiled(self, options: StepOptions, num_remaining: int) -> CompiledSteps | None:
        """Return the compiled steps of these options; ``None`` where compiling does not repay or is impossible."""
        key = options.recording_key
        if options.importance > 1 or self.objective.not_recorded_reason:
            return None
        repays = self._compiles_by_time and num_remaining > self._break_even.get(key, math.inf)
        if key not in self._compiled and (self._compiles_always or repays) and not self.failure:
            self._compile(options)
        return self._compiled.get(key)

    def _compile(self, options: StepOptions) -> None:
        state = self.generator.get_state()
        noise = self.objective.noise(options.num_particles, self.generator)
        self.generator.set_state(state)  # the next step draws the same noise
        replay = self.objective.recording(noise, options)
        if replay is None:
            return
        try:
            steps = compile_steps(replay.recording, self.adam, noise, noise.new_tensor(options.power))
            self._compiled[options.recording_key] = steps
        except Exception as error:  # a compiler or its tools may raise anything
            self.failure = first_line(error)[:MAX_FAILURE_LENGTH]


def make_step_loop(
    objective: Objective, adam: FlatAdam, generator: torch.Generator, compile: CompileMode = "auto"
) -> StepLoop:
    """Make the loop of an objective: a compiling one if steps are to be compiled, and can be."""
    if compile and isinstance(objective, DensityObjective):
        return CompiledStepLoop(objective, adam, generator, compile)
    return StepLoop(objective, adam, generator)
