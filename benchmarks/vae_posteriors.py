"""The gain of flow posteriors behind an encoder, with a frozen decoder.

    python benchmarks/vae_posteriors.py --data mnist10k.npz

One decoder is trained (IWAE, 10 draws) and frozen. Then only an encoder and its posterior are trained, for each family
from the same start and on the same batches. The frozen decoder fixes log p(x), so that differences of the ELBO are due
to the posteriors alone. The learning rate of each family is chosen on validation images, from the same three. Pyro's
own conditional transforms take part with their defaults, behind the same encoder.

Every family and seed is a row of ``vae_posteriors.csv``; an interrupted program resumes where it stopped. The table
``vae_posteriors.md`` and the figure ``vae_posteriors.png`` are made from all rows.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as pyro_transforms
import torch
from row_files import append_row, read_rows
from tables import markdown_table
from torch import Tensor, nn
from tqdm import tqdm

import pyro_flowguides as fg
from pyro_flowguides.vae import (
    VAE,
    Bernoulli,
    ELBOLoss,
    Images,
    ImportanceWeightedLoss,
    Minibatches,
    NormalPosterior,
    StandardNormal,
    derive_seed,
    load_images,
)
from pyro_flowguides.vae.networks import DenseDecoder, DenseEncoder, GaussianEncoder

RESULTS = Path(__file__).parent / "results" / "vae_posteriors.csv"
LATENT_DIM = 10
HIDDEN = (300, 300)
BATCH_SIZE = 100
NUM_TEST_IMAGES, NUM_TEST_SAMPLES, NUM_VALID_SAMPLES = 500, 200, 20
LEARNING_RATES = (1e-3, 3e-3, 5e-3)
DIAGONAL = "diagonal Gaussian"


class PyroPosterior(nn.Module):
    """A posterior of Pyro's conditional transforms, called like a :class:`~pyro_flowguides.FlowPosterior`."""

    def __init__(self, build: Callable[..., Any], context_dim: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(build(LATENT_DIM, context_dim) for _ in range(depth))

    def forward(self, loc: Tensor, scale: Tensor, context: Tensor) -> Any:
        base = dist.Normal(loc, scale).to_event(1)
        return dist.ConditionalTransformedDistribution(base, list(self.layers)).condition(context)

    def rsample_and_log_prob(
        self, loc: Tensor, scale: Tensor, context: Tensor, sample_shape: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor]:
        posterior = self(loc, scale, context)
        z = posterior.rsample(torch.Size(sample_shape))
        return z, posterior.log_prob(z)


def our_flow(flow: str, depth: int = 4, *, path_gradient: bool = True, **options: Any) -> Callable[[int], nn.Module]:
    return lambda context_dim: fg.FlowPosterior(
        LATENT_DIM, context_dim, flow, depth=depth, path_gradient=path_gradient, **options
    )


def pyro_flow(build: Callable[..., Any], depth: int = 4) -> Callable[[int], nn.Module]:
    return lambda context_dim: PyroPosterior(build, context_dim, depth)


@dataclass(frozen=True)
class Family:
    """A kind of posterior, built for a width of the context.

    ``research_gain`` is the gain of a research implementation over the diagonal Gaussian, at learning rate 1e-3.
    """

    build: Callable[[int], nn.Module]
    research_gain: str = ""


FAMILIES: dict[str, Family] = {
    DIAGONAL: Family(lambda context_dim: NormalPosterior()),
    "planar x4": Family(our_flow("planar"), "0.8"),
    "planar x4, hypernetwork of 100, 100": Family(our_flow("planar", hidden_dims=(100, 100)), "0.8"),
    "Pyro conditional planar x4": Family(pyro_flow(pyro_transforms.conditional_planar), "1.1"),
    "planar x16": Family(our_flow("planar", 16), "1.6"),
    "radial x4": Family(our_flow("radial")),
    "Sylvester, Householder x4": Family(our_flow("sylvester", variant="householder"), "1.5"),
    "Sylvester, orthogonal x4": Family(our_flow("sylvester", variant="orthogonal"), "1.9"),
    "Sylvester, triangular x4": Family(our_flow("sylvester", variant="triangular"), "2.0"),
    "IAF, affine x4": Family(our_flow("iaf"), "2.1"),
    "IAF, gated x4": Family(our_flow("iaf", update="gated"), "2.1"),
    "Pyro conditional IAF x4": Family(pyro_flow(pyro_transforms.conditional_affine_autoregressive), "1.0 to 1.4"),
    "RealNVP x6": Family(our_flow("realnvp", 6)),
    "planar x4, total gradient": Family(our_flow("planar", path_gradient=False), "0.8"),
    "Sylvester, triangular x4, total gradient": Family(
        our_flow("sylvester", variant="triangular", path_gradient=False), "2.0"
    ),
    "IAF, affine x4, total gradient": Family(our_flow("iaf", path_gradient=False), "2.1"),
    "IAF, gated x4, total gradient": Family(our_flow("iaf", update="gated", path_gradient=False), "2.1"),
    "RealNVP x6, total gradient": Family(our_flow("realnvp", 6, path_gradient=False)),
}


# -- one run -----------------------------------------------------------------------------------------------------------


def set_seed(seed: int, *place: int | str) -> None:
    pyro.set_rng_seed(derive_seed(seed, *place) % 2**32)


def make_vae(posterior: Callable[[int], nn.Module], shape: tuple[int, ...], seed: int) -> VAE:
    """Return a VAE whose encoder and decoder have the same start for every posterior."""
    set_seed(seed, "networks")
    encoder = GaussianEncoder(DenseEncoder(shape, HIDDEN), LATENT_DIM)
    decoder = DenseDecoder(LATENT_DIM, shape, 1, HIDDEN)
    set_seed(seed, "posterior")
    return VAE(encoder, decoder, Bernoulli(), posterior(HIDDEN[-1]), StandardNormal(LATENT_DIM), data_shape=shape)


def optimize(
    vae: VAE, minibatches: Minibatches, epochs: int, learning_rate: float, loss_fn: nn.Module, num_samples: int
) -> None:
    parameters = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    for step in range(epochs * minibatches.steps_per_epoch):
        x = minibatches.shard(step, 0).float()
        set_seed(minibatches.seed, "noise", step)
        loss, _ = loss_fn(vae.terms(x, num_samples), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def negative_elbo(vae: VAE, pixels: Tensor, num_samples: int) -> float:
    """Return −ELBO, the mean over images, from the same draws of the base for every posterior."""
    set_seed(0, "evaluation")
    elbos = [vae.terms(x.float(), num_samples).elbo.mean(0) for x in pixels.split(50)]
    return -torch.cat(elbos).double().mean().item()


def train_decoder(minibatches: Minibatches, shape: tuple[int, ...], seed: int, epochs: int) -> dict[str, Tensor]:
    vae = make_vae(FAMILIES[DIAGONAL].build, shape, seed)
    optimize(vae, minibatches, epochs, 1e-3, ImportanceWeightedLoss(), num_samples=10)
    return vae.decoder.state_dict()


def run(
    family: str, decoder: dict[str, Tensor], minibatches: Minibatches, fixed: Images, epochs: int
) -> dict[str, Any]:
    """Train at every learning rate, and evaluate the one that is best on validation images."""
    valid, seconds, best = {}, 0.0, None
    for learning_rate in LEARNING_RATES:
        vae = make_vae(FAMILIES[family].build, fixed.shape, minibatches.seed)
        vae.decoder.load_state_dict(decoder)
        vae.decoder.requires_grad_(False)
        begin = time.perf_counter()
        optimize(vae, minibatches, epochs, learning_rate, ELBOLoss(), num_samples=1)
        seconds += time.perf_counter() - begin
        valid[learning_rate] = negative_elbo(vae, fixed.valid, NUM_VALID_SAMPLES)
        if valid[learning_rate] == min(valid.values()):
            best = learning_rate, vae
    assert best is not None, f"{family}: no bound was finite"
    return {
        "family": family,
        "seed": minibatches.seed,
        "learning_rate": best[0],
        "test": negative_elbo(best[1], fixed.test[:NUM_TEST_IMAGES], NUM_TEST_SAMPLES),
        "ms_per_step": 1000 * seconds / (len(LEARNING_RATES) * epochs * minibatches.steps_per_epoch),
        "parameters": sum(parameter.numel() for parameter in best[1].posterior.parameters()),
        **{f"valid_{rate:g}": value for rate, value in valid.items()},
        "date": datetime.date.today(),
        "machine": f"torch {torch.__version__}, {torch.get_num_threads()} thread of one {platform.machine()} CPU",
    }


# -- all runs ----------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, Any]]:
    """Read the rows, with numbers as numbers."""
    rows: list[dict[str, Any]] = [dict(row) for row in read_rows(path)]
    for row in rows:
        row |= {key: float(row[key]) for key in row.keys() - {"family", "date", "machine"}}
        row["seed"] = int(row["seed"])
    return rows


def run_missing(
    path: Path, images: Images, seeds: Iterable[int], families: Iterable[str], epochs: int, decoder_epochs: int
) -> None:
    done = {(row["family"], row["seed"]) for row in read(path)}
    fixed = images.binarized()
    for seed in seeds:
        missing = [family for family in families if (family, seed) not in done]
        if not missing:
            continue
        minibatches = Minibatches(images, batch_size=BATCH_SIZE, dynamic=True, seed=seed)
        decoder = train_decoder(minibatches, images.shape, seed, decoder_epochs)
        for family in tqdm(missing, desc=f"seed {seed}"):
            append_row(path, run(family, decoder, minibatches, fixed, epochs))


# -- results -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """The results of a family by seed, at the learning rate that is best on validation images.

    ``gain_at_smallest`` compares on validation images, with both posteriors at the smallest learning rate.
    """

    family: str
    test: list[float]
    gain: list[float]
    gain_at_smallest: list[float]
    learning_rates: list[float]
    parameters: int


def summarize(rows: list[dict[str, Any]]) -> list[Summary]:
    by_family: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["seed"]):
        by_family[row["family"]].append(row)
    diagonal = {row["seed"]: row for row in by_family[DIAGONAL]}
    smallest = f"valid_{min(LEARNING_RATES):g}"
    return [
        Summary(
            family,
            test=[row["test"] for row in by_family[family]],
            gain=[diagonal[row["seed"]]["test"] - row["test"] for row in by_family[family]],
            gain_at_smallest=[diagonal[row["seed"]][smallest] - row[smallest] for row in by_family[family]],
            learning_rates=[row["learning_rate"] for row in by_family[family]],
            parameters=int(by_family[family][0]["parameters"]),
        )
        for family in FAMILIES
        if by_family[family]
    ]


def make_table(summaries: list[Summary]) -> str:
    smallest = f"{min(LEARNING_RATES):g}"
    header = ["posterior", "test −ELBO", "gain over the diagonal Gaussian", "by seed"]
    header += [f"validation gain, both at {smallest}", "research figure", "learning rate", "parameters"]
    lines = [
        [
            summary.family,
            f"{statistics.mean(summary.test):.2f}",
            f"{statistics.mean(summary.gain):.2f}",
            ", ".join(f"{gain:.2f}" for gain in summary.gain),
            f"{statistics.mean(summary.gain_at_smallest):.2f}",
            FAMILIES[summary.family].research_gain,
            ", ".join(f"{rate:g}" for rate in summary.learning_rates),
            f"{summary.parameters:,}",
        ]
        for summary in summaries
    ]
    return markdown_table(header, lines)


def write_report(path: Path) -> str:
    """Write table and figure beside the CSV file, and return the text."""
    rows = read(path)
    summaries = summarize(rows)
    text = (
        f"`python benchmarks/vae_posteriors.py --data mnist10k.npz`, {rows[0]['date']}, {rows[0]['machine']}. "
        f"{NUM_TEST_IMAGES} test images, {NUM_TEST_SAMPLES} draws each; learning rates by seed.\n\n"
        f"{make_table(summaries)}\n"
    )
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    draw(path.with_suffix(".png"), summaries)
    return text


def draw(path: Path, summaries: list[Summary]) -> None:
    shown = [summary for summary in summaries if summary.family != DIAGONAL]
    figure, axes = plt.subplots(figsize=(8, 0.4 * len(shown) + 1), layout="constrained")
    for place, summary in enumerate(reversed(shown)):
        color = "C1" if summary.family.startswith("Pyro") else "C0"
        axes.barh(place, statistics.mean(summary.gain), color=color, alpha=0.6)
        axes.plot(summary.gain, [place] * len(summary.gain), "k.")
        reference = FAMILIES[summary.family].research_gain
        if reference and not summary.family.startswith("Pyro"):
            axes.plot(float(reference), place, "|", color="C3", markersize=14, markeredgewidth=2)
    axes.set_yticks(range(len(shown)), [summary.family for summary in reversed(shown)])
    axes.set_xlabel("gain over the diagonal Gaussian (nats)\ndots: seeds; red: research figure")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the images: an .npz file or a folder of IDX files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES), metavar="NAME")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of encoder and posterior")
    parser.add_argument("--decoder-epochs", type=int, default=15)
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file; its rows are kept")
    options = parser.parse_args(argv)
    with pyro.validation_enabled(False):
        images = load_images(options.data)
        families = [DIAGONAL, *(family for family in options.families if family != DIAGONAL)]
        run_missing(options.output, images, options.seeds, families, options.epochs, options.decoder_epochs)
    print(write_report(options.output))


if __name__ == "__main__":
    main()
