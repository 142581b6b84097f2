"""Flow posteriors and flow priors, with encoder, decoder, posterior and prior trained together.

    python benchmarks/vae_joint.py --data mnist10k.npz
    python benchmarks/vae_joint.py --data freyfaces.npz --shape 28 20

Gated convolutional networks; Bernoulli pixels (dynamically binarized) for MNIST, discretized logistic pixels for gray
images. Every variant has the same networks, batches and number of epochs, and is evaluated with averaged weights. Every
data set, variant, seed and number of epochs is a row of ``vae_joint.csv``; an interrupted program resumes where it
stopped. The table ``vae_joint.md`` is made from all rows. For other sizes, give another ``--output``.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyro
import torch
from machine import processor
from row_files import append_row, read_rows
from tables import markdown_table
from torch import Tensor

from pyro_flowguides.vae import EMA, MODELS, VAE, ELBOLoss, Images, Minibatches, derive_seed, load_images

RESULTS = Path(__file__).parent / "results" / "vae_joint.csv"
BATCH_SIZE = 100
CLIP = 10.0
#: Steps during which the step size rises.
LR_WARMUP = 100
#: Decay of the averages of the weights, which are less noisy than the last weights at a constant step size.
EMA_DECAY = 0.99
#: Draws per image for the bound, which needs fewer than the likelihood.
NUM_BOUND_SAMPLES = 20
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
    """Train a VAE, and return the processor milliseconds per step."""
    steps = options.epochs * minibatches.steps_per_epoch
    optimizer = torch.optim.Adamax(vae.parameters(), lr=options.learning_rate)
    loss_fn, ema = ELBOLoss(warmup_steps=steps // 4), EMA(vae, EMA_DECAY)
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
def evaluate(vae: VAE, pixels: Tensor, num_samples: int) -> dict[str, float]:
    """Return the bound and the likelihood, means over images in nats, in single precision."""
    vae.eval()
    pyro.set_rng_seed(0)
    batches = [x.float() for x in pixels.split(20)]
    elbo = torch.cat([vae.terms(x, NUM_BOUND_SAMPLES).elbo.mean(0) for x in batches])
    log_likelihood = torch.cat([vae.log_likelihood(x, num_samples) for x in batches])
    return {"elbo": elbo.mean().item(), "log_likelihood": log_likelihood.mean().item()}


def run(variant: str, images: Images, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate a variant, and return its results."""
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
    ms_per_step = train(vae, minibatches, options)
    test = (images.binarized() if binary else images).test[: options.test_images]
    return {**evaluate(vae, test, options.samples), "ms_per_step": ms_per_step}


def mean_and_deviation(values: list[float]) -> str:
    """Format the mean over seeds, and the standard deviation if there are several."""
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def gains(rows: list[dict[str, str]], variant: str, column: str) -> list[float]:
    """Return for every seed the difference from the diagonal Gaussian of the same seed."""
    plain = {row["seed"]: float(row[column]) for row in rows if row["variant"] == DIAGONAL}
    own = {row["seed"]: float(row[column]) for row in rows if row["variant"] == variant}
    return [value - plain[seed] for seed, value in own.items() if seed in plain]


def make_table(rows: list[dict[str, str]]) -> str:
    """Return a table with a row for every variant on the same data and for the same number of epochs."""
    header = ["data, epochs", "variant", "seeds", "ELBO", "gain", "IW log-likelihood", "gain", "CPU ms per step"]
    lines = []
    for data, epochs in dict.fromkeys((row["data"], row["epochs"]) for row in rows):
        compared = [row for row in rows if (row["data"], row["epochs"]) == (data, epochs)]
        for variant in dict.fromkeys(row["variant"] for row in compared):
            own = [row for row in compared if row["variant"] == variant]
            cells = [f"{data}, {epochs}", variant, str(len(own))]
            for column in ("elbo", "log_likelihood"):
                difference = gains(compared, variant, column) if variant != DIAGONAL else []
                cells.append(mean_and_deviation([float(row[column]) for row in own]))
                cells.append(mean_and_deviation(difference) if difference else "")
            lines.append([*cells, f"{statistics.mean(float(row['ms_per_step']) for row in own):.0f}"])
    return markdown_table(header, lines)


def write_table(path: Path) -> str:
    """Write the table beside the CSV file, and return its text."""
    rows = read_rows(path)
    text = (
        f"`benchmarks/vae_joint.py`, {rows[-1]['date']}, {rows[-1]['machine']}. {rows[-1]['settings']}. Gains are over "
        f"the diagonal Gaussian of the same seed; ± is the standard deviation over seeds. Nats per image.\n\n"
        f"{make_table(rows)}\n"
    )
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


def describe_settings(options: argparse.Namespace) -> str:
    precision = "networks in bfloat16, evaluation in single precision" if options.bf16 else "single precision"
    return (
        f"Step size {options.learning_rate:g}, {precision}; {options.test_images} test images, {options.samples} draws "
        "for the likelihood"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the images: an .npz file or a folder of IDX files")
    parser.add_argument("--shape", type=int, nargs="+", default=(), help="shape of an image, for files with flat rows")
    parser.add_argument("--likelihood", help="likelihood of a pixel; chosen by the name of the data by default")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--bf16", action="store_true", help="train the networks, not the log densities, in bfloat16")
    parser.add_argument("--latent-dim", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--test-images", type=int, default=500)
    parser.add_argument("--samples", type=int, default=500, help="draws per image in the evaluation")
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file; its rows are kept")
    options = parser.parse_args(argv)
    if options.likelihood is None:
        options.likelihood = "bernoulli" if "mnist" in Path(options.data).stem.lower() else "logistic"
    about = {
        "settings": describe_settings(options),
        "date": datetime.date.today(),
        "machine": f"torch {torch.__version__}, {torch.get_num_threads()} thread of {processor()}",
    }
    data, epochs = Path(options.data).stem, str(options.epochs)
    with pyro.validation_enabled(False):
        images = load_images(options.data, shape=options.shape)
        for seed in options.seeds:
            for variant in options.variants:
                key = {"data": data, "variant": variant, "seed": str(seed), "epochs": epochs}
                if not any(key.items() <= row.items() for row in read_rows(options.output)):
                    append_row(options.output, {**key, **run(variant, images, seed, options), **about})
    print(write_table(options.output))


if __name__ == "__main__":
    main()
