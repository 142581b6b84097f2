"""What a training step of a VAE costs: ours, plain Pyro SVI, and a loop written by hand with the same modules.

    python benchmarks/vae_step.py --output benchmarks/results/vae_step.md

An MLP VAE with 64 latents on batches of 100 images of 28 × 28, with a Gaussian and with flow posteriors. The loops take
steps in turns, and what is measured is the time of the processor, so that what else the machine does matters little.
Then the flow part of Householder-Sylvester layers with amortized parameters, against the same layers with Q made by
multiplying D × D reflection matrices.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor
from torch.nn import functional as F

from pyro_flowguides.transforms import ConditionalHouseholderSylvester
from pyro_flowguides.vae import MODELS, VAE, ELBOLoss

DATA_SHAPE, LATENT_DIM, BATCH, LEARNING_RATE = (1, 28, 28), 64, 100, 1e-3
POSTERIORS = ("normal", "planar", "iaf")
Job = Callable[[], Any]


def medians(jobs: dict[str, Job], rounds: int, warm_up: int = 10) -> dict[str, list[float]]:
    """Milliseconds of every job in every round, the jobs taking turns, their order reversed every other round."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for round_ in range(rounds + warm_up):
        for name in list(jobs) if round_ % 2 else reversed(jobs):
            start = time.process_time()
            jobs[name]()
            if round_ >= warm_up:
                times[name].append(1e3 * (time.process_time() - start))
    return times


# -- a training step ---------------------------------------------------------------------------------------------------


