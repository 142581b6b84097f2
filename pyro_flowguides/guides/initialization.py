"""Initial values of the sites of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.distributions import transform_to

from pyro_flowguides.programs.types import Site

__all__ = ["InitialValue", "check_finite"]


class InitialValue:
    """An initialization function that also serves priors without a sampler.

    Pyro's functions sample the prior, which an :class:`~pyro.distributions.ImproperUniform` refuses. Such a site starts
    at zero in unconstrained space.

    Args:
        init_loc_fn: one of Pyro's initialization functions, ``site -> value``.
    """

    def __init__(self, init_loc_fn: Callable[..., object]) -> None:
        self.init_loc_fn = init_loc_fn

    def __call__(self, site: Site) -> Tensor:
        try:
            return cast("Tensor", self.init_loc_fn(site))
        except NotImplementedError:
            return _value_at_zero(site)


def _value_at_zero(site: Site) -> Tensor:
    transform = transform_to(site["fn"].support)
    value: Tensor = transform(torch.zeros(transform.inverse_shape(site["fn"].shape())))
    value._pyro_custom_init = False  # type: ignore[attr-defined]  # Pyro's own initialization functions set this too
    return value


def check_finite(owner: str, name: str, unconstrained: Tensor, value: Tensor) -> None:
    """Refuse a site whose initial value is not finite or lies on the boundary of its support.

    Raises:
        ValueError: naming the site, its initial value and the remedy.
    """
    if bool(unconstrained.isfinite().all()):
        return
    raise ValueError(
        f"{owner}: the initial value of site {name!r} is not in the interior of its support: {_excerpt(value)}. "
        f"Choose another init_loc_fn, for example init_to_value(values={{{name!r}: ...}})."
    )


def _excerpt(value: Tensor, length: int = 6) -> str:
    flat = value.detach().reshape(-1)
    numbers = ", ".join(f"{number:.4g}" for number in flat[:length].tolist())
    return f"[{numbers}{', ...' if flat.numel() > length else ''}], shape {tuple(value.shape)}"
