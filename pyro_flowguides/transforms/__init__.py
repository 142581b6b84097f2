"""Bijections of R^D that give value and log-determinant in one pass, in both directions; one file per family.

Every family of :mod:`~pyro_flowguides.transforms.families` is here as a class, in its conditional form, and as the
Pyro-style helpers of both, such as ``planar`` and ``conditional_planar``: the classes under their names in snake case.
"""

from typing import TYPE_CHECKING

from pyro_flowguides.transforms import families
from pyro_flowguides.transforms.compose import Compose, ConditionalCompose
from pyro_flowguides.transforms.conditional import AmortizedFlow, ConditionalFlow, ContextFlow
from pyro_flowguides.transforms.flow import Flow, with_path_gradient

if TYPE_CHECKING:
    from typing import Any

    def __getattr__(name: str) -> Any:
        """Stand for the families, which type checkers cannot discover."""


__all__ = [
    "AmortizedFlow",
    "Compose",
    "ConditionalCompose",
    "ConditionalFlow",
    "ContextFlow",
    "Flow",
    "with_path_gradient",
]

families.export_to(globals(), __all__)
