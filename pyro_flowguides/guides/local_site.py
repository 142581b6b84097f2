"""Local latent variables: the part of a site that belongs to one datum, and rows of numbers for all data."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide.utils import helpful_support_errors
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor
from torch.distributions import Transform, biject_to
from torch.distributions.constraints import Constraint

from pyro_flowguides.guides.distributions import DensityDelta
from pyro_flowguides.guides.initialization import check_finite
from pyro_flowguides.programs.types import Site

__all__ = ["LocalSite"]


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
