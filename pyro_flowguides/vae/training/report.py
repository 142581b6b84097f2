"""The reports of a training run: a row per epoch, and at the end a summary and pictures."""

from __future__ import annotations

import json
import math
import os
import platform
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from pyro_flowguides.vae.training.estimates import Metrics, Pictures

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.loggers import CSVLogger, TensorBoardLogger
    from matplotlib.figure import Figure

__all__ = ["EpochLog", "Summary", "describe_machine", "write_report"]

#: The summary of a run, as it is written to ``summary.json``.
Summary: TypeAlias = dict[str, Any]

#: Images per row of a picture.
COLUMNS = 8


class EpochLog:
    """Write one row per epoch to ``metrics.csv`` and, optionally, for TensorBoard.

    Only the first of several processes writes. The file is written again from the rows of earlier epochs, because a
    killed run may have logged epochs after its last checkpoint.
    """

    def __init__(self, folder: Path, history: Sequence[Mapping[str, float]], *, tensorboard: bool = True) -> None:
        self.tensorboard = _tensorboard_logger(folder, len(history)) if tensorboard else None
        self.csv = _csv_logger(folder)
        for row in history:
            self._add_to_csv(row)

    def add(self, row: Mapping[str, float]) -> None:
        """Write one row."""
        self._add_to_csv(row)
        if self.tensorboard is not None:
            tags = {name.replace("_", "/", 1): value for name, value in row.items()}
            self.tensorboard.log_metrics(tags, step=int(row["epoch"]))
            self.tensorboard.save()

    def _add_to_csv(self, row: Mapping[str, float]) -> None:
        self.csv.log_metrics(dict(row), step=int(row["step"]))

    def close(self) -> None:
        if self.tensorboard is not None:
            self.tensorboard.finalize("success")


def _csv_logger(folder: Path) -> CSVLogger:
    from lightning_fabric.loggers import CSVLogger

    logger = CSVLogger(folder, name="", version="", flush_logs_every_n_steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Experiment logs directory")  # other files in it are left alone
        _ = logger.experiment  # deletes the earlier file
    return logger


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
    _save_page(folder / "samples.png", _arrange(samples), "Draws from the prior")
    pairs = torch.stack([originals, reconstructions], 1).flatten(0, 1)
    _save_page(folder / "reconstructions.png", _arrange(pairs), "Test images, each beside its reconstruction")
    _save_curve(folder / "curve.png", history)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def _arrange(images: Tensor) -> Tensor:
    """Arrange images in rows, one pixel apart, as a page ``(height, width, 3)``."""
    images = images.detach().float().cpu().clamp(0, 1).expand(-1, 3, -1, -1)
    rows = math.ceil(len(images) / COLUMNS)
    _, channels, height, width = images.shape
    page = torch.ones(rows * COLUMNS, channels, height + 1, width + 1)
    page[: len(images), :, :height, :width] = images
    page = page.unflatten(0, (rows, COLUMNS)).permute(0, 3, 1, 4, 2)
    return page.reshape(rows * (height + 1), COLUMNS * (width + 1), channels)


def _save_page(path: Path, page: Tensor, title: str) -> None:
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
    """Make a figure without the global state of pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
