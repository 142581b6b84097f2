"""Keep exact computations out of automatic mixed precision, which is meant for networks."""

import functools
from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import Tensor

__all__ = ["at_least_float32", "in_own_precision"]

Method = TypeVar("Method", bound=Callable[..., object])


def at_least_float32(x: Tensor) -> Tensor:
    """Convert a half-precision tensor to float32; return any other as it is.

    In bfloat16 a sum of a thousand log probabilities is accurate to whole nats only.

    Example:
        >>> import torch
        >>> from pyro_flowguides.nn.precision import at_least_float32
        >>> at_least_float32(torch.ones(2, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def in_own_precision(method: Method) -> Method:
    """Make a method of tensors compute in the precision of its parameters, also under autocast.

    Autocast is switched off inside, and tensors that it has shortened to half precision come in as float32. In bfloat16
    a log-determinant of ten terms is accurate to a tenth, and linear systems cannot be solved.

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
    def exact(self: object, *tensors: Tensor, **options: object) -> object:
        device = tensors[0].device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return method(self, *tensors, **options)
        with torch.autocast(device, enabled=False):
            return method(self, *map(at_least_float32, tensors), **options)

    return cast("Method", exact)
