"""``fit``: from a model and a guide to a posterior and a verdict, without tuning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from pyro_flowguides.diagnostics import Diagnosis
from pyro_flowguides.diagnostics.export import export_program
from pyro_flowguides.diagnostics.verdict import diagnose_program
from pyro_flowguides.inference.run import FitDivergedError, Run
from pyro_flowguides.programs.program import Program
from pyro_flowguides.programs.types import Args, Guide, Kwargs, Model

__all__ = ["FitDivergedError", "FitResult", "fit"]


@dataclass
class FitResult:
    """What :func:`fit` returns: the trained guide with how it got there and what it is worth.

    Attributes:
        program: what was fitted: ``model``, ``guide``, ``args`` and ``kwargs``, and what was found out about them.
        elbo_history: the bound's estimate at every step (NaN where no particle was finite).
        seconds: wall time, warm start included, diagnosis not.
        route: how the bound was evaluated, and why.
        start: where the warm start put the guide; empty without one.
        reason: why the fit ended.
        dropped: particles left out because their weight or gradient was not finite.
        diagnosis: the verdict; ``None`` where there can be none, as for a minibatch.
        unjudged: why there is no verdict; empty if there is one.
    """

    program: Program = field(repr=False)
    elbo_history: list[float]
    seconds: float
    route: str
    start: str
    reason: str
    dropped: int
    diagnosis: Diagnosis | None = field(repr=False)
    unjudged: str = ""

    @property
    def model(self) -> Model:
        """The model."""
        return self.program.model

    @property
    def guide(self) -> Guide:
        """The trained guide."""
        return self.program.guide

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

    def to_inference_data(self, **options: Any) -> Any:
        """Draws, log p, log q, predictive and observed data for ArviZ, see
        :func:`~pyro_flowguides.diagnostics.to_inference_data`."""
        return export_program(self.program, **options)

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
    num_particles: int = 32,
    lr: float = 1e-2,
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
    r"""Fit a guide to a model: warm start, vectorized particles, schedule, plateau detection, averaging, verdict.

    Any guide works; Pyro's own skip what they cannot use. For flow guides the affine part of the guide first becomes
    the best Gaussian found by a short deterministic search (:func:`~pyro_flowguides.inference.warm_start.warm_start`),
    so that the flow models only what a Gaussian cannot. Then Adam follows the gradient of the ELBO: at a constant step
    size until the bound stands still or is nearly that of the evidence, not at all where the start is, and with a
    falling step size, more particles and the path gradient to the end
    (:class:`~pyro_flowguides.inference.schedule.Schedule`). The last iterates are averaged where that is better.

    A step needs the model's density of many particles at once. A model that broadcasts over an outermost plate is run
    under one; a model written for one particle (``x @ slope``, a layer with random weights) is mapped over them by
    ``torch.func.vmap``, which costs little more. Only where neither gives the numbers of single runs, as with a branch
    on a latent value, particles run one after the other through Pyro's traces; ``route`` in the result says so.

    Args:
        model, guide: as for ``pyro.infer.SVI``.
        args, kwargs: the model's arguments.
        steps: most steps to take; easy posteriors stop early.
        num_particles: draws per step, twice as many at the end.
        lr: Adam's step size while exploring.
        tolerance: gain of the ELBO, in nats, over a quarter of the steps so far that is not worth going on for.
        warm_start: search for a Gaussian start (flow guides only).
        path_gradient: refine with the path gradient (flow guides only); ``False`` for the total gradient throughout.
        importance: 1 for the ELBO, K for the importance-weighted bound with its doubly reparametrized gradient.
        temper: exponent of the target at the first step, in (0, 1); it rises to 1 over three quarters of the
            exploration, so that a multimodal target is met while it is still flat.
        compile: ``True`` to compile the steps of flow guides (loss, gradients and optimizer as one function of torch's
            inductor; up to 50 short steps go in one call, which on a GPU is a CUDA graph). It takes 10 to 30 seconds on
            one core, 3 to 7 where an earlier run has left its results on the disk, and then saves more than half of
            each step, up to four fifths of a short one. ``"auto"`` compiles only where the remaining steps will repay
            it. Where compiling fails the fit goes on without; ``route`` in the result says what was done.
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
    if steps < 1 or num_particles < 1 or importance < 1 or num_particles % importance:
        raise ValueError(
            f"fit: steps, num_particles and importance must be positive, and importance must divide num_particles, got "
            f"{steps}, {num_particles}, {importance}"
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
            "num_particles": num_particles,
            "lr": lr,
            "tolerance": tolerance,
            "path_gradient": path_gradient,
            "importance": importance,
            "temper": temper,
            "seed": seed,
        }
        guide(*args, **kwargs)  # creates the parameters, if there are none yet
        program = Program.inspect(model, guide, args, kwargs)
        run = Run(program, settings, compile)
        try:
            if not run.resume(checkpoint):
                run.begin(warm_start)
            run.train(checkpoint, checkpoint_every, progress)
        finally:
            run.descent.release()
        result = FitResult(
            program=program,
            elbo_history=run.history,
            seconds=run.seconds,
            route=run.objective.route,
            start=run.start,
            reason=run.schedule.reason,
            dropped=run.dropped,
            diagnosis=None,
        )
        del run  # what its steps held is not needed any more
        result.diagnosis, result.unjudged = _judge(program)
    return result


def _judge(program: Program) -> tuple[Diagnosis | None, str]:
    """The verdict, or why there is none: the fit stands either way."""
    try:
        return diagnose_program(program), ""
    except ValueError as error:
        return None, str(error)
