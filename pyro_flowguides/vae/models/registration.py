"""A module's parameters in Pyro's store, under names that no other module has."""

from __future__ import annotations

from typing import Any, cast

import pyro
from pyro.params.param_store import param_with_module_name
from torch import nn

from pyro_flowguides.guides.param_names import Owner, bind

__all__ = ["Registration"]

_ATTRIBUTE = "vae"


class Registration:
    """What :func:`pyro.module` does, for several modules of one class, copies, frozen parameters, loaded stores.

    Args:
        module: whose parameters are registered by :meth:`__call__`, within a Pyro program.
    """

    def __init__(self, module: nn.Module) -> None:
        self._pyro_name = type(module).__name__
        self._modules = {_ATTRIBUTE: module}
        self._token = Owner()

    def __call__(self) -> None:
        with pyro.settings.context(module_local_params=False):  # the programs of a plain module use the global store
            bind(cast("Any", self), _ATTRIBUTE, self._token)
        for name, parameter in self._modules[_ATTRIBUTE].named_parameters():
            if parameter.requires_grad:
                pyro.param(param_with_module_name(f"{self._pyro_name}.{_ATTRIBUTE}", name), parameter)
