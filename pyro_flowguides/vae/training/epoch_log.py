"""Logs of a training run: one row per epoch."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_fabric.loggers import CSVLogger, TensorBoardLogger

__all__ = ["EpochLog"]


class EpochLog:
    """Write one row per epoch to ``metrics.csv`` and, optionally, for TensorBoard.

    Only the first of several processes writes.

    Args:
        folder: where to write.
        history: the rows of earlier epochs. The file is written again from them, because a killed run may have logged
            epochs after its last checkpoint.
        tensorboard: write for TensorBoard, too.

    Raises:
        ImportError: if TensorBoard is wanted and missing.
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
        """Close the files."""
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
