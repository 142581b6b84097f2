"""A module's parameters in Pyro's parameter store, under names that no other module has."""

from __future__ import annotations

from typing import cast

import pyro
from pyro.nn.module import PyroModule
from pyro.params.param_store import param_with_module_name
from torch import nn

from pyro_flowguides.guides.param_names import Owner, claim_names

__all__ = ["StoreRegistration"]

ATTRIBUTE = "vae"


class StoreRegistration:
    """Register the parameters of a module in Pyro's parameter store, like :func:`pyro.module`.

    Unlike there, several modules of one class and copies of a module have parameters of their own, frozen parameters
    are left out, and values of a loaded store are copied into the module.

    Args:
        module: the module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._pyro_name = type(module).__name__
        self._modules = {ATTRIBUTE: module}
        self._owner = Owner()

    def __call__(self) -> None:
        """Register the parameters; to be called within a Pyro program."""
        with pyro.settings.context(module_local_params=False):  # only a PyroModule has a store of its own
            claim_names(cast("PyroModule", self), ATTRIBUTE, self._owner)
        for name, parameter in self._modules[ATTRIBUTE].named_parameters():
            if parameter.requires_grad:
                pyro.param(param_with_module_name(f"{self._pyro_name}.{ATTRIBUTE}", name), parameter)
