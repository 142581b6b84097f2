"""``fit``: from a model and a guide to a posterior and a verdict, without tuning."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from torch import Tensor
from tqdm import tqdm

from pyro_flowguides.diagnostics import Diagnosis, diagnose, to_inference_data
from pyro_flowguides.guides.autoflow import FULL_RANK_LIMIT
from pyro_flowguides.inference import checkpoint as checkpoints
from pyro_flowguides.inference.descent import Descent
from pyro_flowguides.inference.evaluation import evaluate
from pyro_flowguides.inference.objectives import Compiling, DensityObjective, make_objective
from pyro_flowguides.inference.schedule import Schedule
from pyro_flowguides.inference.steps import Objective, Request
from pyro_flowguides.inference.warmstart import Gaussian, LowRankStart, low_rank_warm_start
from pyro_flowguides.inference.warmstart import warm_start as find_start

__all__ = ["FitDivergedError", "FitResult", "fit"]

#: Consecutive steps without a finite bound and gradient after which a fit is given up.
PATIENCE = 50
#: Steps between two words on the progress.
SAID_EVERY = 50
#: Tail weight of a flow guide after the warm start: at most this, and at most so much over all dimensions. It keeps
#: importance weights bounded where the posterior's tails are heavier than normal ones, and costs a normal posterior
#: some hundredths of a nat until it is unlearned.
TAIL_WEIGHT, TOTAL_TAIL_WEIGHT = 0.05, 0.2
#: Share of the exploration over which a tempered target rises to the full one.
TEMPERED_SHARE = 0.75
#: Draws behind the choice between the last and the averaged parameters.
CHOICE_DRAWS = 1000


class FitDivergedError(RuntimeError):
    """The bound or its gradient was not finite for so long that going on is hopeless."""


@dataclass
class FitResult:
    """What :func:`fit` returns: the trained guide with how it got there and what it is worth.

    Attributes:
        model, guide, args, kwargs: what was fitted.
        elbo_history: the bound's estimate at every step (NaN where no particle was finite).
        seconds: wall time, warm start included, diagnosis not.
        route: how the bound was evaluated, and why.
        start: where the warm start put the guide; empty without one.
        reason: why the fit ended.
        dropped: particles left out because their weight or gradient was not finite.
        diagnosis: the verdict; ``None`` where there can be none, as for a minibatch.
        unjudged: why there is no verdict; empty if there is one.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    elbo_history: list[float]
    seconds: float
    route: str
    start: str
    reason: str
    dropped: int
    diagnosis: Diagnosis | None = field(repr=False)
    unjudged: str = ""

    @property
    def steps(self) -> int:
        """Number of steps taken."""
        return len(self.elbo_history)

    def to_inference_data(self, **options: Any) -> Any:
        """Draws, log p, log q, predictive and observed data for ArviZ, see
        :func:`~pyro_flowguides.diagnostics.to_inference_data`."""
        return to_inference_data(self.model, self.guide, *self.args, **self.kwargs, **options)

    def __str__(self) -> str:
        dropped = f", {self.dropped} particles dropped" if self.dropped else ""
        return (
            f"{type(self.guide).__name__}: {self.steps} steps in {self.seconds:.1f} s{dropped}; ended because "
            f"{self.reason}\n{self.diagnosis or 'No verdict: ' + self.unjudged}"
        )


