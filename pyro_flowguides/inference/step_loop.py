"""Steps that follow the gradient of an objective, one at a time or several in one compiled call; the public stepper."""

import math
import statistics
import time
from collections.abc import Sequence
from typing import Generic, Literal, TypeAlias, TypeVar

import torch

from pyro_flowguides.inference.compiled_steps import MAX_STEPS_PER_CALL, CompiledSteps, compile_steps
from pyro_flowguides.inference.density_objective import DensityObjective, evaluate, make_objective
from pyro_flowguides.inference.flat_adam import FlatAdam
from pyro_flowguides.inference.objective import Evaluation, Objective, Route, StepOptions
from pyro_flowguides.nn.arguments import check_count, check_number, check_seed, describe
from pyro_flowguides.programs.batched_run import first_line
from pyro_flowguides.programs.program import Program, check_programs
from pyro_flowguides.programs.program_runs import sample_guide
from pyro_flowguides.programs.running import evaluation, exclusive
from pyro_flowguides.programs.types import Guide, Model, Values

__all__ = ["CompileMode", "CompiledStepLoop", "GuideT", "StepLoop", "StepOutcome", "Stepper", "check_groups"]

GuideT = TypeVar("GuideT", bound=Guide)

#: Whether to compile steps: always, never, on a GPU and where it saves time, or on a GPU only.
CompileMode: TypeAlias = bool | Literal["auto", "gpu"]
#: An estimate of the bound, and whether the step was taken: not if the bound or its gradient was not finite.
StepOutcome: TypeAlias = tuple[Evaluation, bool]

#: Seconds that inductor takes per operation on one core, and the share of a step's time that compiling saves.
COMPILE_SECONDS, COMPILE_SAVES = 0.04, 0.5
#: Steps that are timed before the gain of compiling is estimated.
NUM_TIMED_STEPS = 20
#: Most characters of a compiler's message that a route repeats.
MAX_FAILURE_LENGTH = 120


def check_groups(owner: str, num_particles: int, importance: int) -> None:
    """Refuse particles that do not form whole groups of the importance-weighted bound."""
    if num_particles % importance:
        raise ValueError(f"{owner}: importance must divide num_particles, got {importance} and {num_particles}")


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
        return [(evaluation, was_taken)]


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
        outcomes = [(Evaluation((), elbo, 0, gap), True) for elbo, gap in rows if math.isfinite(elbo)]
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


class Stepper(Generic[GuideT]):
    r"""Train a guide step by step: the step that :func:`~pyro_flowguides.inference.fit` takes, for loops of your own.

    A step estimates the gradient of :math:`\mathcal{L} = E_q[\log p(x, z) - \log q(z)]` from a batch of particles and
    follows it with Adam, gradients clipped. There is no warm start, no schedule and no averaging: ``fit`` adds these.

    Args:
        model, guide: as for ``pyro.infer.SVI``.
        *args, **kwargs: the model's arguments.
        num_particles: draws per step.
        lr: Adam's step size.
        path_gradient: follow the path gradient (flow guides only), which has less variance near the posterior and more
            far from it.
        importance: 1 for the ELBO, K for the importance-weighted bound with its doubly reparametrized gradient.
        compile: ``True`` to compile steps, ``False`` not to, ``"auto"`` to compile them on a GPU, and on a CPU where
            :meth:`run` is asked for enough steps to repay it.
        seed: seed of the noise of flow guides; other guides draw from the global generator.

    Attributes:
        guide: the guide, which is trained in place.
        options: the options of the next step; may be replaced between steps.
        lr: the step size of the next step; may be changed between steps.

    Raises:
        ValueError: if guide and model have no parameters, or not the same latent sites.

    Cost: one pass of model and guide over all particles per step, forward and backward. The first step also records
    its operations.

    Example:
        >>> import pyro, pyro.distributions as dist, torch, pyro_flowguides as fg
        >>> def model(y):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        >>> stepper = fg.inference.Stepper(model, fg.AutoPlanar(model), torch.tensor(2.0), lr=0.05)
        >>> for _ in range(200):
        ...     elbo = stepper.step()
        >>> log_evidence = dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(2.0)).item()
        >>> abs(log_evidence - stepper.elbo()) < 0.05
        True
        >>> stepper.sample(100)["z"].shape
        torch.Size([100])
    """

    def __init__(
        self,
        model: Model,
        guide: GuideT,
        *args: object,
        num_particles: int = 32,
        lr: float = 1e-2,
        path_gradient: bool = False,
        importance: int = 1,
        compile: CompileMode = "auto",
        seed: int = 0,
        **kwargs: object,
    ) -> None:
        num_particles = check_count("Stepper", "num_particles", num_particles)
        importance = check_count("Stepper", "importance", importance)
        check_groups("Stepper", num_particles, importance)
        lr, seed = check_number("Stepper", "lr", lr, above=0), check_seed("Stepper", seed)
        if compile not in (True, False, "auto", "gpu"):
            raise ValueError(f'Stepper: compile must be True, False, "auto" or "gpu", got {describe(compile)}')
        check_programs(model, guide)
        guide(*args, **kwargs)  # creates the parameters, if there are none yet
        self.guide = guide
        self.program = Program.inspect(model, guide, args, kwargs)
        self.objective = make_objective(self.program)
        parameters = list(self.objective.parameters.values())
        if not parameters:
            raise ValueError(f"{type(guide).__name__} and its model have no parameters to train")
        self.options = StepOptions(num_particles, path_gradient, importance=importance)
        self.lr = lr
        self.adam = FlatAdam(parameters)
        # On a GPU, drawing the noise elsewhere and copying it would take longer than the step.
        self.generator = torch.Generator(self.adam.device).manual_seed(seed)
        self.loop = StepLoop(self.objective, self.adam, self.generator)
        if compile and isinstance(self.objective, DensityObjective):
            self.loop = CompiledStepLoop(self.objective, self.adam, self.generator, compile)

    @property
    def route(self) -> Route:
        """How the steps so far evaluated the bound, and why not faster."""
        return self.loop.route

    def step(self) -> float:
        """Take one step.

        Returns:
            the estimate of the bound before the step; NaN if no particle was finite.
        """
        return self.run(1)[0]

    @exclusive
    def run(self, num_steps: int) -> list[float]:
        """Take several steps, which is faster than one by one where they are compiled.

        Returns:
            the estimate of the bound before each step.
        """
        num_steps = check_count("Stepper", "num_steps", num_steps, 0)
        self.lr = check_number("Stepper", "lr", self.lr, above=0)
        elbos: list[float] = []
        while len(elbos) < num_steps:
            remaining = num_steps - len(elbos)
            outcomes = self.loop.advance(self.options, [self.lr] * min(remaining, MAX_STEPS_PER_CALL), remaining)
            elbos += [evaluation.elbo for evaluation, _ in outcomes]
        return elbos

    def elbo(self, num_samples: int = 1000) -> float:
        """Estimate the bound of the guide as it is, with random numbers that are the same at every call."""
        num_samples = check_count("Stepper", "num_samples", num_samples)
        return evaluate(self.objective, num_samples, self.options.importance).elbo

    def sample(self, num_samples: int) -> Values:
        """Draw from the guide: site -> values ``(num_samples, *site)``."""
        num_samples = check_count("Stepper", "num_samples", num_samples)
        with evaluation():
            return sample_guide(self.program, num_samples, self.program.default_chunk_size).values

    def release(self) -> None:
        """Give the parameters their own memory and end the training; the guide can be used as any other."""
        self.adam.release()
