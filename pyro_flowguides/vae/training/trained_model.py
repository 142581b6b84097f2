"""Models built from settings, and read from the file that training leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict, cast

from torch import Tensor

from pyro_flowguides.inference import checkpoint as checkpoints
from pyro_flowguides.vae.models.recipes import MODELS
from pyro_flowguides.vae.models.vae import VAE
from pyro_flowguides.vae.training.settings import Settings

__all__ = ["ModelState", "build_model", "load_model", "read_model_state"]


class ModelState(TypedDict):
    """The contents of ``best.pt``."""

    kind: str
    settings: dict[str, Any]
    data_shape: tuple[int, ...]
    epoch: int
    model: dict[str, Tensor]


def build_model(settings: Settings, data_shape: tuple[int, ...]) -> VAE:
    """Build the model that the settings describe."""
    return MODELS[settings.model](
        data_shape,
        likelihood=settings.likelihood,
        latent_dim=settings.latent_dim,
        posterior=settings.posterior,
        posterior_options=settings.posterior_options,
        prior=settings.prior,
        prior_options=settings.prior_options,
        network=settings.network,
        **settings.model_options,
    )


def read_model_state(path: str | Path) -> ModelState:
    """Read a ``best.pt``; errors as for :func:`load_model`."""
    state = cast("ModelState | None", checkpoints.load(path))
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
