"""Training a VAE: one loop for one process or many, exactly resumable, on Lightning Fabric.

Everything random in a run is a fixed function of its seed, the step and the shard of the batch. So a checkpoint needs
no generator state, a run that was killed continues to the same bits, and two processes that take one shard each do what
one process does that takes both.
"""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pyro
import torch
from torch import Tensor, nn
from tqdm import tqdm

from pyro_flowguides.inference import checkpoint as checkpoints
from pyro_flowguides.inference.replay import in_short
from pyro_flowguides.vae.models.base import VAE, Terms
from pyro_flowguides.vae.models.recipes import MODELS
from pyro_flowguides.vae.training import report
from pyro_flowguides.vae.training.data import Feed, Images, derive_seed, load_images
from pyro_flowguides.vae.training.ema import EMA
from pyro_flowguides.vae.training.losses import ELBOLoss, SoftFreeBitsLoss
from pyro_flowguides.vae.training.settings import Settings

__all__ = ["TrainingDivergedError", "load_model", "train"]

#: Consecutive steps without a finite gradient after which training is given up.
HOPELESS = 50
#: Most steps over which the step size rises to its full size, within the first epoch: the first steps of Adam are as
#: long as all others, and move hundreds of weights behind one number of a flow together.
RISE = 100
#: Images that are evaluated at a time.
EVALUATION_BATCH = 200
#: Steps between updates of the progress bar; each waits for the device.
PROGRESS_EVERY = 20
OPTIMIZERS = {"adam": torch.optim.Adam, "adamax": torch.optim.Adamax}
OBJECTIVES: dict[str, type[ELBOLoss | SoftFreeBitsLoss]] = {"hard": ELBOLoss, "soft": SoftFreeBitsLoss}


class TrainingDivergedError(RuntimeError):
    """The gradient was not finite for so long that going on is hopeless."""


def train(settings: Settings) -> dict[str, Any]:
    """Train as the settings say, write everything to ``settings.output``, and return the summary.

    With several processes every process returns the same summary; the first one writes.

    Raises:
        ImportError: if Lightning Fabric is missing.
        TrainingDivergedError: if the gradient stays without a finite value.
        OSError: if something cannot be written (a full disk); the last checkpoint is intact.
        ValueError: for data or settings that do not fit, or a folder that holds another run.
    """
    fabric = _fabric(settings)
    fabric.launch()
    images = load_images(settings.data, settings.shape)
    with pyro.validation_enabled(False):  # a value that is not finite is met with a skipped step
        run = _Run(settings, fabric, images)
        run.resume()
        run.fit()
        return run.finish()


def build(settings: Settings, data_shape: tuple[int, ...]) -> VAE:
    """The model that the settings describe."""
    options = dict(settings.model_options)
    if settings.posterior_options:
        options["posterior_options"] = settings.posterior_options
    if settings.prior_options:
        options["prior_options"] = settings.prior_options
    vae: VAE = MODELS[settings.model](
        data_shape,
        likelihood=settings.likelihood,
        latent_dim=settings.latent_dim,
        posterior=settings.posterior,
        prior=settings.prior,
        network=settings.network,
        **options,
    )
    return vae


def load_model(path: str | Path) -> tuple[VAE, Settings]:
    """The best model of a run, from its ``best.pt``, and the settings it was trained with.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no model of a run.
    """
    state = checkpoints.load(path)
    if state is None:
        raise FileNotFoundError(f"{path}: no such file")
    if state.get("kind") != "vae model":
        raise ValueError(f"{path} is not the best.pt of a training run")
    settings = Settings(**{**state["settings"], "shape": tuple(state["settings"]["shape"])})
    vae = build(settings, tuple(state["data_shape"]))
    vae.to(next(value.dtype for value in state["model"].values() if value.is_floating_point()))
    vae.load_state_dict(state["model"])
    return vae.eval(), settings


