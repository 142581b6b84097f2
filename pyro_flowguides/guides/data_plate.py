"""What a model says of the plate of its data before it comes to what lies inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from pyro_flowguides.guides import structure

__all__ = ["Plate", "plate_of"]


class Plate(NamedTuple):
    """What a model says of its plate: N, B, and the indices if it passes them."""

    size: int
    subsample_size: int
    subsample: Any = None


class _Found(BaseException):  # no model's own handling of exceptions should stop it
    def __init__(self, plate: Plate) -> None:
        self.plate = plate


class _StopAtPlate(Messenger):
    """Runs a model until it makes a plate of this name, and raises what it was asked for."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] == self.name and site_is_subsample(cast("Any", msg)):
            size, subsample = msg["fn"].size, msg["value"]
            count = msg["fn"].subsample_size if subsample is None else len(subsample)
            raise _Found(Plate(size, size if count is None else min(count, size), subsample))


def plate_of(owner: str, model: Callable[..., Any], name: str, args: Any, kwargs: Any) -> Plate:
    """The plate of this name as the model makes it for these arguments; the model is run as far as there.

    Raises:
        ValueError: if the model makes no such plate; the message names the owner and the plates that there are.
    """
    try:
        with structure.isolated(), _StopAtPlate(name):
            model(*args, **kwargs)
    except _Found as found:
        return found.plate
    with structure.isolated():
        nodes = poutine.trace(model).get_trace(*args, **kwargs).nodes
    plates = [node for node, site in nodes.items() if site["type"] == "sample" and site_is_subsample(site)]
    raise ValueError(f"{owner}: the model has no plate {name!r} with a size. Its plates: {plates}.")
