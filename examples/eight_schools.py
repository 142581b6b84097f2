"""Eight schools (Rubin 1981): which guide captures the funnel?

Compare two of Pyro's guides and three flow guides on the centered and the non-centered model with ``fg.compare``. Fit
the centered model once more with plain ``pyro.infer.SVI``. Print the tables, and plot (mu, log tau) of each guide over
a NUTS reference.

    python examples/eight_schools.py --output demo_output
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
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
from torch import Tensor
from tqdm import tqdm

import pyro_flowguides as fg

EFFECT = [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]
STANDARD_ERROR = [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]
GUIDES = ["normal", "mvn", "planar", "sylvester", "iaf"]

Draws = dict[str, Tensor]
Program = Callable[..., object]


def centered(effect: Tensor, standard_error: Tensor) -> None:
    """School effects around their mean, in the textbook form: the posterior is a funnel in (theta, log tau)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(effect)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, standard_error), obs=effect)


def noncentered(effect: Tensor, standard_error: Tensor) -> None:
    """The same posterior of (mu, tau), with the effects in units of tau."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(effect)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * z, standard_error), obs=effect)


MODELS = {"centered": centered, "non-centered": noncentered}


def compare(
    name: str, data: tuple[Tensor, Tensor], steps: int, repeats: int
) -> tuple[pd.DataFrame, str, dict[str, Draws]]:
    """Fit and assess all guides in one call. Return the table, its text, and draws from the best fit of each guide."""
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    options = {"steps": steps}
    comparison = fg.compare(MODELS[name], *data, guides=GUIDES, repeats=repeats, fit_options=options, progress=False)
    draws = {label: draw(result.guide, MODELS[name], data) for label, result in comparison.results.items()}
    return comparison.table, str(comparison), draws


def draw(guide: Program, model: Program, data: tuple[Tensor, Tensor]) -> Draws:
    """Draw (mu, tau) from a guide."""
    sampler = Predictive(model, guide=guide, num_samples=2000, parallel=True, return_sites=["mu", "tau"])
    return {name: value.flatten() for name, value in sampler(*data).items()}


def plain_svi(data: tuple[Tensor, Tensor], steps: int, num_particles: int = 16) -> str:
    """Fit a flow guide without ``fit``: an optimizer, an ELBO and a loop, as with any of Pyro's autoguides."""
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    guide = fg.AutoIAF(centered)  # was: AutoNormal(centered)
    optimizer = pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.02 ** (1 / steps)})
    svi = SVI(centered, guide, optimizer, Trace_ELBO(num_particles, vectorize_particles=True, max_plate_nesting=1))
    start = time.perf_counter()
    for _ in range(steps):
        svi.step(*data)
    seconds = time.perf_counter() - start
    diagnosis = fg.diagnose(centered, guide, *data)
    return (
        f"plain SVI, AutoIAF, {steps} steps: ELBO {diagnosis.elbo:.2f} ± {diagnosis.elbo_se:.2f}, "
        f"k-hat {diagnosis.khat:.2f}, ESS {100 * diagnosis.ess_fraction:.0f} %, {seconds:.1f} s; {diagnosis.verdict}"
    )


def reference(data: tuple[Tensor, Tensor], warmup_steps: int, num_samples: int) -> Draws:
    """Run NUTS on the non-centered model, where it mixes well; the posterior of (mu, tau) is the same."""
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    kernel = NUTS(noncentered, jit_compile=True, ignore_jit_warnings=True)
    mcmc = MCMC(kernel, num_samples=num_samples, warmup_steps=warmup_steps, disable_progbar=True)
    mcmc.run(*data)
    return dict(mcmc.get_samples())


def plot(tables: dict[str, pd.DataFrame], draws: dict[str, dict[str, Draws]], nuts: Draws, path: Path) -> None:
    """Plot (mu, log tau) of every guide over the reference, one row per model."""
    figure, axes = plt.subplots(
        len(MODELS), 1 + len(GUIDES), figsize=(2.6 * (1 + len(GUIDES)), 5.6), sharex=True, sharey=True
    )
    for row, model in zip(axes, MODELS, strict=True):
        row[0].set_ylabel(f"{model}\nlog tau")
        table = tables[model].set_index("guide")
        for axis, guide in zip(row, [None, *GUIDES], strict=True):
            axis.scatter(nuts["mu"], nuts["tau"].log(), s=3, color="0.75", linewidths=0, rasterized=True)
            if guide is None:
                axis.set_title("NUTS", fontsize=10)
            elif guide in draws[model]:
                mu, tau = draws[model][guide]["mu"], draws[model][guide]["tau"]
                axis.scatter(mu, tau.log(), s=3, alpha=0.4, linewidths=0, color="C0", rasterized=True)
                title = f"{guide}\nELBO {table.elbo[guide]:.2f}, k-hat {table.khat[guide]:.2f}"
                axis.set_title(title, fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("mu")
    axes[0, 0].set_xlim(-12, 20)
    axes[0, 0].set_ylim(-5, 4.5)
    figure.suptitle("Eight schools: each guide (blue) over NUTS (gray)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for the tables and the plot")
    parser.add_argument("--steps", type=int, default=1200, help="most steps of a fit; steps of plain SVI")
    parser.add_argument("--repeats", type=int, default=1, help="independent fits per guide")
    parser.add_argument("--num-samples", type=int, default=1000, help="number of NUTS draws")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    data = torch.tensor(EFFECT), torch.tensor(STANDARD_ERROR)

    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        compared = {name: pool.submit(compare, name, data, arguments.steps, arguments.repeats) for name in MODELS}
        svi = pool.submit(plain_svi, data, arguments.steps)
        nuts = pool.submit(reference, data, max(arguments.num_samples // 2, 10), arguments.num_samples)
        with tqdm(total=4, desc="two comparisons, plain SVI, and NUTS on two cores") as progress:
            jobs: list[Future[Any]] = [*compared.values(), svi, nuts]
            for job in as_completed(jobs):
                job.result()
                progress.update()

    results = {name: comparison.result() for name, comparison in compared.items()}
    for name, (table, text, _) in results.items():
        print(f"\n{name}\n{text}")
        table.to_csv(arguments.output / f"eight_schools_{name}.csv", index=False)
    print(f"\n{svi.result()}\n")
    path = arguments.output / "eight_schools.png"
    tables = {name: table for name, (table, _, _) in results.items()}
    draws = {name: drawn for name, (_, _, drawn) in results.items()}
    plot(tables, draws, nuts.result(), path)
    print(f"Plot: {path}")


if __name__ == "__main__":
    main()