def _fabric(settings: Settings) -> Any:
    try:
        from lightning_fabric import Fabric
    except ImportError as error:
        raise ImportError("training needs Lightning Fabric: pip install 'pyro-flowguides[vae]'") from error
    return Fabric(
        accelerator=settings.accelerator,
        devices=int(settings.devices) if settings.devices.isdigit() else settings.devices,
        num_nodes=settings.nodes,
        strategy=settings.strategy,
        precision=cast("Any", settings.precision),
    )


class _Bound(nn.Module):
    """From the pixels of some shards to the terms of the bound, each shard with random numbers of its own.

    Pixels arrive as bytes, which mixed precision leaves alone, and become numbers in the model's range here.
    """

    def __init__(self, vae: VAE, levels: int, compiled: bool = False) -> None:
        super().__init__()
        self.vae = vae
        self.unit = vae.likelihood.high / (levels - 1)
        self.compiled: Callable[..., Terms] | None = torch.compile(vae.terms) if compiled else None

    def terms(self, x: Tensor, samples: int) -> Terms:
        """Compiled if that was asked for, and not any more once it has failed, of which a warning tells."""
        if self.compiled is not None:
            try:
                return self.compiled(x, samples)
            except Exception as error:  # whatever a compiler may raise; what the model raises is raised again below
                self.compiled = None
                warnings.warn(f"train: goes on without compiling: {in_short(error)}", stacklevel=2)
        return self.vae.terms(x, samples)

    def data(self, pixels: Tensor) -> Tensor:
        """Pixels in the units of the likelihood: in [0, 1], or whole numbers up to 255."""
        x = pixels.to(next(self.vae.parameters()).dtype) * self.unit
        return x if self.vae.likelihood.high == 1 else x.round()

    def forward(self, shards: list[Tensor], seeds: list[int], samples: int) -> Terms:
        parts = []
        for pixels, seed in zip(shards, seeds, strict=True):
            torch.manual_seed(seed)
            parts.append(self.terms(self.data(pixels), samples))
        return Terms(*(torch.cat(part, 1) for part in zip(*parts, strict=True)))