def fit(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    steps: int = 2000,
    particles: int = 32,
    learning_rate: float = 1e-2,
    tolerance: float = 0.01,
    warm_start: bool = True,
    path_gradient: bool = True,
    importance: int = 1,
    temper: float | None = None,
    compile: bool | Literal["auto"] = False,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 200,
    progress: bool = True,
    **kwargs: Any,
) -> FitResult:
    r"""Fit a guide to a model: warm start, vectorised particles, schedule, plateau detection, averaging, verdict.

    Any guide works; Pyro's own skip what they cannot use. For flow guides the affine part of the guide first becomes
    the best Gaussian found by a short deterministic search (:func:`~pyro_flowguides.inference.warmstart.warm_start`),
    so that the flow models only what a Gaussian cannot. Then Adam follows the gradient of the ELBO: at a constant step
    size until the bound stands still or is nearly that of the evidence, not at all where the start is, and with a
    falling step size, more particles and the path gradient to the end
    (:class:`~pyro_flowguides.inference.schedule.Schedule`). The last iterates are averaged where that is better.

    Args:
        model, guide: as for ``pyro.infer.SVI``.
        args, kwargs: the model's arguments.
        steps: most steps to take; easy posteriors stop early.
        particles: draws per step, twice as many at the end.
        learning_rate: Adam's step size while exploring.
        tolerance: gain of the ELBO, in nats, over a quarter of the steps so far that is not worth going on for.
        warm_start: search for a Gaussian start (flow guides only).
        path_gradient: refine with the path gradient (flow guides only); ``False`` for the total gradient throughout.
        importance: 1 for the ELBO, K for the importance-weighted bound with its doubly reparametrised gradient.
        temper: exponent of the target at the first step, in (0, 1); it rises to 1 over three quarters of the
            exploration, so that a multimodal target is met while it is still flat.
        compile: ``True`` to compile the steps of flow guides (loss, gradients and optimiser as one function of
            torch's inductor), which takes a minute or so on two cores, less where an earlier run has left its results
            on the disk, and then saves more than half of each step; ``"auto"`` to do so only where the remaining steps
            will repay it. Where compiling fails the fit goes on without; ``route`` in the result says what was done.
        seed: of everything random in the fit; the global generator is restored afterwards.
        checkpoint: file to save to and, if it exists, to resume from, exactly.
        checkpoint_every: steps between saves.
        progress: show a progress bar.

    Returns:
        a :class:`FitResult`; print it.

    Raises:
        FitDivergedError: if no particle was finite for many steps in a row, naming the step and the site.
        ValueError: for arguments out of range, or a checkpoint of another fit.

    Example:
        >>> import pyro, pyro.distributions as dist, pyro_flowguides as fg
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(1.0))
        >>> import torch
        >>> result = fg.fit(model, fg.AutoIAF(model), steps=200, progress=False)
        >>> abs(result.diagnosis.elbo - dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(1.0)).item()) < 0.05
        True
    """
    if steps < 1 or particles < 1 or importance < 1 or particles % importance:
        raise ValueError(
            f"fit: steps, particles and importance must be positive and importance divide particles, got "
            f"{steps}, {particles}, {importance}"
        )
    if checkpoint_every < 1:
        raise ValueError(f"fit: checkpoint_every must be positive, got {checkpoint_every}")
    if compile not in (True, False, "auto"):
        raise ValueError(f'fit: compile must be True, False or "auto", got {compile!r}')
    if temper is not None and not 0 < temper < 1:
        raise ValueError(f"fit: temper must lie in (0, 1), got {temper}")
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        settings = {
            "steps": steps,
            "particles": particles,
            "learning_rate": learning_rate,
            "tolerance": tolerance,
            "path_gradient": path_gradient,
            "importance": importance,
            "temper": temper,
            "seed": seed,
        }
        run = _Run(model, guide, args, kwargs, settings, compile)
        try:
            if not run.resume(checkpoint):
                run.begin(warm_start)
            run.train(checkpoint, checkpoint_every, progress)
        finally:
            run.descent.release()
        result = run.result()
        del run  # what its steps held is not needed any more
        result.diagnosis, result.unjudged = _judge(model, guide, args, kwargs)
    return result


def _judge(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Diagnosis | None, str]:
    """The verdict, or why there is none: the fit stands either way."""
    try:
        return diagnose(model, guide, *args, **kwargs), ""
    except ValueError as error:
        return None, str(error)


