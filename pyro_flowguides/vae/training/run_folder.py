"""The folder of a training run: its files, and the messages if they cannot be written or continued."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

from torch import Tensor

from pyro_flowguides.inference import checkpoint as checkpoints
from pyro_flowguides.vae.training.ema import EMAState
from pyro_flowguides.vae.training.held_out import Metrics

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["Progress", "RunFolder", "RunState"]


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


class RunState(TypedDict):
    """The contents of ``last.pt``, from which a run is resumed."""

    kind: str
    #: What must be equal when the run is resumed.
    identity: dict[str, object]
    model: dict[str, Tensor]
    optimizer: dict[str, object]
    ema: EMAState
    loss_fn: dict[str, Tensor]
    precision: dict[str, object]
    #: The fields of a :class:`Progress`.
    progress: dict[str, Any]


class RunFolder:
    """The folder of a run; only the first of several processes writes to it.

    Args:
        path: path of the folder.
        fabric: Fabric of the run.
    """

    def __init__(self, path: Path, fabric: Fabric) -> None:
        self.path, self.fabric = path, fabric
        #: The epoch of the checkpoint, 0 if there is none.
        self.saved_epoch = 0

    def load_run(self, identity: Mapping[str, object]) -> RunState | None:
        """Return the checkpoint of the run with this identity, or ``None`` if there is no checkpoint.

        Raises:
            ValueError: if the file cannot be read, or holds a run with another identity.
        """
        path = self.path / "last.pt"
        state = cast("RunState | None", checkpoints.load(path))
        if state is None:
            return None
        if state.get("kind") != "vae run":
            raise ValueError(f"{path} is not a checkpoint of VAE training")
        saved = state["identity"]
        changed = [f"{name}={saved.get(name)}" for name, value in identity.items() if saved.get(name) != value]
        if changed:
            raise ValueError(
                f"{self.path} holds a run with other settings ({', '.join(changed)}): choose another --output, or "
                "--overwrite"
            )
        return state

    def save(self, name: str, state: Mapping[str, object]) -> None:
        """Write a file, while the other processes wait.

        Raises:
            OSError: if it cannot be written.
        """
        if self.fabric.is_global_zero:
            with self.writing(name):
                checkpoints.save(self.path / name, dict(state))
        self.fabric.barrier()

    @contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Explain a failure to write: which files are intact, and what to do.

        Raises:
            OSError: for an :class:`OSError`, or a :class:`RuntimeError`, into which torch turns some of them.
        """
        try:
            yield
        except (OSError, RuntimeError) as error:
            epoch = self.saved_epoch
            intact = f"the checkpoint of epoch {epoch} is intact" if epoch else "there is no checkpoint yet"
            raise OSError(
                f"could not write {what} in {self.path} ({error}): {intact}. Make room there and repeat the command: "
                "it continues the run"
            ) from error
