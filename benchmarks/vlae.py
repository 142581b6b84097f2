"""Autoregressive decoders and learned priors: likelihoods, the effect of the decoder's window, the cost of sampling.

    python benchmarks/vlae.py --data mnist10k.npz --faces freyfaces.npz

Studies:
    compare   five models with the same encoder and the same number of steps on statically binarized images: a VAE, one
              with an IAF posterior, one with an autoregressive prior, a PixelCNN without latent variables, and a VLAE.
              Negative log-likelihood of test images by importance sampling, and the gain over the VAE of the same seed
    window    a VLAE for several windows, with and without free bits: divergence, likelihood, the cost of decoding with
              the latent vector of another image, reconstructions and decompressions
    frey      the comparison on gray images with discretized logistic pixels, in bits per dimension too
    speed     images per second in training and in sampling for every decoder, and with a full pass per pixel

Each study writes ``vlae_STUDY.csv`` and the table ``vlae_STUDY.md`` to --output; window also a figure, and its files
carry the name of the decoder. Comparisons with other steps, step sizes or seeds are added to the file, all other rows
are replaced.

The defaults are a small configuration for a quarter of an hour on one core. The published one needs a GPU:

    python benchmarks/vlae.py --data mnist10k.npz --studies compare --steps 100000 --latent-dim 64 --network resnet \
        --reach 6 --depth 10 --filters 12 --prior-hidden 640 640 640 --learning-rate 0.002 --ema 0.998 --device cuda
"""

from __future__ import annotations

import argparse
import datetime
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
import vlae_report
from row_files import append_row, read_rows
from torch import Tensor, nn
from vlae_report import PLAIN, Row, WindowResult

from pyro_flowguides.vae import (
    EMA,
    MODELS,
    VAE,
    VLAE,
    AutoregressiveDistribution,
    ELBOLoss,
    Terms,
    load_images,
    make_decoder,
)
from pyro_flowguides.vae.decoders import AutoregressiveNetwork

STUDIES = ("compare", "window", "frey", "speed")
BATCH_SIZE, CLIP = 100, 10.0
#: Free nats per value of the data.
FREE_BITS = 0.01


class DecoderAlone(nn.Module):
    """An autoregressive model without latent variables, with the methods that this program calls on a VAE."""

    def __init__(self, network: AutoregressiveNetwork, pixels: nn.Module) -> None:
        super().__init__()
        self.network, self.pixels = network, pixels

    def _log_prob(self, x: Tensor) -> Tensor:
        return AutoregressiveDistribution(self.network, self.pixels, validate_args=False).log_prob(x)

    def initialize(self, x: Tensor) -> None:
        """Do nothing: no parameter is initialized from data."""

    def terms(self, x: Tensor, num_samples: int = 1) -> Terms:
        log_prob = self._log_prob(x)[None].expand(num_samples, -1)
        return Terms(log_prob, torch.zeros_like(log_prob)[..., None], log_prob.new_zeros(*log_prob.shape, 0))

    @torch.no_grad()
    def log_likelihood(self, x: Tensor, num_samples: int, chunk_size: int) -> Tensor:
        """Return the exact log likelihood."""
        return self._log_prob(x)


Model = VAE | DecoderAlone
Images = tuple[Tensor, Tensor]


def make_builders(
    options: argparse.Namespace, shape: tuple[int, ...], likelihood: str
) -> dict[str, Callable[[], Model]]:
    """Return the builders of the compared models, in the order of their complexity."""
    common = {"likelihood": likelihood, "latent_dim": options.latent_dim, "network": options.network}
    flow = {"depth": 4, "hidden_dims": options.prior_hidden}
    prior = {**flow, "update": "shift", "activation": nn.functional.relu}
    decoder = {"filters": options.filters, "reach": options.reach, "depth": options.depth}
    return {
        PLAIN: lambda: MODELS["vae"](shape, **common, posterior="normal"),
        "IAF-VAE": lambda: MODELS["vae"](shape, **common, posterior="iaf", posterior_options=flow),
        "AF-prior VAE": lambda: MODELS["vae"](shape, **common, posterior="normal", prior="maf", prior_options=prior),
        "PixelCNN alone": lambda: DecoderAlone(*make_decoder("pixelcnn", shape, likelihood, 0, 0, decoder)),
        "VLAE": lambda: MODELS["vlae"](shape, **common, prior_options=prior, decoder_options=decoder),
    }


# -- training and evaluation -------------------------------------------------------------------------------------------


