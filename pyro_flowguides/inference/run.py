"""The course of one fit: start, steps, averaging, checkpoints."""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Generic, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pyro_flowguides.guides.autoflow import FULL_RANK_LIMIT, AutoFlow
from pyro_flowguides.inference import checkpoint as checkpoints
from pyro_flowguides.inference.density_objective import DensityObjective, evaluate
from pyro_flowguides.inference.divergence import explain_divergence
from pyro_flowguides.inference.fingerprint import (
    Fingerprint,
    find_changes,
    find_differences,
    own_parameters,
    probe,
    take_fingerprint,
)
from pyro_flowguides.inference.objective import StepOptions
from pyro_flowguides.inference.schedule import Schedule
from pyro_flowguides.inference.step_loop import CompileMode, GuideT, Stepper, check_groups
from pyro_flowguides.inference.warm_start import low_rank_warm_start, warm_start
from pyro_flowguides.nn.arguments import check_count, check_number, check_seed
from pyro_flowguides.programs.types import Args, Kwargs, Model
from pyro_flowguides.transforms.conditioner import FULL_GAIN

__all__ = ["FitDivergedError", "FitSettings", "Run"]

#: Consecutive steps without a finite bound and gradient after which a fit is given up.
PATIENCE = 50
#: Steps between progress updates.
PROGRESS_EVERY = 50
#: Tail weight of a flow guide after the warm start: at most this for each dimension, and at most this in total. It
#: keeps importance weights bounded where the posterior has heavier tails than a normal distribution. A normal posterior
#: loses a few hundredths of a nat until training removes it.
TAIL_WEIGHT, TOTAL_TAIL_WEIGHT = 0.05, 0.2
#: Share of the exploration during which a tempered target rises to the full one.
TEMPERED_SHARE = 0.75
#: Draws for each estimate of the bound by which parameters are compared.
NUM_COMPARISON_SAMPLES = 1000


class FitDivergedError(RuntimeError):
    """The bound or its gradient was not finite for too many steps in a row."""


