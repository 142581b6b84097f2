"""One file per family of flows.

A new family is a new file here: a class, its conditional form, and both in ``__all__``.
"""

import importlib
import pkgutil
import re
from collections.abc import Iterator

__all__ = ["export_to"]


def export_to(namespace: dict[str, object], names: list[str]) -> None:
    """Add all families to a package: everything in their modules' ``__all__``, and a helper for every class.

    A helper is the class under its name in snake case, unless the module defines one of that name.

    Args:
        namespace: the package's globals.
        names: the package's ``__all__``, which is extended and sorted.
    """
    exported = dict(_discover())
    helpers = {_snake_case(name): value for name, value in exported.items() if isinstance(value, type)}
    exported = {**helpers, **exported}
    namespace.update(exported)
    names[:] = sorted({*names, *exported})


def _discover() -> Iterator[tuple[str, object]]:
    for found in pkgutil.iter_modules(__path__, f"{__name__}."):
        module = importlib.import_module(found.name)
        yield from ((name, getattr(module, name)) for name in module.__all__)


def _snake_case(name: str) -> str:
    """Convert the name of a class, for example ``LULinear`` to ``lu_linear``."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
