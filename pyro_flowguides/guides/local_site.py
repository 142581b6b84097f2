"""Local latent variables: what a site in a plate looks like for one datum, and as rows of numbers for all."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide.utils import helpful_support_errors
from torch import Tensor
from torch.distributions import Transform, biject_to
from torch.distributions.constraints import Constraint

from pyro_flowguides.guides.density_delta import DensityDelta
from pyro_flowguides.guides.initialization import check_finite

__all__ = ["LocalSite"]


@dataclass(frozen=True)
class LocalSite:
    """A latent site in the plate of the data, seen from one datum.

    Attributes:
        name: the site's.
        plate_dim: the data's dimension among the batch dimensions, negative.
        batch: the other batch dimensions, from left to right: those of further plates.
        event: the shape of an unconstrained event.
        event_dim: dimensions of a constrained event.
        frames: the further plates.
        transform: from unconstrained to constrained values.
    """

    name: str
    plate_dim: int
    batch: tuple[int, ...]
    event: tuple[int, ...]
    event_dim: int
    frames: tuple[Any, ...]
    transform: Transform

    @classmethod
    def of(cls, owner: str, plate: str, site: Mapping[str, Any]) -> LocalSite:
        """The site of a trace; refused if it is discrete, in a subsampled further plate, or its support varies.

        Raises:
            ValueError: naming the site and the remedy.
        """
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
            transform = biject_to(_of_one_datum(owner, name, fn.support, dim - fn.event_dim))
            unconstrained = transform.inv(site["value"])
        check_finite(owner, name, unconstrained, site["value"])
        batch = list(fn.batch_shape)
        event = tuple(unconstrained.shape[len(batch) :])
        del batch[dim]
        return cls(name, dim, tuple(batch), event, fn.event_dim, tuple(frames.values()), transform)

    @property
    def size(self) -> int:
        """Numbers per datum."""
        return math.prod((*self.batch, *self.event))

    @property
    def layout(self) -> tuple[Any, ...]:
        """What must not change from one call to the next."""
        return self.plate_dim, self.batch, self.event, tuple(frame.name for frame in self.frames)

    def rows(self, value: Tensor) -> Tensor:
        """Unconstrained numbers ``(B, size)`` of a value shaped like the site in the model."""
        dims = len(self.batch) + 1
        unconstrained = self.transform.inv(value)
        return unconstrained.movedim(dims + self.plate_dim, 0).reshape(-1, self.size)

    def image(self, rows: Tensor) -> DensityDelta:
        """The distribution of the value that rows ``(*batch shape of the rows, size)`` are mapped to.

        The batch shape of the rows has the data at ``plate_dim``, dimensions of outer plates (particles) to the left,
        and nothing else.
        """
        dims = len(self.batch) + 1
        lead = rows.shape[: max(rows.dim() - 1 - dims, 0)]
        data = rows.shape[self.plate_dim - 1]
        unconstrained = rows.reshape(*lead, data, *self.batch, *self.event)
        unconstrained = unconstrained.movedim(len(lead), len(lead) + dims + self.plate_dim)
        value = self.transform(unconstrained)
        ladj = self.transform.log_abs_det_jacobian(unconstrained, value)
        return DensityDelta(value, -sum_rightmost(ladj, ladj.dim() - value.dim() + self.event_dim), self.event_dim)


def _of_one_datum(owner: str, name: str, support: Constraint, dim: int) -> Constraint:
    """The support with the bounds of one datum, which must be those of all."""
    reduced = copy.copy(support)
    for attribute, bound in vars(support).items():
        if isinstance(bound, Constraint):
            setattr(reduced, attribute, _of_one_datum(owner, name, bound, dim))
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
