"""Files that a fit can be resumed from: written whole or not at all, read without running code."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

__all__ = ["load", "save"]

#: What the first entry of a checkpoint says, so that no other file is taken for one.
FORMAT = "pyro_flowguides fit 3"


def save(path: str | Path, state: dict[str, Any]) -> None:
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


def load(path: str | Path) -> dict[str, Any] | None:
    """The state in a file, or ``None`` if there is no such file.

    Raises:
        ValueError: if the file cannot be read or is not a checkpoint.
    """
    path = Path(path)
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise ValueError(f"{path} is not a checkpoint that can be read: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of a fit by this version")
    return state
