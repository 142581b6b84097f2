"""Training a VAE: one loop for one process or many, exactly resumable, on Lightning Fabric.

The seed of a run, the step and the shard of the batch determine all random numbers. A checkpoint therefore needs no
generator state, a killed run continues to the same bits, and two processes with one shard each do what one process does
with both.
"""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pyro
import torch
from torch import Tensor, nn
from tqdm import tqdm

from pyro_flowguides.nn.arguments import describe
from pyro_flowguides.programs.running import PYRO_LOCK
from pyro_flowguides.vae.training.ema import EMA
from pyro_flowguides.vae.training.estimates import HeldOut, Metrics, ShardedTerms, bound_metrics, float64_device
from pyro_flowguides.vae.training.image_files import load_images
from pyro_flowguides.vae.training.images import Images, Minibatches, derive_seed
from pyro_flowguides.vae.training.losses import ELBOLoss, SoftFreeBitsLoss
from pyro_flowguides.vae.training.run_folder import (
    EpochLog,
    Progress,
    RunFolder,
    Summary,
    build_model,
    describe_machine,
    read_model_state,
    write_report,
)
from pyro_flowguides.vae.training.settings import Settings

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.plugins import Precision

__all__ = ["TrainingDivergedError", "train"]

#: Steps in a row without a finite gradient after which training fails.
MAX_FAILED_STEPS = 50
#: Steps over which the step size rises to its full value, at most the first epoch. The first steps of Adam have full
#: length, and move together the hundreds of weights that determine one parameter of a flow.
LR_WARMUP = 100
#: Draws of z per test image.
TEST_SAMPLES = 10
#: Steps between updates of the progress bar, each of which waits for the device.
PROGRESS_EVERY = 20
OPTIMIZERS = {"adam": torch.optim.Adam, "adamax": torch.optim.Adamax}
LOSSES: dict[str, type[ELBOLoss | SoftFreeBitsLoss]] = {"hard": ELBOLoss, "soft": SoftFreeBitsLoss}


class TrainingDivergedError(RuntimeError):
    """No step had a finite gradient for so long that training cannot succeed."""


def train(settings: Settings) -> Summary:
    """Train as the settings say, write all results to ``settings.output``, and return the summary.

    With several processes each returns the summary, and the first one writes.

    Raises:
        ImportError: if Lightning Fabric is missing.
        TrainingDivergedError: if no gradient is finite for 50 steps in a row.
        OSError: if a file cannot be written (for example on a full disk), or another run uses the folder; the last
            checkpoint is intact.
        ValueError: if data or settings are invalid, or the folder holds another run or a damaged checkpoint.
    """
    if not isinstance(settings, Settings):
        raise TypeError(f"train: settings must be Settings, got {describe(settings)}")
    fabric = _make_fabric(settings)
    fabric.launch()
    images = load_images(settings.data, settings.shape)
    with PYRO_LOCK, pyro.validation_enabled(False):  # a step with values that are not finite is skipped
        run = _Run(settings, fabric, images)
        with run.folder.reserved():
            run.resume()
            run.fit()
            return run.finish()


def _make_fabric(settings: Settings) -> Fabric:
    try:
        from lightning_fabric import Fabric
    except ImportError as error:
        raise ImportError("training needs Lightning Fabric: pip install 'pyro-flowguides[vae]'") from error
    if settings.accelerator == "cuda" and not torch.cuda.is_available():
        raise ValueError("--accelerator cuda: no CUDA device is available here. Use --accelerator auto or cpu.")
    try:
        return Fabric(
            accelerator=settings.accelerator,
            devices=int(settings.devices) if settings.devices.isdigit() else settings.devices,
            num_nodes=settings.nodes,
            strategy=settings.strategy,
            precision=settings.precision,
        )
    except (RuntimeError, TypeError) as error:
        flags = ", ".join(f"--{name} {getattr(settings, name)}" for name in ("accelerator", "devices", "strategy"))
        raise ValueError(f"{flags}: {error}") from error


