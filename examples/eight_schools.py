"""Eight schools (Rubin 1981): which guide captures the funnel?

Fits the centred and the non-centred model with two of Pyro's guides and three flow guides through plain
``pyro.infer.SVI``, prints one table, and plots (mu, log tau) of each guide beside a NUTS reference.

    python examples/eight_schools.py --output demo_output
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor
from tqdm import tqdm

import pyro_flowguides as fg

EFFECT = [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]
STANDARD_ERROR = [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]

# Each guide with its step size: a network wants a smaller one than a mean and a scale.
GUIDES: dict[str, tuple[Callable[..., Any], float]] = {
    "AutoNormal": (AutoNormal, 0.05),
    "AutoMultivariateNormal": (AutoMultivariateNormal, 0.05),
    "AutoPlanar": (fg.AutoPlanar, 0.05),
    "AutoSylvester": (fg.AutoSylvester, 0.05),
    "AutoIAF": (fg.AutoIAF, 0.02),
}


def centred(effect: Tensor, standard_error: Tensor) -> None:
    """The schools' effects around their mean, as one would write it down: a funnel in (theta, log tau)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(effect)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, standard_error), obs=effect)


def noncentred(effect: Tensor, standard_error: Tensor) -> None:
    """The same posterior of (mu, tau), with the effects measured in units of tau."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(effect)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * z, standard_error), obs=effect)


MODELS = {"centred": centred, "non-centred": noncentred}


@dataclass
class Fit:
    """What one guide gave on one model."""

    model: str
    guide: str
    diagnosis: fg.Diagnosis
    seconds: float
    draws: dict[str, Tensor]

    def row(self) -> dict[str, Any]:
        d = self.diagnosis
        return {
            "model": self.model,
            "guide": self.guide,
            "ELBO": f"{d.elbo:.2f} ± {d.elbo_se:.2f}",
            "k-hat": f"{d.khat:.2f}",
            "ESS": f"{d.ess / d.num_samples:.0%}",
            "seconds": f"{self.seconds:.1f}",
        }


def fit(model_name: str, guide_name: str, data: tuple[Tensor, Tensor], steps: int, particles: int) -> Fit:
    """Plain Pyro: a guide, an optimiser, an ELBO, and a loop."""
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    model = MODELS[model_name]
    guide_class, learning_rate = GUIDES[guide_name]
    guide = guide_class(model)
    optimiser = pyro.optim.ClippedAdam({"lr": learning_rate, "lrd": 0.02 ** (1 / steps)})
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, optimiser, elbo)
    start = time.perf_counter()
    for _ in range(steps):
        svi.step(*data)
    seconds = time.perf_counter() - start
    diagnosis = fg.diagnose(model, guide, *data, num_samples=4000)
    draws = Predictive(model, guide=guide, num_samples=2000, parallel=True, return_sites=["mu", "tau"])(*data)
    return Fit(model_name, guide_name, diagnosis, seconds, {name: value.flatten() for name, value in draws.items()})


def reference(data: tuple[Tensor, Tensor], warmup: int, draws: int) -> dict[str, Tensor]:
    """NUTS on the non-centred model, which it explores without trouble; the posterior of (mu, tau) is the same."""
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    kernel = NUTS(noncentred, jit_compile=True, ignore_jit_warnings=True)
    mcmc = MCMC(kernel, num_samples=draws, warmup_steps=warmup, disable_progbar=True)
    mcmc.run(*data)
    return dict(mcmc.get_samples())


def plot(fits: list[Fit], nuts: dict[str, Tensor], path: Path) -> None:
    """(mu, log tau) of every guide over the reference, one row per model."""
    columns = [*GUIDES]
    figure, axes = plt.subplots(
        len(MODELS), 1 + len(columns), figsize=(2.6 * (1 + len(columns)), 5.6), sharex=True, sharey=True
    )
    by_name = {(result.model, result.guide): result for result in fits}
    for row, model in zip(axes, MODELS, strict=True):
        row[0].set_ylabel(f"{model}\nlog tau")
        for axis, guide in zip(row, [None, *columns], strict=True):
            axis.scatter(nuts["mu"], nuts["tau"].log(), s=3, color="0.75", linewidths=0, rasterized=True)
            if guide is None:
                axis.set_title("NUTS", fontsize=10)
                continue
            result = by_name[model, guide]
            axis.scatter(
                result.draws["mu"], result.draws["tau"].log(), s=3, alpha=0.4, linewidths=0, color="C0", rasterized=True
            )
            axis.set_title(f"{guide}\nELBO {result.diagnosis.elbo:.2f}, k-hat {result.diagnosis.khat:.2f}", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("mu")
    axes[0, 0].set_xlim(-12, 20)
    axes[0, 0].set_ylim(-5, 4.5)
    figure.suptitle("Eight schools: each guide (blue) over NUTS (grey)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for the table and the plot")
    parser.add_argument("--steps", type=int, default=800, help="SVI steps per fit")
    parser.add_argument("--particles", type=int, default=16, help="draws per step")
    parser.add_argument("--draws", type=int, default=1000, help="NUTS draws")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    data = torch.tensor(EFFECT), torch.tensor(STANDARD_ERROR)

    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        nuts = pool.submit(reference, data, max(arguments.draws // 2, 10), arguments.draws)
        jobs = [
            pool.submit(fit, model, guide, data, arguments.steps, arguments.particles)
            for model in MODELS
            for guide in GUIDES
        ]
        with tqdm(total=1 + len(jobs), desc="NUTS and 10 fits on two cores") as progress:
            for done in as_completed([nuts, *jobs]):
                done.result()
                progress.update()
        fits, draws = [job.result() for job in jobs], nuts.result()

    table = pd.DataFrame([result.row() for result in fits])
    print(f"\n{table.to_string(index=False)}\n")
    table.to_csv(arguments.output / "eight_schools.csv", index=False)
    plot(fits, draws, arguments.output / "eight_schools.png")
    print(f"Plot: {arguments.output / 'eight_schools.png'}")


if __name__ == "__main__":
    main()
