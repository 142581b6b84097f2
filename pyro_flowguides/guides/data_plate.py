"""The data of an amortized guide: the plate that a model creates for them, the sites in it, and the features."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide.utils import helpful_support_errors
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Transform, biject_to
from torch.distributions.constraints import Constraint

from pyro_flowguides.guides.distributions import DensityDelta
from pyro_flowguides.guides.lazy import check_finite
from pyro_flowguides.programs.running import isolated
from pyro_flowguides.programs.types import Args, Kwargs, Model, Site

__all__ = ["DataPlate", "LocalSite", "encode_data", "find_data_plate"]

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


@dataclass(frozen=True)
class LocalSite:
    """The part of a latent site in the plate of the data that belongs to one datum."""

    name: str
    plate_dim: int  # of the data among the batch dimensions, negative
    batch_shape: tuple[int, ...]  # without the data: sizes of the further plates, from left to right
    event_shape: tuple[int, ...]  # unconstrained
    event_dim: int  # constrained
    further_plates: tuple[CondIndepStackFrame, ...]
    transform: Transform  # from unconstrained to constrained values

    @classmethod
    def of(cls, owner: str, plate: str, site: Site) -> LocalSite:
        """Describe a site of a trace; refuse one that cannot be amortized."""
        name, fn = site["name"], site["fn"]
        frames = {frame.name: frame for frame in site["cond_indep_stack"]}
        dim = frames.pop(plate).dim
        for frame in frames.values():
            if frame.size != frame.full_size:
                raise ValueError(
                    f"{owner}: site {name!r} lies in plate {plate!r} and in plate {frame.name!r}, which is subsampled "
                    f"too. The posterior is amortized over the data of one plate: do not subsample {frame.name!r}."
                )
        with helpful_support_errors(site):
            transform = biject_to(_support_of_one_datum(owner, name, fn.support, dim - fn.event_dim))
            unconstrained = transform.inv(site["value"])
        check_finite(owner, name, unconstrained, site["value"])
        batch_shape = list(fn.batch_shape)
        event_shape = tuple(unconstrained.shape[len(batch_shape) :])
        del batch_shape[dim]
        return cls(name, dim, tuple(batch_shape), event_shape, fn.event_dim, tuple(frames.values()), transform)

    @property
    def size(self) -> int:
        """Count the unconstrained numbers of one datum."""
        return math.prod((*self.batch_shape, *self.event_shape))

    @property
    def layout(self) -> tuple[object, ...]:
        """Return the properties that must stay the same from call to call."""
        return self.plate_dim, self.batch_shape, self.event_shape, tuple(frame.name for frame in self.further_plates)

    def to_rows(self, value: Tensor) -> Tensor:
        """Flatten a value shaped like the site in the model to unconstrained rows ``(B, size)``."""
        dims = len(self.batch_shape) + 1
        unconstrained = self.transform.inv(value)
        return unconstrained.movedim(dims + self.plate_dim, 0).reshape(-1, self.size)

    def delta(self, rows: Tensor) -> DensityDelta:
        """Return the distribution of the site's value for given rows ``(*batch shape of the rows, size)``.

        The batch shape of the rows has the data at ``plate_dim``, dimensions of outer plates (particles) to the left,
        and no others.
        """
        dims = len(self.batch_shape) + 1
        outer = rows.shape[: max(rows.dim() - 1 - dims, 0)]
        data = rows.shape[self.plate_dim - 1]
        unconstrained = rows.reshape(*outer, data, *self.batch_shape, *self.event_shape)
        unconstrained = unconstrained.movedim(len(outer), len(outer) + dims + self.plate_dim)
        value = self.transform(unconstrained)
        ladj = self.transform.log_abs_det_jacobian(unconstrained, value)
        return DensityDelta(value, -sum_rightmost(ladj, ladj.dim() - value.dim() + self.event_dim), self.event_dim)


def _support_of_one_datum(owner: str, name: str, support: Constraint, dim: int) -> Constraint:
    """Return the support with the bounds of one datum; refuse bounds that differ from datum to datum."""
    reduced = copy.copy(support)
    for attribute, bound in vars(support).items():
        if isinstance(bound, Constraint):
            setattr(reduced, attribute, _support_of_one_datum(owner, name, bound, dim))
        elif isinstance(bound, Tensor) and bound.dim() >= -dim:
            first = bound.narrow(dim, 0, 1)
            if not torch.equal(first.expand_as(bound), bound):
                raise ValueError(
                    f"{owner}: the support of site {name!r} differs from datum to datum. Reparametrize the site over "
                    f"a fixed support: for Uniform(0, high), sample a fraction from Uniform(0, 1) and use "
                    f"high * fraction."
                )
            setattr(reduced, attribute, first)
    return reduced
