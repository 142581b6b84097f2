"""``fit``: from a model and a guide to a posterior and a verdict, without tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Literal, cast

import torch

from pyro_flowguides.diagnostics import Diagnosis
from pyro_flowguides.diagnostics.export import export_program
from pyro_flowguides.diagnostics.verdict import diagnose_program
from pyro_flowguides.inference.checkpoint import reserved
from pyro_flowguides.inference.objective import Route
from pyro_flowguides.inference.run import FitSettings, Run
from pyro_flowguides.inference.step_loop import GuideT
from pyro_flowguides.nn.arguments import check_count, check_path
from pyro_flowguides.programs.program import Program
from pyro_flowguides.programs.running import PYRO_LOCK
from pyro_flowguides.programs.types import Args, Kwargs, Model

if TYPE_CHECKING:
    from arviz import InferenceData

__all__ = ["FitResult", "fit"]


@dataclass
class FitResult(Generic[GuideT]):
    """A trained guide, how it was trained, and a verdict on it: the result of :func:`fit`.

    Attributes:
        program: what was fitted: model, guide, their arguments, and what was found out about them.
        elbo_history: the estimate of the bound at every step (NaN where no particle was finite).
        seconds: wall time, including the warm start and excluding the diagnosis.
        route: how steps evaluated the bound; ``route.kind`` is ``"compiled"``, ``"recorded"``, ``"batched"``,
            ``"traced"`` or ``"sequential"``, and ``route.reason`` says why no faster kind was used.
        start: where the warm start put the guide; empty without one.
        reason: why the fit ended.
        num_dropped: number of particles left out because their weight or gradient was not finite.
        diagnosis: the verdict; ``None`` where there can be none, as for a minibatch.
        why_no_verdict: why ``diagnosis`` is ``None``; empty otherwise.
    """

    program: Program = field(repr=False)
    elbo_history: list[float]
    seconds: float
    route: Route
    start: str
    reason: str
    num_dropped: int
    diagnosis: Diagnosis | None = field(repr=False, default=None)
    why_no_verdict: str = ""

    @property
    def model(self) -> Model:
        """The model."""
        return self.program.model

    @property
    def guide(self) -> GuideT:
        """The trained guide."""
        return cast(GuideT, self.program.guide)

    @property
    def args(self) -> Args:
        """The positional arguments of model and guide."""
        return self.program.args

    @property
    def kwargs(self) -> Kwargs:
        """The keyword arguments of model and guide."""
        return self.program.kwargs

    @property
    def steps(self) -> int:
        """Number of steps taken."""
        return len(self.elbo_history)

    def to_inference_data(
        self, *, num_samples: int = 1000, resample: bool = False, coords: Mapping[str, Sequence[object]] | None = None
    ) -> InferenceData:
        """Export draws, log p, log q, predictive draws and observed data to ArviZ.

        Args:
            num_samples, resample, coords: as for :func:`~pyro_flowguides.diagnostics.to_inference_data`.
        """
        return export_program(self.program, num_samples=num_samples, resample=resample, coords=coords)

    def __str__(self) -> str:
        dropped = f", {self.num_dropped} particles dropped" if self.num_dropped else ""
        return (
            f"{type(self.guide).__name__}: {self.steps} steps in {self.seconds:.1f} s{dropped}; ended because "
            f"{self.reason}\n{self.diagnosis or 'No verdict: ' + self.why_no_verdict}"
        )


def fit(
    model: Model,
    guide: GuideT,
    *args: object,
    steps: int = 2000,
    num_particles: int = 32,
    lr: float = 1e-2,
    tolerance: float = 0.01,
    warm_start: bool = True,
    path_gradient: bool = True,
    importance: int = 1,
    temper: float | None = None,
    compile: bool | Literal["auto"] = "auto",
    seed: int = 0,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 200,
    progress: bool = True,
    **kwargs: object,
) -> FitResult[GuideT]:
    r"""Fit a guide to a model, without tuning, and judge the result.

    Any guide works. A fit has five parts, of which the first needs a flow guide:

    1. *Warm start*: a short deterministic search finds the best Gaussian
       (:func:`~pyro_flowguides.inference.warm_start.warm_start`), which becomes the affine part of the guide. The flow
       then models only what a Gaussian cannot.
    2. *Exploration*: Adam follows the gradient of the ELBO at a constant step size. It ends when the ELBO no longer
       rises, when the ELBO comes close to the log evidence, or after half of the steps. A fit that starts close to the
       log evidence skips it.
    3. *Refinement*: the step size falls, the number of particles doubles, and the path gradient of a flow guide
       replaces the total gradient (:class:`~pyro_flowguides.inference.schedule.Schedule`).
    4. *Averaging*: the average of the last iterates replaces the last one if its ELBO is higher.
    5. *Verdict*: :func:`~pyro_flowguides.diagnostics.diagnose` judges the guide.

    A step evaluates the model's density at many particles at once. A model that broadcasts runs under an outermost
    plate of particles. A model written for one particle (``x @ slope``, a layer with random weights) is mapped over
    them by ``torch.func.vmap``, which costs little more. Where neither gives the numbers of single runs, for example
    because the model branches on a latent value, particles run one after the other through Pyro's traces. ``route`` in
    the result says which of these was used, and why.

    A particle at which the model raises an error or has no finite density is left out of its step, and counted.

    Args:
        model, guide: as for ``pyro.infer.SVI``.
        *args, **kwargs: the model's arguments.
        steps: most steps to take; easy posteriors stop early.
        num_particles: draws per step while exploring.
        lr: Adam's step size while exploring.
        tolerance: smallest gain of the ELBO, in nats over a quarter of the steps so far, that counts as a rise.
        warm_start: search for a Gaussian start (flow guides only).
        path_gradient: refine with the path gradient (flow guides only); ``False`` for the total gradient throughout.
        importance: 1 for the ELBO, K for the importance-weighted bound with its doubly reparametrized gradient.
        temper: exponent of the target density at the first step, in (0, 1). It rises to 1 during the first three
            quarters of the exploration, so that the guide finds the modes of a target while that is still flat.
        compile: whether to compile the steps of flow guides. ``"auto"`` compiles on a GPU, and on a CPU only where the
            remaining steps repay it; ``True`` compiles always, ``False`` never. Loss, gradient and update then form one
            function of torch's inductor; up to 50 short steps go into one call, which on a GPU is a CUDA graph. On one
            core, compiling takes 10 to 30 seconds, or 3 to 7 if an earlier run left its results on the disk. It saves
            more than half of each step, up to four fifths of a short one. Compiled steps differ from others by
            rounding, so that a fit with a checkpoint, which must resume exactly, compiles by ``"auto"`` only on a GPU.
            If compiling fails, the fit continues without, and ``route`` in the result says why.
        seed: seed of everything random in the fit; the global generator is restored afterwards.
        checkpoint: file to save to; if it exists, the fit resumes from it exactly. With more ``steps`` than before it
            goes on from there. A damaged file, and one of other data, another model, guide or other settings, is
            refused. Only one fit at a time uses a file.
        checkpoint_every: steps between saves. An interrupted call (Ctrl-C) leaves guide and checkpoint usable: the
            guide stands at the last step, and the same call goes on from the last save.
        progress: show a progress bar.

    Returns:
        a :class:`FitResult`; print it.

    Raises:
        FitDivergedError: if no particle was finite for many steps in a row, naming step, site, cause and remedy.
        TypeError: for an argument of another type.
        ValueError: for arguments out of range, for a model or guide that Pyro's validation refuses at every draw, with
            Pyro's message, or for a checkpoint that is damaged or of another fit.
        BlockingIOError: if another fit uses the checkpoint, in this process or another.
        OSError: if the checkpoint cannot be written, saying why, what is intact and what to do. A folder that is
            missing or read-only and a full disk are found before the first step.

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
    if checkpoint is not None:
        check_path("fit", "checkpoint", checkpoint)
    checkpoint_every = check_count("fit", "checkpoint_every", checkpoint_every)
    if compile not in (True, False, "auto"):
        raise ValueError(f'fit: compile must be True, False or "auto", got {compile!r}')
    settings = FitSettings(steps, num_particles, lr, tolerance, path_gradient, importance, temper, seed)
    with PYRO_LOCK, torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        # Timing decides where "auto" compiles on a CPU; a resumed fit must not depend on it.
        exact = "gpu" if compile == "auto" and checkpoint is not None else compile
        with nullcontext() if checkpoint is None else reserved(checkpoint):
            run = Run(model, guide, args, kwargs, settings, exact)
            try:
                if not run.resume(checkpoint):
                    run.begin(warm_start)
                run.train(checkpoint, checkpoint_every, progress)
            finally:
                run.stepper.release()
        result: FitResult[GuideT] = FitResult(
            program=run.stepper.program,
            elbo_history=run.history,
            seconds=run.seconds,
            route=run.stepper.route,
            start=run.start,
            reason=run.schedule.reason,
            num_dropped=run.num_dropped,
        )
        del run  # and with it recordings and compiled functions
        vars(result.program).pop("log_density", None)  # refers to the program: both would wait for a garbage collection
        try:
            result.diagnosis = diagnose_program(result.program)
        except (Exception, KeyboardInterrupt) as error:  # without a verdict the fit is still of use
            result.why_no_verdict = str(error) or type(error).__name__
    return result
