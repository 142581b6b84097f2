"""Autoregressive decoders and learned priors: what each of them buys, what the window does, what sampling costs.

    python benchmarks/vlae.py --data mnist10k.npz --faces freyfaces.npz

Four studies, each of them written to --output under its name and the date, a table and for some a figure:

compare   a VAE, one with an IAF posterior, one with an autoregressive prior, a PixelCNN alone and a VLAE, with the same
          encoder and the same number of steps, on statically binarized images: negative log-likelihood of test images
          by importance sampling, its standard error over images, and the difference from the plain VAE of the same seed
window    a VLAE for several windows, without free bits and with them: divergence, likelihood, what the latent vector of
          another image costs, reconstructions and decompressions
frey      bits per dimension of grey images with discretized logistic pixels
speed     images per second of training and of sampling, for every decoder, and against a full pass per pixel

The defaults are a small configuration for a quarter of an hour on one core. That of the paper, for a GPU:

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pyro
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from pyro_flowguides.vae import EMA, MODELS, VAE, VLAE, Autoregressive, ELBOLoss, Terms
from pyro_flowguides.vae.decoders import AutoregressiveNetwork
from pyro_flowguides.vae.models.vlae import make_decoder
from pyro_flowguides.vae.training.data import load_images

STUDIES = ("compare", "window", "frey", "speed")
BATCH_SIZE, CLIP = 100, 10.0
#: Nats per value of the data that cost nothing.
FREE_BITS = 0.01
PLAIN = "VAE"


class Alone(nn.Module):
    """An autoregressive model without latent variables, with what the programs here ask of a VAE."""

    def __init__(self, network: AutoregressiveNetwork, pixels: nn.Module) -> None:
        super().__init__()
        self.network, self.pixels = network, pixels

    def _log_prob(self, x: Tensor) -> Tensor:
        return Autoregressive(self.network, self.pixels, validate_args=False).log_prob(x)

    def initialize(self, x: Tensor) -> None:
        """Nothing starts from data."""

    def terms(self, x: Tensor, num_samples: int = 1) -> Terms:
        log_prob = self._log_prob(x)[None].expand(num_samples, -1)
        return Terms(log_prob, torch.zeros_like(log_prob)[..., None], log_prob.new_zeros(*log_prob.shape, 0))

    @torch.no_grad()
    def log_likelihood(self, x: Tensor, num_samples: int, chunk_size: int) -> Tensor:
        """Exact."""
        return self._log_prob(x)


Model = VAE | Alone


def window(options: argparse.Namespace, reach: int) -> dict[str, Any]:
    return {"filters": options.filters, "reach": reach, "depth": options.depth}


def builders(options: argparse.Namespace, shape: tuple[int, ...], likelihood: str) -> dict[str, Callable[[], Model]]:
    """The models of the comparison, smallest change after smallest change."""
    common = {"likelihood": likelihood, "latent_dim": options.latent_dim, "network": options.network}
    steps = {"depth": 4, "hidden_dims": options.prior_hidden}
    prior = {**steps, "update": "shift", "activation": nn.functional.relu}
    decoder_options = window(options, options.reach)

    def alone() -> Alone:
        return Alone(*make_decoder("pixelcnn", shape, likelihood, 0, 0, decoder_options))

    return {
        PLAIN: lambda: MODELS["vae"](shape, **common, posterior="normal"),
        "IAF-VAE": lambda: MODELS["vae"](shape, **common, posterior="iaf", posterior_options=steps),
        "AF-prior VAE": lambda: MODELS["vae"](shape, **common, posterior="normal", prior="maf", prior_options=prior),
        "PixelCNN alone": alone,
        "VLAE": lambda: MODELS["vlae"](shape, **common, prior_options=prior, decoder_options=decoder_options),
    }


# -- training and evaluation -------------------------------------------------------------------------------------------


class Fit(NamedTuple):
    #: With averaged weights.
    model: Model
    #: Milliseconds of processor time per step.
    used: float
    #: The divergence of every training batch.
    kl: list[float]


def fit(model: Model, train: Tensor, options: argparse.Namespace, steps: int, free_bits: float, warmup: int = 0) -> Fit:
    """Train, the weight of the divergence rising over the steps of the warm-up."""
    model = model.to(options.device)
    model.initialize(train[:BATCH_SIZE].to(options.device))
    optimizer = torch.optim.Adamax(model.parameters(), lr=options.learning_rate)
    ema, objective, kl = EMA(model, options.ema), ELBOLoss(warmup, free_bits), []
    begin = time.process_time()
    for step in range(steps):
        x = train[torch.randint(len(train), (BATCH_SIZE,))].to(options.device)
        loss, metrics = objective(model.terms(x), step)
        kl.append(metrics["kl"].detach())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        ema.update(model)
    used = 1000 * (time.process_time() - begin) / steps
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(ema.averages[name])
    return Fit(model.eval(), used, torch.stack(kl).tolist())


@torch.no_grad()
def evaluate(model: Model, test: Tensor, samples: int) -> dict[str, Tensor]:
    """By image: log likelihood by importance sampling, bound and divergence."""
    parts = []
    for x in test.split(BATCH_SIZE):
        terms = model.terms(x, 5)
        weighted = model.log_likelihood(x, samples, chunk_size=20)
        parts.append(torch.stack([weighted, terms.elbo.mean(0), terms.kl.sum(-1).mean(0)]))
    names = ("log_likelihood", "elbo", "kl")
    return dict(zip(names, torch.cat(parts, 1).double().cpu(), strict=True))


def mean_and_error(values: Tensor) -> str:
    return f"{values.mean():.2f} ± {error(values):.2f}"


def error(values: Tensor) -> float:
    """The standard error of a mean over images."""
    return values.std().item() / len(values) ** 0.5


class Compared(NamedTuple):
    """One model of the comparison after one training run."""

    nll: Tensor
    elbo: float
    kl: float
    used: float
    size: int


def compare(images: tuple[Tensor, Tensor], likelihood: str, options: argparse.Namespace, steps: int) -> Iterator[str]:
    """A table of all models, means over seeds; in bits per dimension too where pixels are grey."""
    train, test = images
    shape, values = tuple(train.shape[1:]), train[0].numel()
    test = test[: options.test_images].to(options.device)
    bits = "" if likelihood == "bernoulli" else " bits/dim |"
    yield f"| model | −log p(x) | by seed |{bits} less than the VAE | −ELBO | KL | CPU ms per step | parameters |"
    yield "|---|---|---|" + ("---|" if bits else "") + "---|---|---|---|---|"
    plain: list[Compared] = []
    for name, build in builders(options, shape, likelihood).items():
        runs = [run_once(build, train, test, options, steps, seed) for seed in options.seeds]
        plain = runs if name == PLAIN else plain
        nll = statistics.mean(run.nll.mean().item() for run in runs)
        cells = [f"{nll:.2f} ± {error(runs[0].nll):.2f}", ", ".join(f"{run.nll.mean():.2f}" for run in runs)]
        cells += [f"{nll / values / math.log(2):.3f}"] if bits else []
        cells += ["" if name == PLAIN else gain([a.nll - b.nll for a, b in zip(plain, runs, strict=True)])]
        cells += [f"{statistics.mean(getattr(run, key) for run in runs):.2f}" for key in ("elbo", "kl")]
        cells += [f"{statistics.mean(run.used for run in runs):.0f}", f"{runs[0].size:,}"]
        yield f"| {name} | {' | '.join(cells)} |"


def run_once(
    build: Callable[[], Model], train: Tensor, test: Tensor, options: argparse.Namespace, steps: int, seed: int
) -> Compared:
    pyro.set_rng_seed(seed)
    model, used, _ = fit(build(), train, options, steps, FREE_BITS * train[0].numel())
    result = evaluate(model, test, options.samples)
    size = sum(parameter.numel() for parameter in model.parameters())
    return Compared(-result["log_likelihood"], -result["elbo"].mean().item(), result["kl"].mean().item(), used, size)


def gain(differences: list[Tensor]) -> str:
    """Mean and deviation over seeds of a mean over images; for one seed with its error over images."""
    if len(differences) == 1:
        return mean_and_error(differences[0])
    means = [each.mean().item() for each in differences]
    return f"{statistics.mean(means):.2f} ± {statistics.stdev(means):.2f}"


class Windowed(NamedTuple):
    """What one window gave, for the figure."""

    reach: int
    free_bits: float
    history: list[float]
    kl: float
    #: Data, a reconstruction and decompressions, ``(rows, images, channels, height, width)``.
    pictures: Tensor

    @property
    def name(self) -> str:
        return f"reach {self.reach}" + (", free bits" if self.free_bits else "")


def window_study(images: tuple[Tensor, Tensor], options: argparse.Namespace, path: Path) -> Iterator[str]:
    """A table by reach, and a figure of divergences, data, reconstructions and decompressions."""
    train, test = images
    test = test[: options.test_images].to(options.device)
    yield "| reach | free bits | −log p(x) | KL | −log p(x given z) | more with the z of another | CPU ms per step |"
    yield "|---|---|---|---|---|---|---|"
    cases = [(reach, 0.0) for reach in options.reaches]
    cases += [(reach, FREE_BITS * train[0].numel()) for reach in options.free_reaches]
    found = []
    for reach, free_bits in cases:
        pyro.set_rng_seed(options.seeds[0])
        steps, warmup = options.window_steps, options.window_warmup
        model, used, history = fit(windowed(options, reach, train), train, options, steps, free_bits, warmup)
        result, pictures = evaluate(model, test, options.samples), show(model, test[:8])
        found.append(Windowed(reach, free_bits, history, result["kl"].mean().item(), pictures))
        yield (
            f"| {reach} | {free_bits:.2f} | {mean_and_error(-result['log_likelihood'])} | {found[-1].kl:.2f} "
            f"| {-(result['elbo'] + result['kl']).mean():.2f} | {mean_and_error(loss_by_exchange(model, test))} "
            f"| {used:.0f} |"
        )
        draw_windows(path, found)


def windowed(options: argparse.Namespace, reach: int, train: Tensor) -> VLAE:
    return MODELS["vlae"](
        tuple(train.shape[1:]),
        latent_dim=options.latent_dim,
        network=options.network,
        prior_options={"depth": 4, "hidden_dims": options.prior_hidden, "update": "shift"},
        decoder=options.window_decoder,
        decoder_options={"filters": options.window_filters, "reach": reach, "depth": options.depth},
    )


@torch.no_grad()
def loss_by_exchange(model: VLAE, x: Tensor) -> Tensor:
    """By image: how much less likely it is given the latent vector of another one; zero if z is not used."""
    z = model.sample_posterior(x)[0]
    return (model.conditional_log_prob(z, x) - model.conditional_log_prob(z.roll(1, 0), x)).double().cpu()


def show(model: VLAE, x: Tensor) -> Tensor:
    return torch.cat([x[None], model.reconstruct(x)[None], model.decompress(x, 3)]).cpu()


def draw_windows(path: Path, found: list[Windowed]) -> None:
    figure, axes = plt.subplots(1, len(found) + 2, figsize=(3.1 * (len(found) + 2), 3), layout="constrained")
    plot_divergence(axes[0], axes[1], found)
    names = ["data", "mean", "one z:", "again", "again"]
    for each, ax in zip(found, axes[2:], strict=True):
        rows, height = each.pictures[:, :, 0].numpy(), each.pictures.shape[-2]
        ax.imshow(np.concatenate([np.concatenate(row, 1) for row in rows]), cmap="gray_r", vmin=0, vmax=1)
        ax.set_yticks([height * (row + 0.5) for row in range(len(names))], names)
        ax.set_xticks([])
        ax.set_title(f"{each.name}: KL {each.kl:.1f}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_divergence(final: Axes, training: Axes, found: list[Windowed]) -> None:
    free, paid = [each for each in found if each.free_bits], [each for each in found if not each.free_bits]
    final.plot([each.reach for each in paid], [each.kl for each in paid], "o-", label="no free bits")
    if free:
        final.plot([each.reach for each in free], [each.kl for each in free], "s", label="free bits")
    final.set_xlabel("reach of the window (pixels)")
    final.set_ylabel("KL(q‖p) of test images (nats)")
    final.set_ylim(top=1.2 * max(each.kl for each in found))
    for each in found:
        training.plot(each.history, label=each.name, linewidth=1, linestyle="--" if each.free_bits else "-")
    training.set_xlabel("training step")
    training.set_ylabel("KL(q‖p) of the batch (nats)")
    training.set_ylim(top=1.1 * max(max(each.history[len(each.history) // 4 :]) for each in found))
    for ax in (final, training):
        ax.set_ylim(bottom=0)
        ax.legend(fontsize="small")


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


def speed(options: argparse.Namespace) -> Iterator[str]:
    """Processor time of a training step, of sampling from caches, and of one full pass times the number of pixels."""
    yield "| decoder | training, images/s | sampling, images/s | one full pass per pixel, images/s | ratio |"
    yield "|---|---|---|---|---|"
    for name, given in SPEED_OPTIONS.items():
        training, sampling, full = speed_of(name, given, options.latent_dim, options.device)
        yield f"| {name} | {training:.0f} | {sampling:.2f} | {full:.3f} | {sampling / full:.0f} |"


def speed_of(name: str, given: dict[str, Any], latent_dim: int, device: str, size: int = 16) -> tuple[float, ...]:
    """Images per second of training, of sampling, and of sampling by full passes."""
    pyro.set_rng_seed(0)
    shape = (1, 784) if name == "wavenet" else (1, 28, 28)
    network, pixels = make_decoder(name, shape, "bernoulli", latent_dim, 4, given)
    network = network.to(device)
    x = torch.rand(size, *shape, device=device).round()
    features = torch.randn(size, latent_dim, device=device) if network.features else None
    maps = torch.randn(size, network.maps, *shape[1:], device=device) if network.maps else None

    @torch.no_grad()
    def full_pass() -> None:
        network(x, features, maps)

    training = seconds(lambda: network(x, features, maps).sum().backward())
    network.eval()
    sampling = seconds(lambda: network.generate(pixels.draw, size, features, maps), repeats=1, warm_up=0)
    full = seconds(full_pass) * len(list(network.steps()))
    return size / training, size / sampling, size / full


def seconds(job: Callable[[], Any], repeats: int = 3, warm_up: int = 1) -> float:
    """Median processor time; on a GPU, time on the clock."""
    clock, times = (time.perf_counter if torch.cuda.is_available() else time.process_time), []
    for repeat in range(repeats + warm_up):
        begin = clock()
        job()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times += [clock() - begin] if repeat >= warm_up else []
    return statistics.median(times)


# -- the program -------------------------------------------------------------------------------------------------------


def binary(path: str) -> tuple[Tensor, Tensor]:
    images = load_images(path).binarized()
    return images.train.float(), images.test.float()


def grey(path: str, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    images = load_images(path, shape)
    return images.train.float(), images.test.float()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="binary or grey images, binarized once: an .npz file or a folder of IDX files")
    parser.add_argument("--faces", help="grey images of 28×20 for the study frey")
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
    parser.add_argument("--window-warmup", type=int, default=150, help="steps until the divergence has its weight")
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
    options = parser.parse_args()
    if options.data is None and {"compare", "window"} & set(options.studies):
        parser.error("--data is needed for compare and window")
    if options.faces is None and "frey" in options.studies:
        parser.error("--faces is needed for frey")
    return options


def lines(study: str, options: argparse.Namespace, figure: Path) -> Iterator[str]:
    """The lines of the table of one study."""
    if study == "compare":
        return compare(binary(options.data), "bernoulli", options, options.steps)
    if study == "window":
        return window_study(binary(options.data), options, figure)
    if study == "frey":
        return compare(grey(options.faces, (28, 20)), "logistic", options, options.face_steps)
    return speed(options)


def main() -> None:
    options = parse()
    options.output.mkdir(parents=True, exist_ok=True)
    today = f"{datetime.date.today():%Y-%m-%d}"
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU"
    with pyro.validation_enabled(False):
        for study in options.studies:
            name = f"window_{options.window_decoder}" if study == "window" else study
            begin, path = time.process_time(), options.output / f"vlae_{name}_{today}.md"
            rows = []
            for row in lines(study, options, path.with_suffix(".png")):
                print(row, flush=True)
                rows.append(row)
            arguments = " ".join(Path(word).name if "/" in word else word for word in sys.argv[1:])
            note = (
                f"`python benchmarks/vlae.py {arguments}`, {today}, torch {torch.__version__}, "
                f"{torch.get_num_threads()} thread(s), {where}; {time.process_time() - begin:.0f} s of processor time."
            )
            path.write_text("\n".join([note, "", *rows]) + "\n")


if __name__ == "__main__":
    main()