def ours(vae: VAE, x: Tensor) -> Job:
    optimizer, objective = torch.optim.Adam(vae.parameters(), lr=LEARNING_RATE), ELBOLoss()

    def step() -> float:
        loss, _ = objective(vae.terms(x), step=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def by_hand(vae: VAE, x: Tensor) -> Job:
    """The same step in plain torch: the modules of the VAE, every formula written out."""
    optimizer = torch.optim.Adam(vae.parameters(), lr=LEARNING_RATE)
    flow: Any = getattr(vae.posterior, "flow", None)

    def step() -> float:
        loc, scale, context = vae.encoder(x)
        noise = torch.randn_like(loc)
        z = loc + scale * noise
        log_q = -(0.5 * noise * noise + scale.log()).sum(-1)
        if flow is not None:
            z, ladj = flow.condition(context).forward_and_ladj(z)
            log_q = log_q - ladj
        log_p = -0.5 * (z * z).sum(-1)
        logits = vae.decoder(z)[..., 0]
        reconstruction = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        loss = (reconstruction + (log_q - log_p).sum()) / len(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def by_svi(vae: VAE, x: Tensor) -> Job:
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": LEARNING_RATE}), Trace_ELBO())
    return lambda: svi.step(x)


LOOPS: dict[str, Callable[[VAE, Tensor], Job]] = {"by hand": by_hand, "ours": ours, "Pyro SVI": by_svi}


def training_steps(rounds: int) -> str:
    x = (torch.rand(BATCH, *DATA_SHAPE) < 0.2).float()
    lines = ["| posterior | by hand, ms | ours, ms | Pyro SVI, ms | ours / by hand | Pyro SVI / by hand |"]
    lines.append("|---|---|---|---|---|---|")
    for posterior in POSTERIORS:
        pyro.clear_param_store()
        torch.manual_seed(0)
        vae = MODELS["vae"](DATA_SHAPE, latent_dim=LATENT_DIM, posterior=posterior)
        jobs = {name: loop(copy.deepcopy(vae), x) for name, loop in LOOPS.items()}
        times = medians(jobs, rounds)
        hand, own, svi = (statistics.median(times[name]) for name in LOOPS)
        ratios = (relative(times["ours"], times["by hand"]), relative(times["Pyro SVI"], times["by hand"]))
        cells = [f"{value:.2f}" for value in (hand, own, svi)] + [f"{ratio:.3f}" for ratio in ratios]
        lines.append(f"| {posterior} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def relative(times: list[float], reference: list[float]) -> float:
    """The median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(times, reference, strict=True))


# -- the Householder variant -------------------------------------------------------------------------------------------


def chained(x: Tensor, theta: dict[str, Tensor], size: int) -> tuple[Tensor, Tensor]:
    """A Householder-Sylvester layer whose Q is a product of D × D matrices, for each point its own."""
    eye = torch.eye(x.shape[-1])
    q = eye
    for v in theta["vectors"].unbind(-2):
        q = q @ (eye - 2 * v[..., :, None] * v[..., None, :] / (v * v).sum(-1)[..., None, None])
    q = q[..., :size]
    product = theta["diagonal"] * theta["diagonal_tilde"]
    root = (product * product + 4).sqrt()  # the bound that keeps the layer invertible
    factor = 0.99 / 2 * (1 + product / (2 + root))
    r = theta["triangles"].triu(1) + torch.diag_embed(theta["diagonal"])
    r_tilde = theta["triangles"].tril(-1).mT + torch.diag_embed(factor * theta["diagonal_tilde"])
    inner = r_tilde @ (q.mT @ x[..., None]) + theta["b"][..., None]
    tanh = inner.tanh()
    y = x + (q @ (r @ tanh))[..., 0]
    ladj = ((1 - tanh[..., 0] ** 2) * factor * product).log1p().sum(-1)
    return y, ladj


def with_gradient(pair: tuple[Tensor, Tensor]) -> None:
    y, ladj = pair
    (y.square().sum() - ladj.sum()).backward()


def householder(rounds: int) -> str:
    lines = ["| D | reflections | hypernetwork, ms | ours, ms | matrices, ms | flow part: matrices / ours |"]
    lines.append("|---|---|---|---|---|---|")
    for dim, reflections in ((64, 4), (64, 8), (64, 16)):
        torch.manual_seed(0)
        flow = ConditionalHouseholderSylvester(dim, 256, reflections=reflections)
        context, x = torch.randn(BATCH, 256), torch.randn(BATCH, dim)
        for found, wanted in zip(
            flow.condition(context).forward_and_ladj(x), chained(x, flow.theta(context), dim), strict=True
        ):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)

        def hypernetwork(flow: Any = flow, context: Tensor = context) -> None:
            sum(value.sum() for value in flow.theta(context).values()).backward()

        jobs: dict[str, Job] = {
            "hypernetwork": hypernetwork,
            "ours": lambda flow=flow, context=context, x=x: with_gradient(flow.condition(context).forward_and_ladj(x)),
            "matrices": lambda flow=flow, context=context, x=x, dim=dim: with_gradient(
                chained(x, flow.theta(context), dim)
            ),
        }
        times = medians(jobs, rounds, warm_up=3)
        hyper, own, matrices = (statistics.median(times[name]) for name in jobs)
        lines.append(
            f"| {dim} | {reflections} | {hyper:.2f} | {own:.2f} | {matrices:.2f} | "
            f"{(matrices - hyper) / (own - hyper):.1f} |"
        )
        print(lines[-1], flush=True)
    return "\n".join(lines)


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--householder-rounds", type=int, default=40)
    parser.add_argument("--output", type=Path, help="file to write the tables to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    steps, layers = training_steps(arguments.rounds), householder(arguments.householder_rounds)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(report(arguments, steps, layers))


def report(arguments: argparse.Namespace, steps: str, layers: str) -> str:
    command = (
        f"python benchmarks/vae_step.py --rounds {arguments.rounds} --householder-rounds {arguments.householder_rounds}"
    )
    return f"""# A training step of a VAE

`{command}`, {datetime.date.today()}, torch {torch.__version__}, Pyro {pyro.__version__},
one core of {processor()}, float32.

MLP 784-300-300, latent {LATENT_DIM}, batch {BATCH}; default flows of the registry. Processor time, medians over
interleaved rounds; a ratio is the median of the ratios within a round.

{steps}

## Householder-Sylvester: vectors against matrices

Forward and backward of one amortized layer with D = M, batch {BATCH}; the flow part is what is left without the
hypernetwork.

{layers}
"""


if __name__ == "__main__":
    main()