class _Run:
    """The state of one training run and the loop that advances it."""

    def __init__(self, settings: Settings, fabric: Any, images: Images) -> None:
        self.settings, self.fabric, self.images = settings, fabric, images
        self.folder = Path(settings.output)
        self.begin = time.perf_counter()
        shards = settings.shards or fabric.world_size
        if shards % fabric.world_size:
            raise ValueError(f"--shards must be a multiple of the {fabric.world_size} processes, got {shards}")
        self.mine = range(fabric.global_rank, shards, fabric.world_size)
        fixed = images.binarized() if settings.binarization != "none" else images
        self.levels = fixed.levels
        self.held_out = {"valid": fixed.valid, "test": fixed.test}
        self.feed = Feed(
            images if settings.binarization == "dynamic" else fixed,
            batch_size=settings.batch_size,
            shards=shards,
            dynamic=settings.binarization == "dynamic",
            seed=settings.seed,
            device=fabric.device,
        )
        self._build()
        # The state of the run, besides the parameters.
        self.step = self.skipped = self.barren = self._saved = 0
        self.history: list[dict[str, float]] = []
        self.best: dict[str, float] = {"epoch": 0, "elbo": -math.inf}

    def _build(self) -> None:
        settings, fabric = self.settings, self.fabric
        torch.manual_seed(self._seed("start"))
        with fabric.init_module():
            self.vae = build(settings, self.images.shape)
        self.vae.to(fabric.device)
        self.bound = _Bound(self.vae, self.levels, settings.compile)
        first = torch.cat([self.feed.shard(0, number) for number in range(self.feed.shards)])
        self.vae.initialize(self.bound.data(first))
        self.optimizer = OPTIMIZERS[settings.optimizer](self.vae.parameters(), lr=settings.learning_rate)
        self.module, self.steps = fabric.setup(self.bound, self.optimizer)
        self.objective = OBJECTIVES[settings.free_bits_kind](
            settings.warmup * self.feed.steps_per_epoch, settings.free_bits
        ).to(fabric.device)
        self.ema = EMA(self.vae, settings.ema)

    @property
    def epoch(self) -> int:
        """Complete epochs."""
        return self.step // self.feed.steps_per_epoch

    @property
    def done(self) -> str:
        """Why training is over; empty as long as it is not."""
        if self.epoch >= self.settings.epochs:
            return f"{self.epoch} epochs are complete"
        waited = self.epoch - max(int(self.best["epoch"]), self.settings.warmup)
        if 0 < self.settings.patience <= waited:
            return f"the validation ELBO did not improve for {waited} epochs"
        return ""

    def _seed(self, *place: int | str) -> int:
        """The seed of a place in the run."""
        return derive_seed(self.settings.seed, *place)

    # -- the loop --------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train to the end, one epoch at a time, with a checkpoint after each."""
        logs = report.Logs(self.folder, self.history, tensorboard=self.settings.tensorboard) if self._writes else None
        total = self.settings.epochs * self.feed.steps_per_epoch
        quiet = not self.settings.progress or not self._writes
        with tqdm(total=total, initial=self.step, disable=quiet, unit="step") as bar:
            while not self.done:
                row = self._epoch(bar)
                self.history.append(row)
                if row["valid_elbo"] > self.best["elbo"]:
                    self.best = {"epoch": row["epoch"], "elbo": row["valid_elbo"]}
                    self._save_best()
                self._save()
                if logs is not None:
                    with self._writing("the logs"):
                        logs.add(row)
        if logs is not None:
            logs.close()

    def _epoch(self, bar: Any) -> dict[str, float]:
        begin = time.perf_counter()
        sums = torch.zeros(3, dtype=torch.float64, device=_wide(self.fabric.device))
        self.module.train()
        for number in range(1, self.feed.steps_per_epoch + 1):
            sums += self._advance().to(sums)
            bar.update()
            if number % PROGRESS_EVERY == 0:
                bar.set_postfix_str(_line(self._figures(sums / number)), refresh=False)
        loss, reconstruction, kl = self.fabric.all_reduce(sums / self.feed.steps_per_epoch, reduce_op="mean").tolist()
        seconds = time.perf_counter() - begin
        row = {"epoch": float(self.epoch), "step": float(self.step), "loss": loss}
        row |= {f"train_{key}": value for key, value in self._figures((loss, reconstruction, kl)).items()}
        row |= {f"valid_{key}": value for key, value in self.evaluate("valid").items()}
        row |= {"skipped": float(self.skipped), "images_per_second": self._images_per_epoch / seconds}
        bar.set_description_str(f"valid ELBO {row['valid_elbo']:.2f}", refresh=False)
        return row

    @property
    def _images_per_epoch(self) -> int:
        return self.feed.steps_per_epoch * self.feed.batch_size

    def _advance(self) -> Tensor:
        """One step; the loss, reconstruction and KL of this process's shards."""
        shards = [self.feed.shard(self.step, number) for number in self.mine]
        seeds = [self._seed("noise", self.step, number) for number in self.mine]
        terms = self.module(shards, seeds, self.settings.samples)
        loss, metrics = self.objective(terms, self.step)
        self.steps.zero_grad()
        self.fabric.backward(loss)
        self._follow()
        self.step += 1
        return torch.stack([metrics["loss"], metrics["reconstruction"], metrics["kl"]])

    def _follow(self) -> None:
        """Clip the gradient and take the step, unless the gradient is not finite."""
        rise = min(RISE, self.feed.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * min(1.0, (self.step + 1) / rise)
        norm = self.fabric.clip_gradients(
            self.module, self.steps, max_norm=self.settings.clip or math.inf, error_if_nonfinite=False
        )
        if torch.isfinite(norm):
            self.barren = 0
            self.steps.step()
            self.ema.update(self.vae)
            return
        self.skipped += 1
        self.barren += 1
        if self.barren >= HOPELESS:
            raise TrainingDivergedError(
                f"the gradient was not finite for {HOPELESS} steps in a row, up to step {self.step}: lower "
                "--learning-rate, or use --precision 32-true"
            )
        if self.fabric.strategy.precision.state_dict():  # float16: its loss scale falls
            self.steps.step()

    # -- evaluation ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, split: str, samples: int = 1) -> dict[str, float]:
        """The bound over a split, in nats per image, at the averaged weights and without mixed precision.

        The processes share the chunks out.
        """
        sums = torch.zeros(2, dtype=torch.float64, device=_wide(self.fabric.device))
        pixels = self.held_out[split]
        self.vae.eval()
        with self.ema.applied(self.vae):
            for number, chunk in enumerate(pixels.split(EVALUATION_BATCH)):
                if number % self.fabric.world_size == self.fabric.global_rank:
                    terms = self.bound([chunk.to(self.fabric.device)], [self._seed(split, number)], samples)
                    parts = [terms.log_likelihood.mean(0).sum(), terms.kl.sum(-1).mean(0).sum()]
                    sums += torch.stack(parts).to(sums)
        reconstruction, kl = (self.fabric.all_reduce(sums, reduce_op="sum") / len(pixels)).tolist()
        return self._figures((0.0, reconstruction, kl))

    def _figures(self, values: Any) -> dict[str, float]:
        """Reconstruction, KL, ELBO and bits per dimension from (loss, reconstruction, KL)."""
        _, reconstruction, kl = (float(value) for value in values)
        elbo = reconstruction - kl
        bits = -elbo / (math.prod(self.images.shape) * math.log(2))
        return {"elbo": elbo, "reconstruction": reconstruction, "kl": kl, "bits_per_dim": bits}

    # -- the end ---------------------------------------------------------------------------------------------------

    def finish(self) -> dict[str, Any]:
        """Evaluate the best model on the test images and write summary and pictures."""
        reason = self.done
        state = checkpoints.load(self.folder / "best.pt")
        if state is not None:
            self.vae.load_state_dict(state["model"])
            self.ema = EMA(self.vae, 0.0)
        seconds = time.perf_counter() - self.begin
        summary = {
            "settings": dataclasses.asdict(self.settings),
            "data": {"name": self.images.name, "shape": self.images.shape, "fingerprint": self.images.fingerprint},
            "reason": reason,
            "epochs": self.epoch,
            "steps": self.step,
            "skipped_steps": self.skipped,
            "best_epoch": int(self.best["epoch"]),
            "parameters": sum(parameter.numel() for parameter in self.vae.parameters()),
            "valid": self.evaluate("valid"),
            "test": self.evaluate("test", samples=10),
            "seconds": round(seconds, 2),
            "images_per_second": self.history[-1]["images_per_second"] if self.history else 0.0,
            "machine": report.machine(self.fabric),
        }
        if self._writes:
            summary |= self._likelihoods()
            pictures = self._pictures()
            with self._writing("the report"):
                report.write(self.folder, summary, self.history, *pictures)
        self.fabric.barrier()
        return summary

    @torch.no_grad()
    def _likelihoods(self) -> dict[str, Any]:
        """Importance-weighted log-likelihood of some test images, and the active units."""
        x = self._data("test")
        torch.manual_seed(self._seed("finish"))
        result: dict[str, Any] = {"active_units": int(self.vae.active_units(x[:1000]).sum())}
        count = min(self.settings.iw_images, len(x))
        if count:
            values = self.vae.log_likelihood(x[:count], self.settings.iw_samples, chunk_size=10).double()
            result["iw_log_likelihood"] = {
                "mean": values.mean().item(),
                "standard_error": (values.std() / math.sqrt(count)).item() if count > 1 else math.nan,
                "images": count,
                "samples": self.settings.iw_samples,
            }
        return result

    @torch.no_grad()
    def _pictures(self) -> tuple[Tensor, Tensor, Tensor]:
        """Images from the prior, test images and their reconstructions, in [0, 1]."""
        torch.manual_seed(self._seed("pictures"))
        x = self._data("test")[:32]
        high = self.vae.likelihood.high
        drawn = self.vae.mean(self.vae.sample_prior(64))
        return drawn / high, x / high, self.vae.reconstruct(x) / high

    def _data(self, split: str) -> Tensor:
        return self.bound.data(self.held_out[split].to(self.fabric.device))

    # -- files -----------------------------------------------------------------------------------------------------

    @property
    def _writes(self) -> bool:
        return bool(self.fabric.is_global_zero)

    def _identity(self) -> dict[str, Any]:
        return {**self.settings.identity(), "shards": self.feed.shards, "fingerprint": self.images.fingerprint}

    def resume(self) -> None:
        """Take up the checkpoint in the output folder, if there is one and it may be continued."""
        with self._writing("the output folder"):
            self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "last.pt"
        state = None if self.settings.overwrite else checkpoints.load(path)
        self.fabric.barrier()
        if state is None:
            return
        if state.get("kind") != "vae run":
            raise ValueError(f"{path} is not a checkpoint of VAE training")
        changed = [f"{name}={state['identity'].get(name)}" for name, value in self._identity().items()
                   if state["identity"].get(name) != value]  # fmt: skip
        if changed:
            raise ValueError(
                f"{self.folder} holds a run with other settings ({', '.join(changed)}): choose another --output, or "
                "--overwrite"
            )
        self.vae.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])
        self.objective.load_state_dict(state["objective"])
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        self.step, self.skipped, self.barren = state["counts"]
        self.history, self.best = state["history"], state["best"]
        self._saved = self.epoch
        self.begin -= state["seconds"]

    def _save(self) -> None:
        """Write what the run is resumed from."""
        self._write("last.pt", {
            "kind": "vae run",
            "identity": self._identity(),
            "model": self.vae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "objective": self.objective.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),
            "counts": [self.step, self.skipped, self.barren],
            "history": self.history,
            "best": self.best,
            "seconds": time.perf_counter() - self.begin,
        })  # fmt: skip
        self._saved = self.epoch

    def _save_best(self) -> None:
        settings = dataclasses.asdict(self.settings)
        with self.ema.applied(self.vae):
            model = {name: value.detach().cpu().clone() for name, value in self.vae.state_dict().items()}
        self._write("best.pt", {
            "kind": "vae model",
            "settings": {**settings, "shape": list(self.settings.shape)},
            "data_shape": list(self.images.shape),
            "epoch": self.epoch,
            "model": model,
        })  # fmt: skip

    def _write(self, name: str, state: dict[str, Any]) -> None:
        if self._writes:
            with self._writing(name):
                checkpoints.save(self.folder / name, state)
        self.fabric.barrier()

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        """Failures to write (torch turns some into a RuntimeError), with what is safe and what to do."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            kept = f"the checkpoint of epoch {self._saved} is intact" if self._saved else "there is no checkpoint yet"
            raise OSError(
                f"could not write {what} in {self.folder} ({error}): {kept}. Make room there and repeat the command: "
                "it continues the run"
            ) from error


def _wide(device: torch.device) -> torch.device:
    """Where to add up in float64: on the device, unless it has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def _line(figures: dict[str, float]) -> str:
    return (
        f"ELBO {figures['elbo']:.2f}, reconstruction {figures['reconstruction']:.2f}, KL {figures['kl']:.2f}, "
        f"{figures['bits_per_dim']:.3f} bits/dim"
    )
