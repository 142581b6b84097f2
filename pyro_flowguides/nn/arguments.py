"""Checks of arguments, whose messages name the owner, the argument, and the value."""

import math
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import cast

from torch import Tensor

__all__ = [
    "check_callable",
    "check_count",
    "check_mapping",
    "check_number",
    "check_one_of",
    "check_path",
    "check_seed",
    "check_tensor",
    "check_widths",
    "describe",
]

#: Most characters of a value in a message.
MAX_LENGTH = 60


def describe(value: object) -> str:
    """Describe a value in an error message: itself if it is short, and the shape of a tensor.

    Example:
        >>> import torch
        >>> from pyro_flowguides.nn.arguments import describe
        >>> describe("3"), describe(torch.zeros(2, 3))
        ("'3'", 'a tensor of shape (2, 3)')
    """
    if isinstance(value, Tensor):
        return (
            str(value.item()) if value.dim() == 0 and not value.is_meta else f"a tensor of shape {tuple(value.shape)}"
        )
    text = repr(value)
    is_plain = value is None or isinstance(value, (bool, Real, str, list, tuple, dict, type))
    return text if is_plain and len(text) <= MAX_LENGTH else f"an object of type {type(value).__name__}"


def check_count(owner: str, name: str, value: object, minimum: int = 1, maximum: int | None = None) -> int:
    """Return a whole number; refuse any other value.

    Raises:
        TypeError: for another type.
        ValueError: for a number below the minimum or above the maximum.

    Example:
        >>> from pyro_flowguides.nn.arguments import check_count
        >>> check_count("Planar", "input_dim", 2.5)
        Traceback (most recent call last):
        TypeError: Planar: input_dim must be a whole number, got 2.5
    """
    try:
        number = operator.index(cast("int", value))
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be a whole number, got {describe(value)}")
    if maximum is not None and not minimum <= number <= maximum:
        raise ValueError(f"{owner}: {name} must lie in {minimum}..{maximum}, got {number}")
    if number < minimum:
        raise ValueError(f"{owner}: {name} must be at least {minimum}, got {number}")
    return number


def check_number(
    owner: str, name: str, value: object, above: float = -math.inf, below: float = math.inf, *, inclusive: bool = False
) -> float:
    """Return a finite number; refuse any other value.

    Args:
        owner, name: what has the argument, and the argument's name.
        value: the argument.
        above, below: limits.
        inclusive: accept the limits themselves.

    Raises:
        TypeError: for another type.
        ValueError: for a number that is not finite or not between the limits.

    Example:
        >>> from pyro_flowguides.nn.arguments import check_number
        >>> check_number("AutoIAF", "init_scale", -1.0, above=0)
        Traceback (most recent call last):
        ValueError: AutoIAF: init_scale must be positive and finite, got -1.0
    """
    is_number = value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, Real)
    if not is_number or isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be a number, got {describe(value)}")
    number = float(cast("float", value))
    if math.isfinite(number) and (above < number < below or (inclusive and number in (above, below))):
        return number
    if (above, below, inclusive) == (0, math.inf, False):
        limits = "be positive and finite"
    elif above == -math.inf and below == math.inf:
        limits = "be finite"
    elif below == math.inf:
        limits = f"be finite and {'at least' if inclusive else 'above'} {above:g}"
    else:
        limits = f"lie in {'[' if inclusive else '('}{above:g}, {below:g}{']' if inclusive else ')'}"
    raise ValueError(f"{owner}: {name} must {limits}, got {describe(value)}")


def check_seed(owner: str, seed: object) -> int:
    """Return a seed of torch's generators; refuse any other value."""
    return check_count(owner, "seed", seed, -(2**63), 2**64 - 1)


def check_widths(owner: str, name: str, value: object) -> tuple[int, ...]:
    """Return a sequence of whole numbers; refuse any other value.

    Raises:
        TypeError: for a number instead of a sequence, or for entries of another type.

    Example:
        >>> from pyro_flowguides.nn.arguments import check_widths
        >>> check_widths("MLP", "hidden_dims", 64)
        Traceback (most recent call last):
        TypeError: MLP: hidden_dims must be a sequence of whole numbers, such as [64, 64], got 64
    """
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        return tuple(operator.index(width) for width in cast("Iterable[int]", value))
    except TypeError:
        raise TypeError(
            f"{owner}: {name} must be a sequence of whole numbers, such as [64, 64], got {describe(value)}"
        ) from None


def check_callable(owner: str, name: str, value: object, kind: str) -> None:
    """Refuse an argument that cannot be called; ``kind`` describes the functions expected."""
    if not callable(value):
        raise TypeError(f"{owner}: {name} must be {kind}, got {describe(value)}")


def check_mapping(owner: str, name: str, value: object) -> None:
    """Refuse an argument that is not a mapping."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{owner}: {name} must map names to values, got {describe(value)}")


def check_one_of(owner: str, name: str, value: object, known: Sequence[str]) -> None:
    """Refuse a name that is not among the known ones."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{owner}: {name} must be one of {list(known)}, got {describe(value)}")


def check_path(owner: str, name: str, value: object) -> None:
    """Refuse an argument that is not a path."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{owner}: {name} must be a path, got {describe(value)}")
    if not str(value):
        raise ValueError(f"{owner}: {name} must be a path, got an empty one")


def check_tensor(owner: str, name: str, value: object) -> None:
    """Refuse an argument that is not a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{owner}: {name} must be a tensor, got {describe(value)}. Convert it by torch.as_tensor.")
