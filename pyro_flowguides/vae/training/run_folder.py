"""The files of a training run: the checkpoint it continues from, its best model, its logs, and the final report."""

from __future__ import annotations

import json
import math
import os
import platform
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor

from pyro_flowguides.flows import check_options
from pyro_flowguides.inference import checkpoint as checkpoints
from pyro_flowguides.nn.arguments import check_path
from pyro_flowguides.vae.models.recipes import MODELS
from pyro_flowguides.vae.models.vae import VAE
from pyro_flowguides.vae.training.estimates import Metrics, Pictures
from pyro_flowguides.vae.training.settings import Settings

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.loggers import TensorBoardLogger
    from matplotlib.figure import Figure

__all__ = ["EpochLog", "Progress", "RunFolder", "State", "Summary", "build_model", "describe_machine", "load_model"]
__all__ += ["read_model_state", "write_report"]

#: The contents of ``last.pt`` or ``best.pt``.
State: TypeAlias = dict[str, Any]
#: The summary of a run, as it is written to ``summary.json``.
Summary: TypeAlias = dict[str, Any]
#: Settings that are arguments of every builder of a model.
MODEL_SETTINGS = ("likelihood", "latent_dim", "posterior", "posterior_options", "prior", "prior_options", "network")
#: The files of the final report.
RESULTS = ("summary.json", "samples.png", "reconstructions.png", "curve.png")
#: Images per row of a picture.
COLUMNS = 8


@dataclass
class Progress:
    """How far a run has come, besides its parameters."""

    #: Optimization steps, skipped ones included.
    step: int = 0
    skipped_steps: int = 0
    #: Skipped steps since the last one with a finite gradient.
    failed_in_a_row: int = 0
    best_epoch: int = 0
    best_elbo: float = -math.inf
    #: Time spent before the last checkpoint.
    seconds: float = 0.0
    #: The logged numbers of every epoch.
    history: list[Metrics] = field(default_factory=list)


