"""The plate of the data as a model creates it, before the model is run any further."""

from __future__ import annotations

from typing import NamedTuple

import pyro
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_flowguides.programs.running import isolated
from pyro_flowguides.programs.types import Args, Kwargs, Model, Site

__all__ = ["DataPlate", "find_data_plate"]


class DataPlate(NamedTuple):
    """The plate of the data: N, B, and the indices if the model passes them."""

    size: int
    subsample_size: int
    subsample: Tensor | None = None

    def create(self, name: str, dim: int) -> pyro.plate:
        """Create this plate under a name at a dimension."""
        if self.subsample is not None:
            return pyro.plate(name, self.size, subsample=self.subsample, dim=dim)
        return pyro.plate(name, self.size, self.subsample_size, dim=dim)


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
    """Return the plate of this name as the model creates it for these arguments; the model is run no further.

    Raises:
        ValueError: if the model creates no such plate; the message names the owner and the model's plates.
    """
    try:
        with isolated(), _StopAtPlate(name):
            model(*args, **kwargs)
    except _PlateFound as found:
        return found.plate
    with isolated():
        nodes = poutine.trace(model).get_trace(*args, **kwargs).nodes
    plates = [node for node, site in nodes.items() if site["type"] == "sample" and site_is_subsample(site)]
    raise ValueError(f"{owner}: the model has no plate {name!r} with a size. Its plates: {plates}.")