@dataclass(frozen=True)
class FitSettings:
    """The options of ``fit`` that decide its course; a checkpoint belongs to one set of them."""

    steps: int
    num_particles: int
    lr: float
    tolerance: float
    path_gradient: bool
    importance: int
    temper: float | None
    seed: int

    def __post_init__(self) -> None:
        checked: dict[str, object] = {
            **{
                name: check_count("fit", name, getattr(self, name)) for name in ("steps", "num_particles", "importance")
            },
            "lr": check_number("fit", "lr", self.lr, above=0),
            "tolerance": check_number("fit", "tolerance", self.tolerance, above=0, inclusive=True),
            "temper": None if self.temper is None else check_number("fit", "temper", self.temper, 0, 1),
            "seed": check_seed("fit", self.seed),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        check_groups("fit", self.num_particles, self.importance)


class Run(Generic[GuideT]):
    """The state of one fit: everything that a checkpoint must hold.

    Args:
        model, guide, args, kwargs: as for ``SVI``.
        settings: the options of the fit.
        compile: whether to compile steps.
    """

    def __init__(
        self, model: Model, guide: GuideT, args: Args, kwargs: Kwargs, settings: FitSettings, compile: CompileMode
    ) -> None:
        self.begin_time = time.perf_counter()
        self.guide, self.settings = guide, settings
        self.schedule = Schedule(settings.steps, settings.lr, settings.num_particles, settings.tolerance)
        self.stepper = Stepper(model, guide, *args, compile=compile, seed=settings.seed, **kwargs)
        self.objective, self.adam = self.stepper.objective, self.stepper.adam
        own_parameters = set(map(id, guide.parameters())) if isinstance(guide, nn.Module) else set()
        #: A small gap leaves nothing to gain, unless parameters of the model can raise the evidence itself.
        self.can_stop_on_gap = settings.importance == 1 and all(
            id(parameter) in own_parameters for parameter in self.objective.parameters.values()
        )
        self.history: list[float] = []
        self.num_dropped = self.num_failed_steps = self.num_averaged = 0
        self.average: list[Tensor] = []
        self.start = ""
        self.fingerprint: Fingerprint = {}
        #: The step of the checkpoint; ``None`` if there is none yet.
        self.saved_step: int | None = None

    @property
    def seconds(self) -> float:
        """Wall time so far, including that of earlier processes."""
        return time.perf_counter() - self.begin_time

    def begin(self, warm_start: bool) -> None:
        """Find a start, and estimate how far it is from the posterior."""
        if warm_start:
            self.warm_start()
        if isinstance(self.objective, DensityObjective) and self.settings.temper is None and self.can_stop_on_gap:
            self.schedule.start(evaluate(self.objective, NUM_COMPARISON_SAMPLES).gap)

    def warm_start(self) -> None:
        """Set the affine part of a flow guide to the best Gaussian found, if that is better than the guide as it is."""
        guide = self.guide
        if not isinstance(self.objective, DensityObjective) or not isinstance(guide, AutoFlow):
            return
        location = guide._init_loc().to(next(guide.get_transform().parameters()))
        find_starts = warm_start if len(location) <= FULL_RANK_LIMIT else low_rank_warm_start
        best = find_starts(self.objective.density, location, seed=self.settings.seed)[0]
        bound = self._bound()
        if not math.isfinite(best.elbo) or bound >= best.elbo:
            return
        best.apply_to(guide)
        guide.set_gain(FULL_GAIN)
        guide.set_tail_weight(min(TAIL_WEIGHT, TOTAL_TAIL_WEIGHT / self.objective.latent_dim))
        # Without a scale, a step would be far too long for a narrow posterior.
        self.adam.set_scale(guide.location, best.gaussian.scale)
        self.start = f"{best.origin} (ELBO {best.elbo:.2f})"

    def train(self, checkpoint: str | Path | None, checkpoint_every: int, progress: bool) -> None:
        """Take steps to the end of the schedule, then keep the average of the last iterates if it is better."""
        schedule = self.schedule
        if checkpoint is not None:
            self.save(checkpoint)  # a full disk is noticed before the first step
        with tqdm(total=schedule.steps, initial=schedule.step, disable=not progress, leave=False) as bar:
            while not schedule.is_done:
                begin = schedule.step
                self.advance(checkpoint_every - begin % checkpoint_every)
                bar.update(schedule.step - begin)
                if schedule.step // PROGRESS_EVERY > begin // PROGRESS_EVERY:
                    bar.set_description(type(self.guide).__name__, refresh=False)
                    bar.set_postfix_str(f"ELBO {self._recent_elbo():.2f}", refresh=False)
                if checkpoint is not None and schedule.step % checkpoint_every == 0:
                    self.save(checkpoint)
        self.keep_better()
        if checkpoint is not None:
            self.save(checkpoint)

    def advance(self, max_steps: int) -> None:
        """Take one or more steps up to the schedule's next decision."""
        schedule, options = self.schedule, self._step_options()
        is_tempered = options.power != 1
        end = schedule.step + 1 if is_tempered else min(schedule.step + max_steps, schedule.next_decision)
        lrs = [schedule.lr_at(step) for step in range(schedule.step, end)]
        for evaluation, was_taken in self.stepper.loop.advance(options, lrs, schedule.stage_end - schedule.step):
            self.num_dropped += evaluation.num_dropped if was_taken else options.num_particles
            self.num_failed_steps = 0 if was_taken else self.num_failed_steps + 1
            if self.num_failed_steps >= PATIENCE:
                raise FitDivergedError(self._divergence())
            self.history.append(evaluation.elbo)
            # The bound of a tempered target rises and falls with the temper, so the schedule must not see it.
            can_see_gap = self.can_stop_on_gap and not is_tempered
            schedule.advance(math.nan if is_tempered else evaluation.elbo, evaluation.gap if can_see_gap else math.nan)
        if schedule.is_averaging:
            self._update_average()

    def _step_options(self) -> StepOptions:
        """Return the options of the next step."""
        importance, schedule = self.settings.importance, self.schedule
        return StepOptions(
            num_particles=max(1, schedule.current_num_particles // importance) * importance,
            path_gradient=self.settings.path_gradient and (schedule.is_refining or importance > 1),
            power=self._power(),
            importance=importance,
        )

    def _power(self) -> float:
        """Return the exponent of the target at the next step."""
        if self.settings.temper is None:
            return 1.0
        ramp = self.schedule.step / max(1.0, TEMPERED_SHARE * self.schedule.max_explore_steps)
        return self.settings.temper ** max(0.0, 1 - ramp)

    def _recent_elbo(self) -> float:
        values = [value for value in self.history[-PROGRESS_EVERY:] if math.isfinite(value)]
        return sum(values) / len(values) if values else math.nan

    @torch.no_grad()
    def _update_average(self) -> None:
        self.num_averaged += 1
        if not self.average:
            self.average = self.adam.snapshot()
        for mean, vector in zip(self.average, self.adam.vectors, strict=True):
            mean.lerp_(vector, 1 / self.num_averaged)

    def keep_better(self) -> None:
        """Keep the average of the last iterates if its bound is better than that of the last one."""
        if not self.average:
            return
        last, bound = self.adam.snapshot(), self._bound()
        self.adam.restore(self.average)
        if self._bound() <= bound:
            self.adam.restore(last)
        self.average = []

    def _bound(self) -> float:
        """Return the bound of the guide as it is, -inf where it is not finite."""
        elbo = evaluate(self.objective, NUM_COMPARISON_SAMPLES, self.settings.importance).elbo
        return elbo if math.isfinite(elbo) else -math.inf

    def _divergence(self) -> str:
        what = f"not finite for {PATIENCE} steps in a row, up to step {self.schedule.step + 1}"
        cause = explain_divergence(self.stepper.program, self.settings.num_particles)
        return f"fit: the bound or its gradient was {what} ({self.num_dropped} particles dropped in all){cause}"

    def save(self, path: str | Path) -> None:
        """Write the state to a checkpoint.

        Raises:
            OSError: if the file cannot be written, saying what to do; the earlier checkpoint is intact.
        """
        program = self.stepper.program
        self.fingerprint = self.fingerprint or take_fingerprint(program)
        state: checkpoints.FitState = {
            "kind": "fit",
            "settings": asdict(self.settings),
            "fingerprint": self.fingerprint,
            "probe": probe(program),
            # Detached, because Pyro attaches references to its parameters that cannot be written.
            "parameters": {name: value.detach() for name, value in own_parameters(program).items()},
            "moments": [moments for _, *moments in self.adam.state()],
            "scales": self.adam.scales,
            "schedule": asdict(self.schedule),
            "generator": self.stepper.generator.get_state(),
            "global_generator": torch.get_rng_state(),
            "history": self.history,
            "average": self.average,
            "counts": [self.num_dropped, self.num_failed_steps, self.num_averaged],
            "start": self.start,
            "seconds": self.seconds,
        }
        try:
            checkpoints.save(path, state)
        except OSError as error:
            intact = "there is no checkpoint yet"
            if self.saved_step is not None:
                intact = f"that of step {self.saved_step} is intact, and the guide stands at step {self.schedule.step}"
            repeat = ", and call fit again: it continues from the checkpoint"
            raise checkpoints.explain(error, f"the checkpoint {path}", intact, repeat) from error
        self.saved_step = self.schedule.step

    def resume(self, path: str | Path | None) -> bool:
        """Restore the state from a checkpoint.

        Returns:
            whether there was a checkpoint.

        Raises:
            ValueError: if it belongs to other data, another model or guide, other settings, or another kind of device.
        """
        state = None if path is None else cast("checkpoints.FitState | None", checkpoints.load(path, "fit"))
        if state is None:
            return False
        self._check_same_fit(state, path)
        self._restore_parameters(state, path)
        for (_, *moments), saved_moments in zip(self.adam.state(), state["moments"], strict=True):
            for moment, saved_moment in zip(moments, saved_moments, strict=True):
                moment.copy_(saved_moment)
        self.adam.set_scales(state["scales"])
        self.schedule = Schedule(**state["schedule"])  # type: ignore[arg-type]
        self.stepper.generator.set_state(state["generator"])
        torch.set_rng_state(state["global_generator"])
        self.history, self.average, self.start = state["history"], state["average"], state["start"]
        self.num_dropped, self.num_failed_steps, self.num_averaged = state["counts"]
        self.begin_time -= state["seconds"]
        self.saved_step = self.schedule.step
        if self.settings.steps > self.schedule.steps:
            self.schedule.extend(self.settings.steps)
            if not self.schedule.is_averaging:
                self.average, self.num_averaged = [], 0
        return True

    def _check_same_fit(self, state: checkpoints.FitState, path: str | Path | None) -> None:
        """Refuse a checkpoint of another fit; one with fewer steps is continued."""
        self.fingerprint = take_fingerprint(self.stepper.program)
        self._refuse(path, find_differences(state["fingerprint"], self.fingerprint))
        saved = state["settings"]
        own = {name: value for name, value in asdict(self.settings).items() if saved[name] != value}
        if own.get("steps", 0) > cast("int", saved["steps"]):
            del own["steps"]
        changed = [f"{name}={saved[name]}, not {value}" for name, value in own.items()]
        if changed:
            raise ValueError(
                f"fit: {path} is a checkpoint of a fit with other settings ({'; '.join(changed)}): give the same, or "
                "choose another path"
            )
        if state["generator"].shape != self.stepper.generator.get_state().shape:
            raise ValueError(f"fit: {path} is a checkpoint from another kind of device; resume it there")

    @torch.no_grad()
    def _restore_parameters(self, state: checkpoints.FitState, path: str | Path | None) -> None:
        """Restore the parameters, unless model and guide give other densities with them than they gave then."""
        program, before = self.stepper.program, self.adam.snapshot()
        for name, parameter in own_parameters(program).items():
            parameter.copy_(state["parameters"][name])
        changes = find_changes(state["probe"], program)
        if changes:
            self.adam.restore(before)
        self._refuse(path, changes)

    @staticmethod
    def _refuse(path: str | Path | None, differences: list[str]) -> None:
        if differences:
            raise ValueError(
                f"fit: {path} is a checkpoint of other data, another model or guide: {'; '.join(differences)}. Choose "
                "another path, or delete it"
            )
