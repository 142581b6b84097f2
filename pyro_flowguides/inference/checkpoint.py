"""Files that a fit can resume from: written whole or not at all, read without running code."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict, cast

import torch
from torch import Tensor

__all__ = ["FitState", "load", "save"]

#: First entry of every checkpoint, so that no other file is mistaken for one.
FORMAT = "pyro_flowguides fit 4"


class FitState(TypedDict):
    """The state of a fit; lists of tensors are by group of parameters."""

    settings: dict[str, object]
    parameters: dict[str, Tensor]
    moments: list[list[Tensor]]  # of Adam, with the number of steps
    scales: list[Tensor]
    schedule: dict[str, object]
    generator: Tensor
    global_generator: Tensor
    history: list[float]
    average: list[Tensor]  # of the iterates; empty before averaging
    counts: list[int]  # of dropped particles, failed steps in a row, averaged iterates
    start: str
    seconds: float


def save(path: str | Path, state: Mapping[str, object]) -> None:
    """Write tensors, numbers, strings, lists and dicts; an interruption leaves the earlier file as it was.

    Raises:
        OSError: if the folder does not exist or the disk is full; the earlier file is untouched.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(path: str | Path) -> FitState | None:
    """Return the state in a file, or ``None`` if there is no such file.

    Raises:
        ValueError: if the file cannot be read or is not a checkpoint.
    """
    path = Path(path)
    if not path.exists():
        return None
    try:
        state: object = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise ValueError(f"{path} is not a checkpoint that can be read: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of a fit by this version")
    return cast(FitState, state)