class Trained(NamedTuple):
    """A model with averaged weights, processor milliseconds per step, and the divergence of every training batch."""

    model: Model
    ms_per_step: float
    divergences: list[float]


def train(
    model: Model, images: Tensor, options: argparse.Namespace, steps: int, free_bits: float, warmup: int = 0
) -> Trained:
    """Train a model; the weight of the divergence rises during the warm-up."""
    model = model.to(options.device)
    model.initialize(images[:BATCH_SIZE].to(options.device))
    optimizer = torch.optim.Adamax(model.parameters(), lr=options.learning_rate)
    ema, loss_fn, divergences = EMA(model, options.ema), ELBOLoss(warmup, free_bits), []
    begin = time.process_time()
    for step in range(steps):
        x = images[torch.randint(len(images), (BATCH_SIZE,))].to(options.device)
        loss, metrics = loss_fn(model.terms(x), step)
        divergences.append(metrics["kl"].detach())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        ema.update(model)
    ms_per_step = 1000 * (time.process_time() - begin) / steps
    ema.copy_to(model)
    return Trained(model.eval(), ms_per_step, torch.stack(divergences).tolist())


@torch.no_grad()
def evaluate(model: Model, test: Tensor, num_samples: int) -> dict[str, Tensor]:
    """Return for every image the log likelihood by importance sampling, the bound and the divergence."""
    parts = []
    for x in test.split(BATCH_SIZE):
        terms = model.terms(x, 5)
        log_likelihood = model.log_likelihood(x, num_samples, chunk_size=20)
        parts.append(torch.stack([log_likelihood, terms.elbo.mean(0), terms.kl.sum(-1).mean(0)]))
    names = ("log_likelihood", "elbo", "kl")
    return dict(zip(names, torch.cat(parts, 1).double().cpu(), strict=True))


def standard_error(values: Tensor) -> float:
    """Return the standard error of a mean over images."""
    return values.std().item() / len(values) ** 0.5


# -- comparisons -------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """The results of one model after one training run."""

    nll: Tensor
    negative_elbo: float
    kl: float
    ms_per_step: float
    parameters: int


def compare(images: Images, likelihood: str, options: argparse.Namespace, steps: int) -> Iterator[Row]:
    """Train and evaluate all models for every seed; yield a row per model with the means over seeds."""
    training, test = images
    shape, num_values = tuple(training.shape[1:]), training[0].numel()
    test = test[: options.test_images].to(options.device)
    plain: list[Run] = []
    for name, build in make_builders(options, shape, likelihood).items():
        runs = [run_once(build, training, test, options, steps, seed) for seed in options.seeds]
        plain = plain or runs
        nll = statistics.mean(run.nll.mean().item() for run in runs)
        gain, gain_error = gain_over(plain, runs)
        yield {
            "model": name,
            "steps": steps,
            "learning_rate": options.learning_rate,
            "seeds": " ".join(map(str, options.seeds)),
            "nll": f"{nll:.2f}",
            "nll_error": f"{standard_error(runs[0].nll):.2f}",
            "nll_by_seed": " ".join(f"{run.nll.mean():.2f}" for run in runs),
            "bits_per_dim": "" if likelihood == "bernoulli" else f"{nll / num_values / math.log(2):.3f}",
            "gain": "" if name == PLAIN else f"{gain:.2f}",
            "gain_error": "" if name == PLAIN else f"{gain_error:.2f}",
            "negative_elbo": f"{statistics.mean(run.negative_elbo for run in runs):.2f}",
            "kl": f"{statistics.mean(run.kl for run in runs):.2f}",
            "ms_per_step": f"{statistics.mean(run.ms_per_step for run in runs):.0f}",
            "parameters": runs[0].parameters,
        }


def run_once(
    build: Callable[[], Model], training: Tensor, test: Tensor, options: argparse.Namespace, steps: int, seed: int
) -> Run:
    pyro.set_rng_seed(seed)
    model, ms_per_step, _ = train(build(), training, options, steps, FREE_BITS * training[0].numel())
    result = evaluate(model, test, options.samples)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    negative_elbo, kl = -result["elbo"].mean().item(), result["kl"].mean().item()
    return Run(-result["log_likelihood"], negative_elbo, kl, ms_per_step, parameters)


def gain_over(plain: list[Run], runs: list[Run]) -> tuple[float, float]:
    """Return the mean gain and its deviation over seeds; for a single seed, its standard error over images."""
    differences = [a.nll - b.nll for a, b in zip(plain, runs, strict=True)]
    means = [difference.mean().item() for difference in differences]
    return statistics.mean(means), statistics.stdev(means) if len(means) > 1 else standard_error(differences[0])