class RunFolder:
    """The folder of a run; only the first of several processes writes to it."""

    def __init__(self, path: Path, fabric: Fabric) -> None:
        self.path, self.fabric = path, fabric
        #: The epoch of the checkpoint, 0 if there is none.
        self.saved_epoch = 0

    @contextmanager
    def reserved(self) -> Iterator[None]:
        """Create the folder, and keep other runs from it.

        Raises:
            BlockingIOError: if another run writes to the folder.
            OSError: if the folder cannot be written to.
        """
        with ExitStack() as stack:
            if self.fabric.is_global_zero:
                with self.writing("the output folder"):
                    self.path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(checkpoints.reserved(self.path / "last.pt", self.path / "best.pt"))
            self.fabric.barrier()
            yield

    def load_run(self, identity: Mapping[str, object], overwrite: bool) -> State | None:
        """Return the checkpoint of the run with this identity, or ``None`` if there is no checkpoint.

        Args:
            identity: what determines the parameters of a run.
            overwrite: delete the files of a run that is finished or cannot be continued.
        """
        try:
            state = self._load_run(identity)
        except ValueError:
            if not overwrite:
                raise
            state = None
        self.fabric.barrier()
        if overwrite and (state is None or (self.path / RESULTS[0]).exists()):
            state = None
            self.fabric.barrier()
            if self.fabric.is_global_zero:
                for name in ("last.pt", "best.pt", *RESULTS):
                    (self.path / name).unlink(missing_ok=True)
        return state

    def _load_run(self, identity: Mapping[str, object]) -> State | None:
        state = cast("State | None", checkpoints.load(self.path / "last.pt", "vae run"))
        if state is None:
            return None
        saved = state["identity"]
        changed = [f"{name}={saved.get(name)}" for name, value in identity.items() if saved.get(name) != value]
        if changed:
            raise ValueError(
                f"{self.path} holds a run with other settings ({', '.join(changed)}): choose another --output, or "
                "--overwrite"
            )
        return state

    def save(self, name: str, state: State) -> None:
        """Write a file, while the other processes wait."""
        if self.fabric.is_global_zero:
            with self.writing(name):
                checkpoints.save(self.path / name, state)
        self.fabric.barrier()

    @contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Explain a failure to write: which files are intact, and what to do."""
        try:
            yield
        except (OSError, RuntimeError) as error:  # torch turns some of the first into the second
            epoch = self.saved_epoch
            intact = f"the checkpoint of epoch {epoch} is intact" if epoch else "there is no checkpoint yet"
            repeat = " and repeat the command: it continues the run"
            raise checkpoints.explain(error, f"{what} in {self.path}", intact, repeat) from error


def build_model(settings: Settings, data_shape: tuple[int, ...]) -> VAE:
    """Build the model that the settings describe.

    Raises:
        ValueError: if a name, an option or a size is wrong.
    """
    options = {name: getattr(settings, name) for name in MODEL_SETTINGS}
    builder = MODELS[settings.model]
    try:
        check_options("--model-options", builder, settings.model_options)
        return builder(data_shape, **options, **settings.model_options)
    except TypeError as error:  # of an option of the wrong type
        raise ValueError(f"--model {settings.model} cannot be built with these options: {error}") from error


def read_model_state(path: str | Path) -> State:
    """Read a ``best.pt``; errors as for :func:`load_model`."""
    state = cast("State | None", checkpoints.load(path, "vae model"))
    if state is None:
        raise FileNotFoundError(f"{path}: no such file")
    return state


def load_model(path: str | Path) -> tuple[VAE, Settings]:
    """Return the best model of a run from its ``best.pt``, and the settings it was trained with.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file does not hold the model of a run.
    """
    check_path("load_model", "path", path)
    state = read_model_state(path)
    settings = Settings(**state["settings"])
    vae = build_model(settings, state["data_shape"])
    vae.to(next(value.dtype for value in state["model"].values() if value.is_floating_point()))
    vae.load_state_dict(state["model"])
    return vae.eval(), settings


class EpochLog:
    """Write one row per epoch to ``metrics.csv`` and, optionally, for TensorBoard.

    Only the first of several processes writes. The file is written again from the rows of earlier epochs, because a
    killed run may have logged epochs after its last checkpoint.
    """

    def __init__(self, folder: Path, history: Sequence[Mapping[str, float]], *, tensorboard: bool = True) -> None:
        from lightning_fabric.loggers import CSVLogger

        self.tensorboard = _tensorboard_logger(folder, len(history)) if tensorboard else None
        self.csv = CSVLogger(folder, name="", version="", flush_logs_every_n_steps=1)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Experiment logs directory")  # other files in it are left alone
            _ = self.csv.experiment  # deletes the earlier file
        for row in history:
            self.csv.log_metrics(dict(row), step=int(row["step"]))

    def add(self, row: Mapping[str, float]) -> None:
        """Write one row."""
        self.csv.log_metrics(dict(row), step=int(row["step"]))
        if self.tensorboard is not None:
            tags = {name.replace("_", "/", 1): value for name, value in row.items()}
            self.tensorboard.log_metrics(tags, step=int(row["epoch"]))
            self.tensorboard.save()

    def close(self) -> None:
        if self.tensorboard is not None:
            self.tensorboard.finalize("success")


def _tensorboard_logger(folder: Path, epochs: int) -> TensorBoardLogger:
    from lightning_fabric.loggers import TensorBoardLogger

    try:
        logger = TensorBoardLogger(folder, name="tensorboard", version="", purge_step=epochs + 1)
        _ = logger.experiment  # opens the file
    except ImportError as error:
        raise ImportError(
            "TensorBoard logs need the package: pip install 'pyro-flowguides[vae]', or leave them out "
            "(--no-tensorboard)"
        ) from error
    return logger


def describe_machine(fabric: Fabric) -> dict[str, object]:
    """Describe the hardware and the versions of a run."""
    cuda = fabric.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(fabric.device) if cuda else platform.processor() or platform.machine(),
        "accelerator": fabric.device.type,
        "processes": fabric.world_size,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "peak_memory_mib": round(torch.cuda.max_memory_allocated(fabric.device) / 2**20) if cuda else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyro_flowguides": version("pyro-flowguides"),
    }


def write_report(folder: Path, summary: Summary, history: Sequence[Metrics], pictures: Pictures) -> None:
    """Write ``summary.json``, ``samples.png``, ``reconstructions.png`` and ``curve.png``."""
    samples, originals, reconstructions = pictures
    _save_page(folder / "samples.png", samples, "Draws from the prior")
    pairs = torch.stack([originals, reconstructions], 1).flatten(0, 1)
    _save_page(folder / "reconstructions.png", pairs, "Test images, each beside its reconstruction")
    _save_curve(folder / "curve.png", history)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def _save_page(path: Path, images: Tensor, title: str) -> None:
    """Save a picture of images in rows, one pixel apart."""
    images = images.detach().float().cpu().clamp(0, 1).expand(-1, 3, -1, -1)
    rows = math.ceil(len(images) / COLUMNS)
    _, channels, height, width = images.shape
    page = torch.ones(rows * COLUMNS, channels, height + 1, width + 1)
    page[: len(images), :, :height, :width] = images
    page = page.unflatten(0, (rows, COLUMNS)).permute(0, 3, 1, 4, 2)
    page = page.reshape(rows * (height + 1), COLUMNS * (width + 1), channels)
    figure = _new_figure(6, 6 * page.shape[0] / page.shape[1] + 0.4)
    axes = figure.subplots()
    axes.imshow(page.numpy(), interpolation="nearest")
    axes.set_title(title, fontsize=10)
    axes.set_axis_off()
    figure.savefig(path)


def _save_curve(path: Path, history: Sequence[Metrics]) -> None:
    figure = _new_figure(9, 3.5)
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    for split, style in (("train", "C0-"), ("valid", "C1-")):
        left.plot(epochs, [-row[f"{split}_elbo"] for row in history], style, label=split)
        right.plot(epochs, [row[f"{split}_kl"] for row in history], style, label=split)
    for axes, title in ((left, "−ELBO (nats per image)"), (right, "KL (nats per image)")):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch")
        axes.legend()
    figure.savefig(path)


def _new_figure(width: float, height: float) -> Figure:
    """Make a figure that pyplot does not know of."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
