"""Names for what Pyro leaves open: programs, their arguments, and the sites of their traces."""

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

__all__ = ["Args", "Guide", "Kwargs", "Model", "Site", "Values"]

#: A Pyro model: any callable that makes ``pyro.sample`` statements.
Model: TypeAlias = Callable[..., Any]
#: A Pyro guide for a model.
Guide: TypeAlias = Callable[..., Any]
#: Positional arguments of a model and its guide.
Args: TypeAlias = tuple[Any, ...]
#: Keyword arguments of a model and its guide.
Kwargs: TypeAlias = dict[str, Any]
#: A site of a Pyro trace.
Site: TypeAlias = dict[str, Any]
#: Values of sites by name.
Values: TypeAlias = dict[str, Tensor]
