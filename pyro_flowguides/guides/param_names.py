"""The names of one guide's parameters in Pyro's parameter store: distinct from other guides', and loaded values used.

Pyro's store knows parameters by name only. A second guide of a class would therefore share the names of the first and
train its tensors, and a guide created after a file was loaded would ignore the loaded values. So every guide claims its
names before use. A name is available to it if it is free, already its own, or that of a guide that no longer exists; or
if it holds a loaded value, which belongs to no guide and is copied into the guide that claims it. Guides that a process
uses one after the other thus share their names, and the store does not grow.
"""

import re
import weakref
from collections.abc import MutableMapping
from itertools import count
from typing import Protocol, cast

import pyro
from pyro.params.param_store import param_with_module_name
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["NamedInStore", "Owner", "claim_names", "drop_references", "registered_name"]


class Owner:
    """The identity of a guide that owns parameters; a copy or an unpickled guide is another owner."""


#: The owner of every parameter that a guide has claimed a name for; loaded ones have none.
_owners: MutableMapping[Tensor, weakref.ReferenceType[Owner]] = WeakTensorKeyDictionary()


class NamedInStore(Protocol):
    """Anything with a name in Pyro's store and submodules, such as a PyroModule."""

    _pyro_name: str
    _modules: dict[str, nn.Module | None]


def claim_names(guide: NamedInStore, attribute: str, owner: Owner) -> None:
    """Claim names in the store for the parameters of ``guide.<attribute>``, and copy loaded values into them."""
    if pyro.settings.get("module_local_params"):
        return
    store = pyro.get_param_store()._params
    module = cast("nn.Module", guide._modules[attribute])
    parameters = dict(module.named_parameters())
    if all(store.get(_full_name(guide._pyro_name, attribute, name)) is p for name, p in parameters.items()):
        return
    guide._pyro_name = _choose_name(guide._pyro_name, attribute, owner)
    prefix = _full_name(guide._pyro_name, attribute, "")
    for full_name in [key for key, parameter in store.items() if key.startswith(prefix) and _is_abandoned(parameter)]:
        del pyro.get_param_store()[full_name]
    for name, parameter in parameters.items():
        _owners[parameter] = weakref.ref(owner)
        _take_entry(_full_name(guide._pyro_name, attribute, name), parameter)


def registered_name(parameter: Tensor) -> str | None:
    """Return the name under which this very tensor is in Pyro's store, ``None`` if it is not there."""
    store = pyro.get_param_store()
    name: str | None = store.param_name(parameter)
    return name if name is not None and store._params.get(name) is parameter else None


def drop_references(module: nn.Module) -> None:
    """Drop the weak references that Pyro's store leaves on the parameters: they cannot be pickled."""
    for parameter in module.parameters():
        parameter.__dict__.pop("unconstrained", None)


def _full_name(guide_name: str, attribute: str, name: str) -> str:
    return param_with_module_name(f"{guide_name}.{attribute}", name)


def _choose_name(name: str, attribute: str, owner: Owner) -> str:
    """Return the name itself if no other guide has it, else the first numbered one that was loaded or is free."""
    stem = re.sub(r"_\d+$", "", name)
    pattern = re.compile(rf"({re.escape(stem)}(?:_\d+)?)\.{attribute}\$\$\$")
    matches = ((pattern.match(key), parameter) for key, parameter in pyro.get_param_store()._params.items())
    taken = {match[1]: parameter for match, parameter in matches if match}
    loaded = [other for other, parameter in taken.items() if parameter not in _owners]
    free = {other for other, parameter in taken.items() if _is_abandoned(parameter)}
    if name not in taken or name in loaded or name in free or _owners[taken[name]]() is owner:
        return name
    return loaded[0] if loaded else next(f"{stem}_{i}" for i in count(2) if f"{stem}_{i}" not in taken.keys() - free)


def _is_abandoned(parameter: Tensor) -> bool:
    """Tell whether a parameter belongs to a guide that no longer exists."""
    return parameter in _owners and _owners[parameter]() is None


def _take_entry(full_name: str, parameter: Tensor) -> None:
    """Remove the entry of this name from the store, after copying its value into the parameter if it was loaded."""
    store = pyro.get_param_store()
    value = store._params.get(full_name, parameter)
    if value is parameter:
        return
    if value.shape != parameter.shape:
        raise ValueError(
            f"the parameter store holds {full_name!r} with shape {tuple(value.shape)}, the guide needs "
            f"{tuple(parameter.shape)}: it was saved by a guide of another model or with other options. Build the "
            f"guide as it was built then, or call pyro.clear_param_store()."
        )
    if value not in _owners:
        parameter.data.copy_(value.data)
    del store[full_name]
