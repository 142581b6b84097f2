"""A chain of Pyro's NUTS that stops when its draws are close to the reference draws of posteriordb."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from posteriordb_fits import Errors, Job, errors, start_at_zero
from posteriordb_models import Posterior
from pyro.infer import MCMC, NUTS
from torch import Tensor

#: The largest errors of a chain that is close, in standard deviations and log standard deviations.
NUTS_ERROR = 0.1
#: Draws at the first check.
FIRST_CHECK = 100


class Stopped(Exception):
    """Ends a chain from within."""


class Watch:
    """A hook for MCMC that stops a chain whose draws are close to the reference draws, or whose time is over.

    ``last`` are the errors at the last check, ``next_check`` is the number of draws at the next one.
    """

    def __init__(self, posterior: Posterior, limit: float) -> None:
        self.posterior, self.limit = posterior, limit
        self.begin = time.process_time()
        self.draws: dict[str, list[Tensor]] = {}
        self.last: Errors | None = None
        self.count, self.next_check = 0, FIRST_CHECK

    def __call__(self, kernel: NUTS, params: Mapping[str, Tensor], stage: str, step: int) -> None:
        if stage.startswith("Sample"):
            for name, value in params.items():
                self.draws.setdefault(name, []).append(kernel.transforms[name].inv(value).detach())
            self.count += 1
        if self.count >= self.next_check:
            self.next_check = math.ceil(1.1 * self.count)
            self.last = self.errors()
            if self.last.worst <= NUTS_ERROR:
                raise Stopped
        if time.process_time() - self.begin > self.limit:
            raise Stopped

    def errors(self) -> Errors:
        return errors(self.posterior, {name: torch.stack(values) for name, values in self.draws.items()})


def run_nuts(posterior: Posterior, job: Job) -> dict[str, Any]:
    """Run one chain until the first check at which it is close to the reference draws, or until its time is over."""
    begin, cpu = time.perf_counter(), time.process_time()
    watch = Watch(posterior, job.nuts_seconds)
    kernel = NUTS(posterior.model, init_strategy=start_at_zero, max_plate_nesting=1)
    mcmc = MCMC(kernel, num_samples=10**6, warmup_steps=job.nuts_warmup, disable_progbar=True, hook_fn=watch)
    with contextlib.suppress(Stopped):
        mcmc.run(**posterior.data)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    last = watch.errors() if watch.count > 1 else Errors(math.inf, "", math.inf, "")
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "steps": watch.count,
        "mean_error": last.mean,
        "mean_at": last.mean_at,
        "log_sd_error": last.log_sd,
        "log_sd_at": last.log_sd_at,
        "verdict": "reached" if last.worst <= NUTS_ERROR else f"not within {job.nuts_seconds:g} CPU s",
        "note": f"{len(kernel._divergences)} divergences",
    }
