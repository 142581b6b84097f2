"""The course of one fit: start, steps, average, checkpoints."""

from __future__ import annotations

import math
import time
import warnings
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from tqdm import tqdm

from pyro_flowguides.guides.autoflow import FULL_RANK_LIMIT
from pyro_flowguides.inference import checkpoint as checkpoints
from pyro_flowguides.inference.density_objective import Compiling, DensityObjective, make_objective
from pyro_flowguides.inference.evaluation import evaluate
from pyro_flowguides.inference.flat_adam import Descent
from pyro_flowguides.inference.schedule import Schedule
from pyro_flowguides.inference.steps import Objective, Request
from pyro_flowguides.inference.warm_start import Gaussian, LowRankStart, low_rank_warm_start
from pyro_flowguides.inference.warm_start import warm_start as find_start
from pyro_flowguides.programs.program import Program

__all__ = ["FitDivergedError", "Run"]

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


class Run:
    """The state of one fit, everything that a checkpoint must hold."""

    def __init__(
        self,
        program: Program,
        settings: dict[str, Any],
        compiling: Compiling = False,
    ) -> None:
        self.started = time.perf_counter()
        self.program, self.guide = program, program.guide
        self.settings = settings
        self.path_gradient, self.importance = settings["path_gradient"], settings["importance"]
        self.temper, self.seed = settings["temper"], settings["seed"]
        self.schedule = Schedule(**{key: settings[key] for key in ("steps", "lr", "num_particles", "tolerance")})
        self.objective: Objective = make_objective(program, compiling)
        parameters = list(self.objective.parameters.values())
        if not parameters:
            raise ValueError(f"fit: {type(self.guide).__name__} and its model have no parameters to train")
        of_guide = (
            {id(parameter) for parameter in self.guide.parameters()}
            if isinstance(self.guide, torch.nn.Module)
            else set()
        )
        #: Near the evidence there is nothing left to gain, unless the evidence itself can be raised.
        self.gap_tells = self.importance == 1 and all(id(parameter) in of_guide for parameter in parameters)
        self.descent = Descent(parameters)
        # Normal numbers for a step on a GPU would take longer to make elsewhere than the step.
        self.generator = torch.Generator(self.descent.vectors[0].device).manual_seed(self.seed)
        self.history: list[float] = []
        self.dropped = self.barren = self.averaged = 0
        self.mean: list[Tensor] = []
        self.start = ""

    @property
    def seconds(self) -> float:
        """Wall time so far, that of earlier processes included."""
        return time.perf_counter() - self.started

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
                scale = best.scale_tril.diagonal()
                guide.set_affine(best.loc, best.scale_tril)
            else:
                low_rank, scale = best.gaussian, best.gaussian.scale
                guide.set_low_rank_affine(low_rank.loc, low_rank.scale, low_rank.directions, low_rank.log_stretch)
            guide.set_tail_weight(min(TAIL_WEIGHT, TOTAL_TAIL_WEIGHT / len(start)))
            self.descent.measure(guide.location, scale)  # or a step would be far for a narrow posterior
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
        batch = self._whole_groups(schedule.current_particles)
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
        return f"{head}{self._where_diverged()}. Start elsewhere (init_loc_fn, init_scale) or lower lr."

    def _where_diverged(self) -> str:
        """The first site whose density is not finite, over some draws of the guide."""
        with torch.no_grad(), pyro.validation_enabled(False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(self.schedule.num_particles):
                args, kwargs = self.program.args, self.program.kwargs
                draw = poutine.trace(self.guide).get_trace(*args, **kwargs)
                try:
                    trace = poutine.trace(poutine.replay(self.program.model, trace=draw)).get_trace(*args, **kwargs)
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
                "units": self.descent.units,
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
        if state["generator"].shape != self.generator.get_state().shape:
            raise ValueError(f"fit: {path} is a checkpoint of a fit on another kind of device; go on there")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(saved[name])
        for (_, *moments), kept in zip(self.descent.state(), state["moments"], strict=True):
            for moment, saved_moment in zip(moments, kept, strict=True):
                moment.copy_(saved_moment)
        self.descent.set_units(state["units"])
        self.schedule = Schedule(**state["schedule"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["global_generator"])
        self.history, self.mean, self.start = state["history"], state["mean"], state["start"]
        self.dropped, self.barren, self.averaged = state["counts"]
        self.started -= state["seconds"]
        return True