# -- windows -----------------------------------------------------------------------------------------------------------


def study_windows(images: Images, options: argparse.Namespace, figure: Path) -> Iterator[Row]:
    """Train a VLAE for every window; yield a row for each, and draw divergences and images."""
    training, test = images
    test = test[: options.test_images].to(options.device)
    cases = [(reach, 0.0) for reach in options.reaches]
    cases += [(reach, FREE_BITS * training[0].numel()) for reach in options.free_reaches]
    steps, warmup = options.window_steps, options.window_warmup
    results = []
    for reach, free_bits in cases:
        pyro.set_rng_seed(options.seeds[0])
        vlae = make_vlae(options, reach, tuple(training.shape[1:]))
        model, ms_per_step, divergences = train(vlae, training, options, steps, free_bits, warmup)
        terms, pictures = evaluate(model, test, options.samples), show(model, test[:8])
        nll, exchange = -terms["log_likelihood"], exchange_cost(model, test)
        results.append(WindowResult(reach, free_bits, divergences, terms["kl"].mean().item(), pictures))
        yield {
            "reach": reach,
            "free_bits": f"{free_bits:.2f}",
            "steps": steps,
            "warmup": warmup,
            "nll": f"{nll.mean():.2f}",
            "nll_error": f"{standard_error(nll):.2f}",
            "kl": f"{results[-1].kl:.2f}",
            "nll_given_z": f"{-(terms['elbo'] + terms['kl']).mean():.2f}",
            "exchange": f"{exchange.mean():.2f}",
            "exchange_error": f"{standard_error(exchange):.2f}",
            "ms_per_step": f"{ms_per_step:.0f}",
        }
        vlae_report.draw_windows(figure, results)


def make_vlae(options: argparse.Namespace, reach: int, shape: tuple[int, ...]) -> VLAE:
    return MODELS["vlae"](
        shape,
        latent_dim=options.latent_dim,
        network=options.network,
        prior_options={"depth": 4, "hidden_dims": options.prior_hidden, "update": "shift"},
        decoder=options.window_decoder,
        decoder_options={"filters": options.window_filters, "reach": reach, "depth": options.depth},
    )


@torch.no_grad()
def exchange_cost(model: VLAE, x: Tensor) -> Tensor:
    """Return the nats by which each image is less likely given the latent vector of another; zero if z is not used."""
    z = model.sample_posterior(x)[0]
    return (model.conditional_log_prob(z, x) - model.conditional_log_prob(z.roll(1, 0), x)).double().cpu()


def show(model: VLAE, x: Tensor) -> Tensor:
    """Stack images, their reconstructions and three decompressions."""
    return torch.cat([x[None], model.reconstruct(x)[None], model.decompress(x, 3)]).cpu()


# -- speed -------------------------------------------------------------------------------------------------------------

SPEED_OPTIONS: dict[str, dict[str, Any]] = {
    "pixelcnn": {},
    "gated_pixelcnn": {"filters": 36, "reach": 6, "depth": 6},
    "pixelcnn++": {"filters": 24, "blocks": 2, "levels": 3},
    "row_lstm": {},
    "diagonal_lstm": {},
    "made": {"orderings": 1},
    "wavenet": {},
}


def study_speed(options: argparse.Namespace) -> Iterator[Row]:
    """Time training steps, sampling from caches, and one full pass times the number of pixels."""
    for name, decoder_options in SPEED_OPTIONS.items():
        training, sampling, full_passes = time_decoder(name, decoder_options, options.latent_dim, options.device)
        yield {
            "decoder": name,
            "training": f"{training:.0f}",
            "sampling": f"{sampling:.2f}",
            "full_passes": f"{full_passes:.3f}",
            "ratio": f"{sampling / full_passes:.0f}",
        }


def time_decoder(
    name: str, decoder_options: dict[str, Any], latent_dim: int, device: str, batch_size: int = 16
) -> tuple[float, float, float]:
    """Return images per second in training, in sampling, and in sampling by full passes."""
    pyro.set_rng_seed(0)
    shape = (1, 784) if name == "wavenet" else (1, 28, 28)
    network, pixels = make_decoder(name, shape, "bernoulli", latent_dim, 4, decoder_options)
    network = network.to(device)
    x = torch.rand(batch_size, *shape, device=device).round()
    features = torch.randn(batch_size, latent_dim, device=device) if network.features else None
    maps = torch.randn(batch_size, network.maps, *shape[1:], device=device) if network.maps else None

    @torch.no_grad()
    def full_pass() -> None:
        network(x, features, maps)

    training = median_seconds(lambda: network(x, features, maps).sum().backward())
    network.eval()
    sampling = median_seconds(lambda: network.generate(pixels.draw, batch_size, features, maps), repeats=1, warm_up=0)
    full_passes = median_seconds(full_pass) * len(list(network.steps()))
    return batch_size / training, batch_size / sampling, batch_size / full_passes


