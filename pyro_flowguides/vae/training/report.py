"""What a training run leaves behind: logs as it goes, and a summary and pictures at the end."""

from __future__ import annotations

import csv
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

import pyro_flowguides

__all__ = ["Logs", "machine", "write"]


class Logs:
    """One row per epoch, in ``metrics.csv`` and for TensorBoard.

    Args:
        folder: where to write.
        history: the rows so far. The file is written anew with them, so that epochs which a killed run wrote after its
            last checkpoint are not there twice.
        tensorboard: write for TensorBoard as well.

    Raises:
        ImportError: if TensorBoard is wanted and missing.
    """

    def __init__(self, folder: Path, history: list[dict[str, float]], *, tensorboard: bool = True) -> None:
        self.path = folder / "metrics.csv"
        self.path.unlink(missing_ok=True)
        self.writer: Any = _summary_writer(folder, len(history)) if tensorboard else None
        for row in history:
            self._append(row)

    def add(self, row: dict[str, float]) -> None:
        """Write one row."""
        self._append(row)
        if self.writer is not None:
            for name, value in row.items():
                self.writer.add_scalar(name.replace("_", "/", 1), value, int(row["epoch"]))
            self.writer.flush()

    def _append(self, row: dict[str, float]) -> None:
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if new:
                writer.writeheader()
            writer.writerow(row)

    def close(self) -> None:
        """Close the files."""
        if self.writer is not None:
            self.writer.close()


def _summary_writer(folder: Path, epochs: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "TensorBoard logs need the package: pip install 'pyro-flowguides[vae]', or leave them out "
            "(--no-tensorboard)"
        ) from error
    return SummaryWriter(str(folder / "tensorboard"), purge_step=epochs + 1)


def machine(fabric: Any) -> dict[str, Any]:
    """Where a run computes, and with which versions."""
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
        "pyro_flowguides": pyro_flowguides.__version__,
    }


def write(
    folder: Path,
    summary: dict[str, Any],
    history: list[dict[str, float]],
    samples: Tensor,
    originals: Tensor,
    reconstructions: Tensor,
) -> None:
    """Write ``summary.json``, ``samples.png``, ``reconstructions.png`` and ``curve.png``.

    Args:
        samples, originals, reconstructions: images ``(N, C, H, W)`` in [0, 1].
    """
    _save(folder / "samples.png", _grid(samples, columns=8), "Images at draws from the prior")
    pairs = torch.stack([originals, reconstructions], 1).flatten(0, 1)
    _save(folder / "reconstructions.png", _grid(pairs, columns=8), "Test images, each beside its reconstruction")
    _curve(folder / "curve.png", history)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def _grid(images: Tensor, columns: int) -> Tensor:
    """Images side by side, one pixel apart: ``(height, width, 3)``."""
    images = images.detach().float().cpu().clamp(0, 1)
    images = images.expand(-1, 3, -1, -1)
    rows = math.ceil(len(images) / columns)
    _, channels, height, width = images.shape
    page = torch.ones(rows * columns, channels, height + 1, width + 1)
    page[: len(images), :, :height, :width] = images
    page = page.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2)
    return page.reshape(rows * (height + 1), columns * (width + 1), channels)


def _save(path: Path, page: Tensor, title: str) -> None:
    figure = Figure(figsize=(6, 6 * page.shape[0] / page.shape[1] + 0.4), layout="constrained")
    axes = figure.subplots()
    axes.imshow(page.numpy(), interpolation="nearest")
    axes.set_title(title, fontsize=10)
    axes.set_axis_off()
    FigureCanvasAgg(figure).print_png(path)


def _curve(path: Path, history: list[dict[str, float]]) -> None:
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    for split, style in (("train", "C0-"), ("valid", "C1-")):
        left.plot(epochs, [-row[f"{split}_elbo"] for row in history], style, label=split)
        right.plot(epochs, [row[f"{split}_kl"] for row in history], style, label=split)
    for axes, title in ((left, "−ELBO (nats per image)"), (right, "KL (nats per image)")):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch")
        axes.legend()
    FigureCanvasAgg(figure).print_png(path)
