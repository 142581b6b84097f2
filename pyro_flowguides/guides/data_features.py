"""Features of the data in a subsample, computed by a user's encoder from the model's arguments."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import torch
from torch import Tensor

from pyro_flowguides.programs.types import Args, Kwargs

__all__ = ["encode_data"]


def encode_data(
    owner: str,
    encoder: Callable[..., Tensor],
    inputs: Callable[..., object] | None,
    plate: pyro.plate,
    indices: Tensor,
    args: Args,
    kwargs: Kwargs,
) -> Tensor:
    """Return the features ``(B, C)`` of the data with these indices.

    Args:
        owner: the class to name in messages.
        encoder: the encoder.
        inputs: ``(indices, *args, **kwargs) -> argument or tuple of arguments of the encoder``. Without it the encoder
            gets the model's arguments, tensors with one row per datum cut down to the rows of the subsample.
        plate: the plate of the data.
        indices: the subsample ``(B,)``.
        args, kwargs: the model's arguments.

    Raises:
        ValueError: if the encoder returns anything but one row per datum, or the arguments may be in another order.
        TypeError: if the encoder does not accept the model's arguments.
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
            f"model, or these have no leading dimension for the data, pass its arguments with "
            f"inputs=lambda indices, *args, **kwargs: ..."
        )
    return features


def _encode_arguments(
    owner: str, encoder: Callable[..., Tensor], plate: pyro.plate, indices: Tensor, args: Args, kwargs: Kwargs
) -> Tensor:
    size = plate.size
    if len(indices) == size and not torch.equal(indices, torch.arange(size, device=indices.device)):
        raise ValueError(
            f"{owner}: the subsample of plate {plate.name!r} is all data in another order, and the model's arguments "
            f"may be in that order already. Pass the encoder's arguments with "
            f"inputs=lambda indices, *args, **kwargs: ..."
        )

    def select_rows(value: object) -> object:
        if len(indices) == size or not isinstance(value, Tensor) or value.dim() == 0 or len(value) != size:
            return value
        return value[indices.to(value.device)]

    try:
        return encoder(*map(select_rows, args), **{name: select_rows(value) for name, value in kwargs.items()})
    except TypeError as error:
        raise TypeError(
            f"{owner}: the encoder could not be called with the model's arguments ({error}). Pass its arguments with "
            f"inputs=lambda indices, *args, **kwargs: ..."
        ) from error