def median_seconds(job: Callable[[], object], repeats: int = 3, warm_up: int = 1) -> float:
    """Return the median processor time of a job, or its wall time on a GPU."""
    clock, times = (time.perf_counter if torch.cuda.is_available() else time.process_time), []
    for repeat in range(repeats + warm_up):
        begin = clock()
        job()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if repeat >= warm_up:
            times.append(clock() - begin)
    return statistics.median(times)


# -- the program -------------------------------------------------------------------------------------------------------


def load_binary(path: str) -> Images:
    images = load_images(path).binarized()
    return images.train.float(), images.test.float()


def load_gray(path: str, shape: tuple[int, ...]) -> Images:
    images = load_images(path, shape)
    return images.train.float(), images.test.float()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="binary or gray images, binarized once: an .npz file or a folder of IDX files")
    parser.add_argument("--faces", help="gray images of 28×20 for the study frey")
    parser.add_argument("--studies", nargs="+", default=list(STUDIES), choices=STUDIES)
    parser.add_argument("--steps", type=int, default=500, help="training steps on --data")
    parser.add_argument("--window-steps", type=int, default=300)
    parser.add_argument("--face-steps", type=int, default=1500)
    parser.add_argument("--network", default="mlp", help="encoder and decoder")
    parser.add_argument("--latent-dim", type=int, default=32)
    parser.add_argument("--reach", type=int, default=3)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--filters", type=int, default=8)
    parser.add_argument("--reaches", type=int, nargs="+", default=[1, 3, 8], help="windows without free bits")
    parser.add_argument("--free-reaches", type=int, nargs="*", default=[], help="windows with free bits")
    parser.add_argument("--window-warmup", type=int, default=150, help="steps until the divergence has its full weight")
    parser.add_argument("--window-decoder", default="pixelcnn", choices=["pixelcnn", "gated_pixelcnn"])
    parser.add_argument("--window-filters", type=int, default=12)
    parser.add_argument("--prior-hidden", type=int, nargs="+", default=[128, 128])
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--ema", type=float, default=0.99)
    parser.add_argument("--test-images", type=int, default=300)
    parser.add_argument("--samples", type=int, default=100, help="draws per image of importance sampling")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of compare and frey; window uses the first")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(argv)
    if options.data is None and {"compare", "window"} & set(options.studies):
        parser.error("--data is needed for compare and window")
    if options.faces is None and "frey" in options.studies:
        parser.error("--faces is needed for frey")
    return options


def run(study: str, options: argparse.Namespace, figure: Path) -> Iterator[Row]:
    """Run a study and yield its rows."""
    if study == "compare":
        return compare(load_binary(options.data), "bernoulli", options, options.steps)
    if study == "window":
        return study_windows(load_binary(options.data), options, figure)
    if study == "frey":
        return compare(load_gray(options.faces, (28, 20)), "logistic", options, options.face_steps)
    return study_speed(options)


def write_rows(path: Path, study: str, rows: list[Row]) -> None:
    """Write the rows to a CSV file, in which comparisons with other settings stay."""
    kept = read_rows(path) if study in vlae_report.COMPARISONS else []
    kept = [row for row in kept if any(row[key] != str(rows[0][key]) for key in vlae_report.SETTINGS[study])]
    path.unlink(missing_ok=True)
    for row in [*rows, *kept]:
        append_row(path, row)


def main(argv: Sequence[str] = tuple(sys.argv[1:])) -> None:
    options = parse(argv)
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU"
    arguments = " ".join(Path(word).name if "/" in word else word for word in argv)
    for study in options.studies:
        name = f"window_{options.window_decoder}" if study == "window" else study
        path = options.output / f"vlae_{name}.csv"
        about = {
            "command": f"python benchmarks/vlae.py {arguments}",
            "date": str(datetime.date.today()),
            "machine": f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {device}",
        }
        options.output.mkdir(parents=True, exist_ok=True)
        with pyro.validation_enabled(False):
            rows = [{**row, **about} for row in run(study, options, path.with_suffix(".png"))]
        write_rows(path, study, rows)
        print(vlae_report.write(study, path), flush=True)


if __name__ == "__main__":
    main()
