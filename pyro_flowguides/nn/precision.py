"""Keep exact computations out of automatic mixed precision, and say which tensors do not fit together."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from pyro_flowguides.nn.arguments import check_tensor

__all__ = ["at_least_float32", "explain_mismatch", "in_own_precision"]

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

    Where torch refuses the tensors, an error names those whose types, devices or batch shapes differ.

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

    names = list(inspect.signature(method).parameters)[1:]

    @functools.wraps(method)
    def exact(self: object, *tensors: Tensor, **options: object) -> object:
        if not tensors and names[0] in options:
            tensors = (cast("Tensor", options.pop(names[0])),)
        for name, value in zip(names, tensors, strict=False):
            if not isinstance(value, Tensor):
                check_tensor(_name(self), name, value)
        try:
            device = tensors[0].device.type if tensors else "meta"
            if device == "meta" or not torch.is_autocast_enabled(device):
                return method(self, *tensors, **options)
            with torch.autocast(device, enabled=False):
                return method(self, *map(at_least_float32, tensors), **options)
        except RuntimeError as error:
            explain_mismatch(self, dict(zip(names, tensors, strict=False)), error)
            raise

    return cast("Method", exact)


def _name(owner: object) -> str:
    """Return the name of a class for messages; a conditioned flow has the name of the conditional one."""
    return type(getattr(owner, "source", owner)).__name__


def explain_mismatch(owner: object, tensors: Mapping[str, Tensor], error: RuntimeError) -> None:
    """Raise an error that says which tensors do not fit together, if that is the cause of torch's error."""
    context = {"context": owner.get_buffer("context")} if hasattr(owner, "source") else {}  # type: ignore[attr-defined]
    tensors = {**tensors, **context}
    parameter = next(owner.parameters(), None) if isinstance(owner, nn.Module) else None
    compared = tensors if parameter is None else {"parameters": parameter, **tensors}
    types = {name: f"{value.dtype} on {value.device}" for name, value in compared.items()}
    if len(set(types.values())) > 1:
        listed = ", ".join(f"{name} {kind}" for name, kind in types.items())
        raise TypeError(
            f"{_name(owner)}: types or devices differ: {listed}. Convert the tensors or the module by .to(...)."
        ) from error
    try:
        torch.broadcast_shapes(*(value.shape[:-1] for value in tensors.values()))
    except RuntimeError:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in tensors.items())
        raise ValueError(
            f"{_name(owner)}: the batch shapes (all but the last dimension) do not broadcast: {shapes}"
        ) from error
