"""One guide's parameters in Pyro's parameter store: no clash with another guide, and everything loaded is used.

Pyro's store knows parameters by name only. A second guide of a class would therefore share the names of the first and
train the first one's tensors; and values loaded from a file would be ignored by a guide that comes later. So before a
guide is used, its names are settled here: they are its own, or free, or hold values that nobody owns (loaded ones),
which are copied into the guide.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import cast

import pyro
from pyro.nn.module import PyroModule
from pyro.params.param_store import param_with_module_name
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["Owner", "bind", "drop_references", "registered_name"]


class Owner:
    """Who owns a parameter; a copy or an unpickled guide is another owner."""


_owners = WeakTensorKeyDictionary()


def bind(guide: PyroModule, attribute: str, token: Owner) -> None:
    """Settle the store's names for the parameters of ``guide.<attribute>``; copy loaded values into them.

    Raises:
        ValueError: if a loaded value has another shape than the parameter.
    """
    if pyro.settings.get("module_local_params"):
        return
    store = pyro.get_param_store()._params
    module = cast("nn.Module", guide._modules[attribute])
    parameters = dict(module.named_parameters())
    if all(store.get(_full(guide._pyro_name, attribute, name)) is p for name, p in parameters.items()):
        return
    guide._pyro_name = _settle(guide._pyro_name, attribute, token)
    for name, parameter in parameters.items():
        _owners[parameter] = token
        _adopt(_full(guide._pyro_name, attribute, name), parameter)


def registered_name(parameter: Tensor) -> str | None:
    """The name under which this very tensor is in Pyro's store, if it is."""
    store = pyro.get_param_store()
    name: str | None = store.param_name(parameter)
    return name if name is not None and store._params.get(name) is parameter else None


def drop_references(module: nn.Module) -> None:
    """Drop the weak references that Pyro's store leaves on the parameters: they cannot be pickled."""
    for parameter in module.parameters():
        parameter.__dict__.pop("unconstrained", None)


def _full(owner: str, attribute: str, name: str) -> str:
    return param_with_module_name(f"{owner}.{attribute}", name)


def _settle(name: str, attribute: str, token: Owner) -> str:
    """The name itself if no other guide has it; else the first of its numbered siblings that was loaded or is free."""
    taken = dict(_owners_by_name(name, attribute))
    free = next(sibling for sibling in _siblings(name) if sibling not in taken)
    loaded = [sibling for sibling, owner in taken.items() if owner is None]
    if taken.get(name, token) is token or name in loaded:
        return name
    return loaded[0] if loaded else free


def _siblings(name: str) -> Iterator[str]:
    yield name
    stem = re.sub(r"_\d+$", "", name)
    number = 2
    while True:
        yield f"{stem}_{number}"
        number += 1


def _owners_by_name(name: str, attribute: str) -> Iterator[tuple[str, Owner | None]]:
    """Names like this one in the store, with the owner of their parameters, ``None`` for loaded values."""
    stem = re.sub(r"_\d+$", "", name)
    pattern = re.compile(rf"({re.escape(stem)}(?:_\d+)?)\.{attribute}\$\$\$")
    for full, parameter in pyro.get_param_store()._params.items():
        match = pattern.match(full)
        if match:
            yield match[1], _owners.get(parameter)


def _adopt(full: str, parameter: Tensor) -> None:
    """Make the store's entry, if it has one, this very parameter, with the entry's value."""
    store = pyro.get_param_store()
    if full not in store:
        return
    value = store._params[full]
    if value is parameter:
        return
    if value.shape != parameter.shape:
        raise ValueError(
            f"the parameter store holds {full!r} with shape {tuple(value.shape)}, the guide needs "
            f"{tuple(parameter.shape)}: it was saved by a guide of another model or other options. Build the guide as "
            f"it was built then, or call pyro.clear_param_store()."
        )
    if _owners.get(value) is None:
        parameter.data.copy_(value.data)
    del store[full]
