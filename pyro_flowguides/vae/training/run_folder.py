"""The files of a training run: the checkpoint that it continues from, and its best model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from pyro_flowguides.inference import checkpoint as checkpoints
from pyro_flowguides.vae.models.recipes import MODELS
from pyro_flowguides.vae.models.vae import VAE
from pyro_flowguides.vae.training.estimates import Metrics
from pyro_flowguides.vae.training.settings import Settings

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["Progress", "RunFolder", "State", "build_model", "load_model", "read_model_state"]

#: The contents of ``last.pt`` or ``best.pt``.
State: TypeAlias = dict[str, Any]
#: Settings that are arguments of every builder of a model.
MODEL_SETTINGS = (
    *("likelihood", "latent_dim", "posterior", "posterior_options"),
    *("prior", "prior_options", "network"),
)


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

    def load_run(self, identity: Mapping[str, object]) -> State | None:
        """Return the checkpoint of the run with this identity, or ``None`` if there is no checkpoint."""
        path = self.path / "last.pt"
        state = cast("State | None", checkpoints.load(path))
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
            raise OSError(
                f"could not write {what} in {self.path} ({error}): {intact}. Make room there and repeat the command: "
                "it continues the run"
            ) from error


def build_model(settings: Settings, data_shape: tuple[int, ...]) -> VAE:
    """Build the model that the settings describe."""
    options = {name: getattr(settings, name) for name in MODEL_SETTINGS}
    return MODELS[settings.model](data_shape, **options, **settings.model_options)


def read_model_state(path: str | Path) -> State:
    """Read a ``best.pt``; errors as for :func:`load_model`."""
    state = cast("State | None", checkpoints.load(path))
    if state is None:
        raise FileNotFoundError(f"{path}: no such file")
    if state.get("kind") != "vae model":
        raise ValueError(f"{path} is not the best.pt of a training run")
    return state


def load_model(path: str | Path) -> tuple[VAE, Settings]:
    """Return the best model of a run from its ``best.pt``, and the settings it was trained with.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file does not hold the model of a run.
    """
    state = read_model_state(path)
    settings = Settings(**state["settings"])
    vae = build_model(settings, state["data_shape"])
    vae.to(next(value.dtype for value in state["model"].values() if value.is_floating_point()))
    vae.load_state_dict(state["model"])
    return vae.eval(), settings
