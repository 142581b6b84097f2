"""The options of Pyro's ``AutoIAFNormal``, understood by ours."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from pyro_flowguides.guides.autoflow import RegisteredFlowGuide
from pyro_flowguides.programs.types import Model

__all__ = ["PyroIAFGuide"]

#: Options of Pyro's class that have no counterpart here.
WITHOUT_EFFECT = ("log_scale_max_clip", "log_scale_min_clip", "sigmoid_bias")


class PyroIAFGuide(RegisteredFlowGuide):
    """Base of the autoguide with inverse autoregressive layers.

    It replaces Pyro's ``AutoIAFNormal`` and understands its options. ``log_scale_min_clip``, ``log_scale_max_clip`` and
    ``sigmoid_bias`` are accepted with a warning: scales are bounded smoothly here.

    Args:
        hidden_dim: Pyro's name for ``hidden_dims``.
        num_transforms: Pyro's name for ``depth``.
        stable: Pyro's name for ``update="gated"``.
    """

    def __init__(
        self,
        model: Model,
        hidden_dim: Sequence[int] | None = None,
        init_loc_fn: Callable[..., object] | None = None,
        num_transforms: int | None = None,
        *,
        stable: bool = False,
        **options: Any,
    ) -> None:
        owner = type(self).__name__
        for name in WITHOUT_EFFECT:
            if name in options:
                warnings.warn(f"{owner}: {name} has no effect, scales are bounded smoothly", UserWarning, stacklevel=3)
                del options[name]
        renamed = {"hidden_dims": hidden_dim, "depth": num_transforms, "update": "gated" if stable else None}
        pyros = dict(zip(renamed, ("hidden_dim", "num_transforms", "stable"), strict=True))
        for name, value in renamed.items():
            if value is not None and name in options:
                raise TypeError(f"{owner}: {pyros[name]} is Pyro's name for {name}, give only one of them")
            if value is not None:
                options[name] = value
        if init_loc_fn is not None:
            options["init_loc_fn"] = init_loc_fn
        super().__init__(model, **options)
