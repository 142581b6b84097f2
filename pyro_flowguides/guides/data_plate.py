"""The data of an amortized guide: the plate that a model creates for them, and the features of those in a subsample."""

from collections.abc import Callable
from typing import NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_flowguides.programs.running import isolated
from pyro_flowguides.programs.types import Args, Kwargs, Model, Site

__all__ = ["DataPlate", "encode_data", "find_data_plate"]


#: The end of messages on the encoder's arguments.
REMEDY = "pass its arguments with inputs=lambda indices, *args, **kwargs: ..."


class DataPlate(NamedTuple):
    """The plate of the data: N, B, and the indices if the model passes them."""

    size: int
    subsample_size: int
    subsample: Tensor | None = None

    def create(self, name: str, dim: int) -> pyro.plate:
        """Create this plate under a name at a dimension."""
        count = self.subsample_size if self.subsample is None else None
        return pyro.plate(name, self.size, count, self.subsample, dim)


class _PlateFound(BaseException):  # no handler of Exception in the model may catch it
    def __init__(self, plate: DataPlate) -> None:
        self.plate = plate


class _StopAtPlate(Messenger):
    """Run a model until it creates the plate of this name, and raise the plate's arguments."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def _pyro_sample(self, msg: Site) -> None:
        if msg["name"] == self.name and site_is_subsample(msg):  # type: ignore[arg-type]
            size, subsample = msg["fn"].size, msg["value"]
            count = msg["fn"].subsample_size if subsample is None else len(subsample)
            raise _PlateFound(DataPlate(size, size if count is None else min(count, size), subsample))


def find_data_plate(owner: str, model: Model, name: str, args: Args, kwargs: Kwargs) -> DataPlate:
    """Return the plate of this name as the model creates it for these arguments; the model is run no further."""
    try:
        with isolated(), _StopAtPlate(name):
            model(*args, **kwargs)
    except _PlateFound as found:
        return found.plate
    with isolated():
        nodes = poutine.trace(model).get_trace(*args, **kwargs).nodes
    plates = [node for node, site in nodes.items() if site["type"] == "sample" and site_is_subsample(site)]
    raise ValueError(f"{owner}: the model has no plate {name!r} with a size. Its plates: {plates}.")


def encode_data(
    owner: str,
    encoder: Callable[..., Tensor],
    inputs: Callable[..., object] | None,
    plate: pyro.plate,
    indices: Tensor,
    args: Args,
    kwargs: Kwargs,
) -> Tensor:
    """Return the features ``(B, C)`` of the data with the indices ``(B,)`` in the plate.

    The encoder's arguments are those that ``inputs`` returns, without it the model's arguments.
    """
    if inputs is not None:
        chosen = inputs(indices, *args, **kwargs)
        features = encoder(*chosen) if isinstance(chosen, tuple) else encoder(chosen)
    else:
        features = _encode_arguments(owner, encoder, plate, indices, args, kwargs)
    if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != len(indices):
        got = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(
            f"{owner}: the encoder must return a tensor of shape ({len(indices)}, C), one row of features for each "
            f"datum in the subsample of plate {plate.name!r}, got {got}. If it takes other arguments than the "
            f"model, or these have no leading dimension for the data, {REMEDY}"
        )
    return features


def _encode_arguments(
    owner: str, encoder: Callable[..., Tensor], plate: pyro.plate, indices: Tensor, args: Args, kwargs: Kwargs
) -> Tensor:
    """Encode the model's arguments, tensors with one row per datum cut down to the rows of the subsample."""
    size = plate.size
    if len(indices) == size and not torch.equal(indices, torch.arange(size, device=indices.device)):
        raise ValueError(
            f"{owner}: the subsample of plate {plate.name!r} is all data in another order, and the model's arguments "
            f"may be in that order already. To make the encoder's input unambiguous, {REMEDY}"
        )

    def select_rows(value: object) -> object:
        if len(indices) == size or not isinstance(value, Tensor) or value.dim() == 0 or len(value) != size:
            return value
        return value[indices.to(value.device)]

    try:
        return encoder(*map(select_rows, args), **{name: select_rows(value) for name, value in kwargs.items()})
    except TypeError as error:
        raise TypeError(
            f"{owner}: the encoder could not be called with the model's arguments ({error}). If it takes others, "
            f"{REMEDY}"
        ) from error