class _Run:
    """A training run: its parts, its progress, and the loop that advances it."""

    def __init__(self, settings: Settings, fabric: Fabric, images: Images) -> None:
        self.settings, self.fabric, self.images = settings, fabric, images
        self.folder = RunFolder(Path(settings.output), fabric)
        self.progress = Progress()
        self.start = time.perf_counter()
        shards = settings.shards or fabric.world_size
        if shards % fabric.world_size:
            raise ValueError(f"--shards must be a multiple of the {fabric.world_size} processes, got {shards}")
        self.own_shards = range(fabric.global_rank, shards, fabric.world_size)
        fixed = images.binarized() if settings.binarization != "none" else images
        dynamic, seed = settings.binarization == "dynamic", settings.seed
        data = images if dynamic else fixed
        self.minibatches = Minibatches(
            data, batch_size=settings.batch_size, shards=shards, dynamic=dynamic, seed=seed, device=fabric.device
        )
        self._build_model(fixed.levels)
        self.held_out = HeldOut(self.sharded_terms, {"valid": fixed.valid, "test": fixed.test}, fabric, seed)

    def _build_model(self, levels: int) -> None:
        settings, fabric = self.settings, self.fabric
        torch.manual_seed(derive_seed(settings.seed, "start"))
        with fabric.init_module():
            self.vae = build_model(settings, self.images.shape)
        self.vae.to(fabric.device)
        self.sharded_terms = ShardedTerms(self.vae, levels, settings.compile)
        first_batch = torch.cat([self.minibatches.shard(0, number) for number in range(self.minibatches.shards)])
        self.vae.initialize(self.sharded_terms.scale(first_batch))
        self.optimizer = OPTIMIZERS[settings.optimizer](self.vae.parameters(), lr=settings.lr)
        self.fabric_module, self.fabric_optimizer = fabric.setup(self.sharded_terms, self.optimizer)
        warmup_steps = settings.warmup * self.minibatches.steps_per_epoch
        self.loss_fn = LOSSES[settings.free_bits_kind](warmup_steps, settings.free_bits).to(fabric.device)
        self.ema = EMA(self.vae, settings.ema)
        self.stateful: dict[str, nn.Module | torch.optim.Optimizer | EMA | Precision]
        self.stateful = {"model": self.vae, "optimizer": self.optimizer, "ema": self.ema}
        self.stateful |= {"loss_fn": self.loss_fn, "precision": fabric.strategy.precision}

    @property
    def epoch(self) -> int:
        """Number of complete epochs."""
        return self.progress.step // self.minibatches.steps_per_epoch

    def reason_to_stop(self) -> str:
        """Return why training is over, or an empty string if it is not."""
        if self.epoch >= self.settings.epochs:
            return f"{self.epoch} epochs are complete"
        waited = self.epoch - max(self.progress.best_epoch, self.settings.warmup)
        if 0 < self.settings.patience <= waited:
            return f"the validation ELBO did not improve for {waited} epochs"
        return ""

    def fit(self) -> None:
        """Train to the end, one epoch at a time, with a checkpoint after each."""
        settings, progress = self.settings, self.progress
        with self.folder.writing("the logs"):
            log = EpochLog(self.folder.path, progress.history, tensorboard=settings.tensorboard)
        total = settings.epochs * self.minibatches.steps_per_epoch
        hidden = not (settings.progress and self.fabric.is_global_zero)
        with tqdm(total=total, initial=progress.step, disable=hidden, unit="step") as bar:
            while not self.reason_to_stop():
                row = self._train_epoch(bar)
                progress.history.append(row)
                if row["valid_elbo"] > progress.best_elbo:
                    progress.best_epoch, progress.best_elbo = self.epoch, row["valid_elbo"]
                    self._save_best()
                self._save_run()
                with self.folder.writing("the logs"):
                    log.add(row)
        log.close()

    def _train_epoch(self, bar: tqdm) -> Metrics:
        """Train for an epoch and return its row of the logs."""
        begin, steps = time.perf_counter(), self.minibatches.steps_per_epoch
        sums = torch.zeros(3, dtype=torch.float64, device=float64_device(self.fabric.device))
        self.fabric_module.train()
        for number in range(1, steps + 1):
            sums += self._step().to(sums)
            bar.update()
            if number % PROGRESS_EVERY == 0:
                bar.set_postfix_str(self._progress_text(sums / number), refresh=False)
        means = torch.as_tensor(self.fabric.all_reduce(sums / steps, reduce_op="mean"))
        speed = steps * self.minibatches.batch_size / (time.perf_counter() - begin)
        row = self._log_row(means) | {"images_per_second": speed}
        bar.set_description_str(f"valid ELBO {row['valid_elbo']:.2f}", refresh=False)
        return row

    def _log_row(self, means: Tensor) -> Metrics:
        """Combine the means of (loss, reconstruction, KL) over the epoch with the bound on validation images."""
        row: Metrics = {"epoch": float(self.epoch), "step": float(self.progress.step), "loss": means[0].item()}
        train = bound_metrics(means[1:], math.prod(self.images.shape))
        with self.ema.applied(self.vae):
            valid = self.held_out.bound("valid")
        for split, metrics in (("train", train), ("valid", valid)):
            row |= {f"{split}_{name}": value for name, value in metrics.items()}
        return row | {"skipped": float(self.progress.skipped_steps)}

    def _progress_text(self, means: Tensor) -> str:
        bound = bound_metrics(means[1:], math.prod(self.images.shape))
        text = "ELBO {elbo:.2f}, reconstruction {reconstruction:.2f}, KL {kl:.2f}, {bits_per_dim:.3f} bits/dim"
        return text.format(**bound)

    def _step(self) -> Tensor:
        """Take a step; return loss, reconstruction and KL of the shards of this process."""
        step = self.progress.step
        shards = [self.minibatches.shard(step, number) for number in self.own_shards]
        seeds = [derive_seed(self.settings.seed, "noise", step, number) for number in self.own_shards]
        terms = self.fabric_module(shards, seeds, self.settings.num_samples)
        loss, metrics = self.loss_fn(terms, step)
        self.fabric_optimizer.zero_grad()
        self.fabric.backward(loss)
        self._update_parameters()
        self.progress.step += 1
        return torch.stack([metrics["loss"], metrics["reconstruction"], metrics["kl"]])

    def _update_parameters(self) -> None:
        """Follow the clipped gradient, unless it is not finite."""
        progress = self.progress
        warmup_steps = min(LR_WARMUP, self.minibatches.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * min(1.0, (progress.step + 1) / warmup_steps)
        parts, limit = (self.fabric_module, self.fabric_optimizer), self.settings.clip or math.inf
        norm = self.fabric.clip_gradients(*parts, max_norm=limit, error_if_nonfinite=False)
        if norm is not None and torch.isfinite(norm):
            progress.failed_in_a_row = 0
            self.fabric_optimizer.step()
            self.ema.update(self.vae)
            return
        progress.skipped_steps += 1
        progress.failed_in_a_row += 1
        if progress.failed_in_a_row >= MAX_FAILED_STEPS:
            raise TrainingDivergedError(
                f"the gradient was not finite for {MAX_FAILED_STEPS} steps in a row, up to step {progress.step}: lower "
                "--lr, or use --precision 32-true"
            )
        if self.fabric.strategy.precision.state_dict():  # float16: its scaler takes no step, but lowers the loss scale
            self.fabric_optimizer.step()

    def _identity(self) -> dict[str, object]:
        more = {"shards": self.minibatches.shards, "fingerprint": self.images.fingerprint}
        return {**self.settings.identity(), **more}

    def resume(self) -> None:
        """Continue from the checkpoint in the output folder, if there is one."""
        state = self.folder.load_run(self._identity(), self.settings.overwrite)
        if state is None:
            self._save_run()  # a full disk is noticed before the first step
            return
        for name, part in self.stateful.items():
            part.load_state_dict(state[name])
        self.progress = Progress(**state["progress"])
        self.folder.saved_epoch = self.epoch
        self.start -= self.progress.seconds

    def _save_run(self) -> None:
        self.progress.seconds = time.perf_counter() - self.start
        parts = {name: part.state_dict() for name, part in self.stateful.items()}
        state = {"kind": "vae run", "identity": self._identity(), "progress": dataclasses.asdict(self.progress)}
        self.folder.save("last.pt", {**state, **parts})
        self.folder.saved_epoch = self.epoch

    def _save_best(self) -> None:
        with self.ema.applied(self.vae):
            model = {name: value.detach().cpu().clone() for name, value in self.vae.state_dict().items()}
        settings = dataclasses.asdict(self.settings)
        state = {"kind": "vae model", "settings": settings, "data_shape": self.images.shape, "epoch": self.epoch}
        self.folder.save("best.pt", {**state, "model": model})

    def finish(self) -> Summary:
        """Evaluate the best model on the test images; write summary and pictures."""
        if self.progress.best_epoch:
            self.vae.load_state_dict(read_model_state(self.folder.path / "best.pt")["model"])
        else:
            self.ema.copy_to(self.vae)
        summary = self._summarize()
        if self.fabric.is_global_zero:
            options = self.settings.iw_images, self.settings.num_iw_samples
            summary["active_units"], weighted = self.held_out.active_units_and_likelihood(*options)
            if weighted is not None:
                summary["iw_log_likelihood"] = weighted
            pictures = self.held_out.pictures()
            with self.folder.writing("the report"):
                write_report(self.folder.path, summary, self.progress.history, pictures)
        self.fabric.barrier()
        return summary

    def _summarize(self) -> Summary:
        progress, images = self.progress, self.images
        seconds = time.perf_counter() - self.start
        return {
            "settings": dataclasses.asdict(self.settings),
            "data": {"name": images.name, "shape": images.shape, "fingerprint": images.fingerprint},
            "reason": self.reason_to_stop(),
            "epochs": self.epoch,
            "steps": progress.step,
            "skipped_steps": progress.skipped_steps,
            "best_epoch": progress.best_epoch,
            "parameters": sum(parameter.numel() for parameter in self.vae.parameters()),
            "valid": self.held_out.bound("valid"),
            "test": self.held_out.bound("test", TEST_SAMPLES),
            "seconds": round(seconds, 2),
            "images_per_second": progress.history[-1]["images_per_second"] if progress.history else 0.0,
            "machine": describe_machine(self.fabric),
        }
