"""Automatic mixed precision is for networks: what has to be exact is kept out of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["at_least_float32", "at_least_float32_outside_autocast", "in_own_precision"]

Method = TypeVar("Method", bound=Callable[..., Any])


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor itself, or in single precision if it has less.

    A sum of a thousand log probabilities in bfloat16 is right to whole nats only.

    Example:
        >>> import torch
        >>> from pyro_flowguides.nn.precision import at_least_float32
        >>> at_least_float32(torch.ones(2, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def at_least_float32_outside_autocast(x: Tensor) -> Tensor:
    """The tensor, in at least single precision where autocast is on, which may have shortened it."""
    return at_least_float32(x) if _autocast_is_on(x.device.type) else x


def in_own_precision(method: Method) -> Method:
    """A method of tensors that computes in the precision of its parameters, also where autocast is on.

    In bfloat16 a log-determinant of ten terms is right to a tenth, and matrices cannot be solved for.

    Example:
        >>> import torch
        >>> from pyro_flowguides.nn.precision import in_own_precision
        >>> class Doubling:
        ...     @in_own_precision
        ...     def __call__(self, x):
        ...         return x @ torch.full((1, 1), 2.0)
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     Doubling()(torch.ones(3, 1, dtype=torch.bfloat16)).dtype
        torch.float32
    """

    @functools.wraps(method)
    def exact(self: Any, *tensors: Tensor) -> Any:
        device = tensors[0].device.type
        if not _autocast_is_on(device):
            return method(self, *tensors)
        with torch.autocast(device, enabled=False):
            return method(self, *(at_least_float32(tensor) for tensor in tensors))

    return exact  # type: ignore[return-value]


def _autocast_is_on(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)
