"""Initial values of the sites of a model."""

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
    """

    def __init__(self, init_loc_fn: Callable[..., object]) -> None:
        self.init_loc_fn = init_loc_fn

    def __call__(self, site: Site) -> Tensor:
        try:
            return cast("Tensor", self.init_loc_fn(site))
        except NotImplementedError:
            transform = transform_to(site["fn"].support)
            value: Tensor = transform(torch.zeros(transform.inverse_shape(site["fn"].shape())))
            value._pyro_custom_init = False  # type: ignore[attr-defined]  # Pyro's own functions set this too
            return value


def check_finite(owner: str, name: str, unconstrained: Tensor, value: Tensor) -> None:
    """Refuse a site whose initial value is not finite or lies on the boundary of its support."""
    if not unconstrained.isfinite().all():
        numbers = [f"{number:.4g}" for number in value.detach().reshape(-1)[:7].tolist()]
        numbers[6:] = ["..."] * len(numbers[6:])
        raise ValueError(
            f"{owner}: the initial value of site {name!r} is not in the interior of its support: "
            f"[{', '.join(numbers)}], shape {tuple(value.shape)}. Choose another init_loc_fn, for example "
            f"init_to_value(values={{{name!r}: ...}})."
        )
