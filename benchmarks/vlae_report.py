"""Tables and figures from the rows of vlae.py."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from row_files import read_rows
from tables import markdown_table
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Row = dict[str, Any]
#: The model that the others are compared with.
PLAIN = "VAE"
COMPARISONS = ("compare", "frey")
#: Rows that agree in the columns of their study make one table.
SETTINGS = dict.fromkeys(COMPARISONS, ("steps", "learning_rate", "seeds"))


def with_error(row: Row, column: str) -> str:
    """Return a value and its error; empty where there is no value."""
    return f"{row[column]} ± {row[column + '_error']}".replace("-", "−") if row[column] else ""


Columns = dict[str, Callable[[Row], str]]
COMPARISON: Columns = {
    "model": lambda row: row["model"],
    "−log p(x)": lambda row: with_error(row, "nll"),
    "by seed": lambda row: row["nll_by_seed"].replace(" ", ", "),
    "bits/dim": lambda row: row["bits_per_dim"],
    "gain over the VAE": lambda row: with_error(row, "gain"),
    "−ELBO": lambda row: row["negative_elbo"],
    "KL": lambda row: row["kl"],
    "CPU ms per step": lambda row: row["ms_per_step"],
    "parameters": lambda row: f"{int(row['parameters']):,}",
}
COLUMNS: dict[str, Columns] = {
    "compare": {name: cell for name, cell in COMPARISON.items() if name != "bits/dim"},
    "frey": COMPARISON,
    "window": {
        "reach": lambda row: row["reach"],
        "free bits": lambda row: row["free_bits"],
        "−log p(x)": lambda row: with_error(row, "nll"),
        "KL": lambda row: row["kl"],
        "−log p(x given z)": lambda row: row["nll_given_z"],
        "cost of another image's z": lambda row: with_error(row, "exchange"),
        "CPU ms per step": lambda row: row["ms_per_step"],
    },
    "speed": {
        "decoder": lambda row: f"`{row['decoder']}`",
        "training, images/s": lambda row: row["training"],
        "sampling, images/s": lambda row: row["sampling"],
        "one full pass per pixel, images/s": lambda row: row["full_passes"],
        "ratio": lambda row: row["ratio"],
    },
}


def write(study: str, path: Path) -> str:
    """Write the tables beside the CSV file, one for each run, and return their text."""
    parts = []
    for _, run in groupby(read_rows(path), key=lambda row: [row[key] for key in ("command", *SETTINGS.get(study, ()))]):
        rows = list(run)
        cells = [[cell(row) for cell in COLUMNS[study].values()] for row in rows]
        parts += [describe(study, rows[0]), markdown_table(list(COLUMNS[study]), cells)]
    text = "\n\n".join(parts) + "\n"
    path.with_suffix(".md").write_text(text, "utf-8")
    return text


def describe(study: str, row: Row) -> str:
    """Return the settings of a run, and how to repeat it."""
    about = f"`{row['command']}`, {row['date']}, {row['machine']}."
    if study == "speed":
        return about
    if study == "window":
        warmup = "no warm-up" if row["warmup"] == "0" else f"{row['warmup']} of them warm-up"
        return f"{row['steps']} steps, {warmup}: {about}"
    seeds = row["seeds"].split()
    return (
        f"{row['steps']} steps, step size {row['learning_rate']}, {'seeds' if len(seeds) > 1 else 'seed'} "
        f"{', '.join(seeds)}: {about}"
    )


# -- figures -----------------------------------------------------------------------------------------------------------


class WindowResult(NamedTuple):
    """The results for one window, for the figure.

    ``divergences`` are those of the training batches, ``kl`` that of the test images; ``pictures`` are data, a
    reconstruction and decompressions, ``(rows, images, channels, height, width)``.
    """

    reach: int
    free_bits: float
    divergences: list[float]
    kl: float
    pictures: Tensor

    @property
    def name(self) -> str:
        return f"reach {self.reach}" + (", free bits" if self.free_bits else "")


def draw_windows(path: Path, results: list[WindowResult]) -> None:
    figure, axes = plt.subplots(1, len(results) + 2, figsize=(3.1 * (len(results) + 2), 3), layout="constrained")
    plot_divergences(axes[0], axes[1], results)
    names = ["data", "mean", "one z:", "again", "again"]
    for result, ax in zip(results, axes[2:], strict=True):
        rows, height = result.pictures[:, :, 0].numpy(), result.pictures.shape[-2]
        ax.imshow(np.concatenate([np.concatenate(row, 1) for row in rows]), cmap="gray_r", vmin=0, vmax=1)
        ax.set_yticks([height * (row + 0.5) for row in range(len(names))], names)
        ax.set_xticks([])
        ax.set_title(f"{result.name}: KL {result.kl:.1f}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_divergences(final: Axes, training: Axes, results: list[WindowResult]) -> None:
    for marker, label, part in (
        ("o-", "no free bits", [result for result in results if not result.free_bits]),
        ("s", "free bits", [result for result in results if result.free_bits]),
    ):
        if part:
            final.plot([result.reach for result in part], [result.kl for result in part], marker, label=label)
    final.set_xlabel("reach of the window (pixels)")
    final.set_ylabel("KL(q‖p) of test images (nats)")
    final.set_ylim(top=1.2 * max(result.kl for result in results))
    for result in results:
        linestyle = "--" if result.free_bits else "-"
        training.plot(result.divergences, label=result.name, linewidth=1, linestyle=linestyle)
    training.set_xlabel("training step")
    training.set_ylabel("KL(q‖p) of the batch (nats)")
    training.set_ylim(top=1.1 * max(max(result.divergences[len(result.divergences) // 4 :]) for result in results))
    for ax in (final, training):
        ax.set_ylim(bottom=0)
        ax.legend(fontsize="small")