class _Run:
    """The state of one fit, everything that a checkpoint must hold."""

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        settings: dict[str, Any],
        compiling: Compiling = False,
    ) -> None:
        self.started = time.perf_counter()
        self.model, self.guide, self.args, self.kwargs = model, guide, args, kwargs
        self.settings = settings
        self.path_gradient, self.importance = settings["path_gradient"], settings["importance"]
        self.temper, self.seed = settings["temper"], settings["seed"]
        self.schedule = Schedule(**{key: settings[key] for key in ("steps", "learning_rate", "particles", "tolerance")})
        guide(*args, **kwargs)  # creates the parameters, if there are none yet
        self.objective: Objective = make_objective(model, guide, args, kwargs, compiling)
        parameters = list(self.objective.parameters.values())
        if not parameters:
            raise ValueError(f"fit: {type(guide).__name__} and its model have no parameters to train")
        of_guide = {id(parameter) for parameter in guide.parameters()} if isinstance(guide, torch.nn.Module) else set()
        #: Near the evidence there is nothing left to gain, unless the evidence itself can be raised.
        self.gap_tells = self.importance == 1 and all(id(parameter) in of_guide for parameter in parameters)
        self.descent = Descent(parameters)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.history: list[float] = []
        self.dropped = self.barren = self.averaged = 0
        self.mean: list[Tensor] = []
        self.start = ""

    @property
    def seconds(self) -> float:
        """Wall time so far, that of earlier processes included."""
        return time.perf_counter() - self.started

    def result(self) -> FitResult:
        """What came of the fit, without a verdict."""
        return FitResult(
            model=self.model,
            guide=self.guide,
            args=self.args,
            kwargs=self.kwargs,
            elbo_history=self.history,
            seconds=self.seconds,
            route=self.objective.route,
            start=self.start,
            reason=self.schedule.reason,
            dropped=self.dropped,
            diagnosis=None,
        )

    # -- before ----------------------------------------------------------------------------------------------------

    def begin(self, warm_start: bool) -> None:
        """Find a start, and see how far it is from the posterior."""
        if warm_start:
            self.warm_start()
        if isinstance(self.objective, DensityObjective) and self.temper is None and self.gap_tells:
            self.schedule.begin(evaluate(self.objective, CHOICE_DRAWS).gap)

    def warm_start(self) -> None:
        """Set the affine part of a flow guide to the best Gaussian found, if that is better than the guide as it is."""
        if not isinstance(self.objective, DensityObjective) or not hasattr(self.guide, "set_affine"):
            return
        density = self.objective.density
        guide = self.objective.guide
        start = guide._init_loc().to(next(guide.get_transform().parameters()))
        best: Gaussian | LowRankStart
        if len(start) <= FULL_RANK_LIMIT:
            best = find_start(density, start, seed=self.seed)[0]
        else:
            best = low_rank_warm_start(density, start, seed=self.seed)[0]
        now = self._bound()
        if math.isfinite(best.elbo) and not now >= best.elbo:
            if isinstance(best, Gaussian):
                guide.set_affine(best.loc, best.scale_tril)
            else:
                low_rank = best.gaussian
                guide.set_low_rank_affine(low_rank.loc, low_rank.scale, low_rank.directions, low_rank.log_stretch)
            guide.set_tails(min(TAIL_WEIGHT, TOTAL_TAIL_WEIGHT / len(start)))
            self.start = f"{best.origin} (ELBO {best.elbo:.2f})"

    # -- the loop --------------------------------------------------------------------------------------------------

    def train(self, checkpoint: str | Path | None, every: int, progress: bool) -> None:
        with tqdm(total=self.schedule.steps, initial=self.schedule.step, disable=not progress, leave=False) as bar:
            while not self.schedule.done:
                begin = self.schedule.step
                self.advance(every - begin % every)
                now = self.schedule.step
                bar.update(now - begin)
                if now // SAID_EVERY > begin // SAID_EVERY:
                    bar.set_description(type(self.guide).__name__, refresh=False)
                    bar.set_postfix_str(f"ELBO {self.recent():.2f}", refresh=False)
                if checkpoint is not None and now % every == 0:
                    self.save(checkpoint)
        self.settle()
        if checkpoint is not None:
            self.save(checkpoint)

    def advance(self, most: int) -> None:
        """Take some steps, at most so many."""
        schedule = self.schedule
        batch = self._whole_groups(schedule.batch)
        path = self.path_gradient and (schedule.refining_since is not None or self.importance > 1)
        power = self.power
        request = Request(batch, path, power, self.importance, schedule.remaining)
        # A rising target is no standstill and no gain: the schedule sees only what is measured on the full one.
        full = power == 1
        for step, followed in self.objective.descend(
            request, self.generator, self.descent, schedule.rates(most if full else 1)
        ):
            self.dropped += step.dropped if followed else batch
            self.barren = 0 if followed else self.barren + 1
            if self.barren >= PATIENCE:
                raise FitDivergedError(self._why_diverged())
            self.history.append(step.elbo)
            schedule.advance(step.elbo if full else math.nan, step.gap if full and self.gap_tells else math.nan)
        if schedule.averaging:
            self._average()

    def _whole_groups(self, particles: int) -> int:
        """The number of particles, in whole groups of the importance-weighted bound."""
        return max(1, particles // self.importance) * self.importance

    @property
    def power(self) -> float:
        """The exponent of the target at the coming step."""
        if self.temper is None:
            return 1.0
        ramp = self.schedule.step / max(1.0, TEMPERED_SHARE * self.schedule.most_exploring)
        return self.temper ** max(0.0, 1 - ramp)

    def recent(self) -> float:
        values = [value for value in self.history[-50:] if math.isfinite(value)]
        return sum(values) / len(values) if values else math.nan

    @torch.no_grad()
    def _average(self) -> None:
        self.averaged += 1
        if not self.mean:
            self.mean = self.descent.values()
        for mean, vector in zip(self.mean, self.descent.vectors, strict=True):
            mean.lerp_(vector, 1 / self.averaged)

    def settle(self) -> None:
        """Keep the average of the last iterates if its bound is better than that of the last one."""
        if not self.mean:
            return
        last = self.descent.values()
        before = self._bound()
        self.descent.assign(self.mean)
        if self._bound() <= before:
            self.descent.assign(last)
        self.mean = []

    def _bound(self) -> float:
        """The bound of the guide as it is, -inf where it is not finite."""
        elbo = evaluate(self.objective, CHOICE_DRAWS, self.importance).elbo
        return elbo if math.isfinite(elbo) else -math.inf

    def _why_diverged(self) -> str:
        step = self.schedule.step + 1
        head = f"fit: the bound or its gradient was not finite for {PATIENCE} steps in a row, up to step {step}"
        return f"{head}{self._where_diverged()}. Start elsewhere (init_loc_fn, init_scale) or lower learning_rate."

    def _where_diverged(self) -> str:
        """The first site whose density is not finite, over some draws of the guide."""
        with torch.no_grad(), pyro.validation_enabled(False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(self.schedule.particles):
                draw = poutine.trace(self.guide).get_trace(*self.args, **self.kwargs)
                try:
                    trace = poutine.trace(poutine.replay(self.model, trace=draw)).get_trace(*self.args, **self.kwargs)
                    trace.compute_log_prob()
                except (ValueError, RuntimeError) as error:
                    return f"; the model fails there: {error}"
                for name, site in trace.nodes.items():
                    if site["type"] == "sample" and not math.isfinite(float(site["log_prob_sum"])):
                        return f"; the log density is not finite at site {name!r}"
        return ""

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        checkpoints.save(
            path,
            {
                "settings": self.settings,
                # Detached, because Pyro hangs references on its parameters that cannot be written.
                "parameters": {name: value.detach() for name, value in self.objective.parameters.items()},
                "moments": [moments for _, *moments in self.descent.state()],
                "schedule": self.schedule.state(),
                "generator": self.generator.get_state(),
                "global_generator": torch.get_rng_state(),
                "history": self.history,
                "mean": self.mean,
                "counts": [self.dropped, self.barren, self.averaged],
                "start": self.start,
                "seconds": self.seconds,
            },
        )

    def resume(self, path: str | Path | None) -> bool:
        """Take up the state in a checkpoint, if there is one."""
        state = None if path is None else checkpoints.load(path)
        if state is None:
            return False
        saved, own = state["parameters"], self.objective.parameters
        if {name: value.shape for name, value in saved.items()} != {name: value.shape for name, value in own.items()}:
            raise ValueError(f"fit: {path} is a checkpoint of another model or guide: their parameters differ")
        changed = [
            f"{key}={state['settings'][key]}" for key, value in self.settings.items() if state["settings"][key] != value
        ]
        if changed:
            raise ValueError(f"fit: {path} is a checkpoint of a fit with other settings ({', '.join(changed)})")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(saved[name])
        for (_, *moments), kept in zip(self.descent.state(), state["moments"], strict=True):
            for moment, saved_moment in zip(moments, kept, strict=True):
                moment.copy_(saved_moment)
        self.schedule = Schedule(**state["schedule"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["global_generator"])
        self.history, self.mean, self.start = state["history"], state["mean"], state["start"]
        self.dropped, self.barren, self.averaged = state["counts"]
        self.started -= state["seconds"]
        return True
