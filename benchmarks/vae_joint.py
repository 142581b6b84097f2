"""Flow posteriors and flow priors in joint training: encoder, decoder, posterior and prior together.

    python benchmarks/vae_joint.py --data mnist10k.npz
    python benchmarks/vae_joint.py --data freyfaces.npz --shape 28 20

Gated convolutional networks; Bernoulli pixels (dynamically binarized) for MNIST, discretized logistic pixels for grey
images. Every variant has the same networks, batches and number of epochs, and is evaluated with averaged weights. Every
data set, variant, seed and number of epochs is one row of ``vae_joint.csv``; a program that was interrupted continues
where it stopped. Rows of other sizes do not mix: give another ``--output``.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import pyro
import torch
from machine import processor
from row_files import append_row, read_rows
from torch import Tensor

from pyro_flowguides.vae import EMA, MODELS, VAE, ELBOLoss, Images, Minibatches, derive_seed, load_images

BATCH_SIZE = 100
CLIP = 10.0
#: Steps over which the step size rises.
LR_WARMUP = 100
#: Of the weights that are evaluated: the last ones of a run at a constant step size are noisy.
AVERAGING = 0.99
#: Draws of each image for the bound, which needs fewer than the likelihood.
BOUND_SAMPLES = 20
DIAGONAL = "diagonal Gaussian"
VARIANTS: dict[str, dict[str, Any]] = {
    DIAGONAL: {"posterior": "normal"},
    "IAF posterior": {"posterior": "iaf"},
    "planar posterior": {"posterior": "planar"},
    "Sylvester posterior": {"posterior": "sylvester"},
    "MAF prior": {"posterior": "normal", "prior": "maf"},
    "IAF posterior, MAF prior": {"posterior": "iaf", "prior": "maf"},
}


def train(vae: VAE, minibatches: Minibatches, options: argparse.Namespace) -> float:
    """Milliseconds of processor time per step."""
    steps = options.epochs * minibatches.steps_per_epoch
    optimizer = torch.optim.Adamax(vae.parameters(), lr=options.learning_rate)
    loss_fn, ema = ELBOLoss(warmup_steps=steps // 4), EMA(vae, AVERAGING)
    begin = time.process_time()
    for step in range(steps):
        pyro.set_rng_seed(derive_seed(minibatches.seed, "noise", step) % 2**32)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            loss, _ = loss_fn(vae.terms(minibatches.shard(step, 0).float()), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = options.learning_rate * min(1.0, (step + 1) / LR_WARMUP)
        if torch.nn.utils.clip_grad_norm_(vae.parameters(), CLIP).isfinite():
            optimizer.step()
            ema.update(vae)
    ema.copy_to(vae)
    return 1000 * (time.process_time() - begin) / steps


@torch.no_grad()
def evaluate(vae: VAE, pixels: Tensor, samples: int) -> dict[str, float]:
    """Means over images, in nats, in single precision."""
    vae.eval()
    pyro.set_rng_seed(0)
    batches = [x.float() for x in pixels.split(20)]
    elbo = torch.cat([vae.terms(x, BOUND_SAMPLES).elbo.mean(0) for x in batches])
    log_likelihood = torch.cat([vae.log_likelihood(x, samples) for x in batches])
    return {"elbo": elbo.mean().item(), "log_likelihood": log_likelihood.mean().item()}


def run(variant: str, images: Images, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    binary = options.likelihood == "bernoulli"
    minibatches = Minibatches(images, batch_size=BATCH_SIZE, dynamic=binary, seed=seed)
    pyro.set_rng_seed(seed)
    vae = MODELS["vae"](
        images.shape,
        likelihood=options.likelihood,
        latent_dim=options.latent_dim,
        network="gated",
        hidden=options.hidden,
        **VARIANTS[variant],
    )
    spent = train(vae, minibatches, options)
    test = (images.binarized() if binary else images).test[: options.test_images]
    return {
        "data": Path(options.data).stem,
        "variant": variant,
        "seed": seed,
        "epochs": options.epochs,
        **evaluate(vae, test, options.samples),
        "ms_per_step": spent,
    }


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def gains(rows: list[dict[str, str]], variant: str, key: str) -> list[float]:
    """By seed, how much more than the diagonal Gaussian with the same seed."""
    found = {name: {row["seed"]: float(row[key]) for row in rows if row["variant"] == name} for name in VARIANTS}
    base = found[DIAGONAL]
    return [value - base[seed] for seed, value in found[variant].items() if seed in base]


def table(rows: list[dict[str, str]]) -> str:
    lines = [
        "| data, epochs | variant | seeds | ELBO | gain | IW log-likelihood | gain | CPU ms per step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for data, epochs in dict.fromkeys((row["data"], row["epochs"]) for row in rows):
        own = [row for row in rows if (row["data"], row["epochs"]) == (data, epochs)]
        for variant in dict.fromkeys(row["variant"] for row in own):
            cells = [f"{data}, {epochs}", variant, str(sum(row["variant"] == variant for row in own))]
            for key in ("elbo", "log_likelihood"):
                gained = gains(own, variant, key)
                cells.append(spread([float(row[key]) for row in own if row["variant"] == variant]))
                cells.append(spread(gained) if gained and variant != DIAGONAL else "")
            spent = statistics.mean(float(row["ms_per_step"]) for row in own if row["variant"] == variant)
            lines.append(f"| {' | '.join(cells)} | {spent:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the images: an .npz file or a folder of IDX files")
    parser.add_argument("--shape", type=int, nargs="+", default=(), help="of an image, where the file has flat rows")
    parser.add_argument("--likelihood", default=None, help="by default by the name of the data")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--bf16", action="store_true", help="train the networks in bfloat16 (log densities are not)")
    parser.add_argument("--latent-dim", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--test-images", type=int, default=500)
    parser.add_argument("--samples", type=int, default=500, help="draws of each image in the evaluation")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    if options.likelihood is None:
        options.likelihood = "bernoulli" if "mnist" in Path(options.data).stem.lower() else "logistic"
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "vae_joint.csv"
    with pyro.validation_enabled(False):
        images = load_images(options.data, shape=options.shape)
        for seed in options.seeds:
            for variant in options.variants:
                key = {
                    "data": Path(options.data).stem,
                    "variant": variant,
                    "seed": str(seed),
                    "epochs": str(options.epochs),
                }
                if not any(key.items() <= row.items() for row in read_rows(path)):
                    append_row(path, run(variant, images, seed, options))
    precision = "networks in bfloat16, evaluation in single precision" if options.bf16 else "single precision"
    note = (
        f"`benchmarks/vae_joint.py`, {datetime.date.today()}, torch {torch.__version__}, {torch.get_num_threads()} "
        f"thread of {processor()}. Step size {options.learning_rate:g}, {precision}; {options.test_images} test "
        f"images, {options.samples} draws for the likelihood. Gains are over the diagonal Gaussian of the same seed; "
        f"± is the deviation over seeds. Nats per image."
    )
    text = f"{note}\n\n{table(read_rows(path))}"
    (options.output / "vae_joint.md").write_text(text, "utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
