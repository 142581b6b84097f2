"""Functions that make guides, found by name or passed by the caller."""

import difflib
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeAlias

from pyro.infer.autoguide import AutoDiagonalNormal, AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal
from torch import nn

from pyro_flowguides.flows import FLOWS
from pyro_flowguides.guides import AutoFlow
from pyro_flowguides.programs.types import Guide, Model

__all__ = ["GAUSSIANS", "GuideFactory", "GuideSpec", "resolve_guides"]

#: A guide class, or a function that makes a guide for a model.
GuideFactory: TypeAlias = Callable[[Model], Guide]
#: A name or a factory, or a pair of a label and one of them.
GuideSpec: TypeAlias = str | GuideFactory | tuple[str, str | GuideFactory]

#: Pyro's own guides by name.
GAUSSIANS: dict[str, GuideFactory] = {
    "normal": AutoNormal,
    "diagonal": AutoDiagonalNormal,
    "lowrank": AutoLowRankMultivariateNormal,
    "mvn": AutoMultivariateNormal,
}


def resolve_guides(guides: GuideSpec | Iterable[GuideSpec]) -> dict[str, GuideFactory]:
    """Return a factory of guides for each label.

    Raises:
        ValueError: for no guides, an unknown name (the nearest is named) or a label that occurs twice.
        TypeError: for an object that is neither a name nor a factory.
    """
    factories: dict[str, GuideFactory] = {}
    for spec in [guides] if isinstance(guides, str) or not isinstance(guides, Iterable) else guides:
        label, factory = _resolve(spec)
        if label in factories:
            raise ValueError(f"compare: two guides are labeled {label!r}; pass (label, guide) with another label")
        factories[label] = factory
    if not factories:
        raise ValueError(f"compare: no guides given; the known guides are {', '.join([*GAUSSIANS, *FLOWS])}")
    return factories


def _resolve(spec: object) -> tuple[str, GuideFactory]:
    """Return the label and the factory of one guide."""
    if isinstance(spec, tuple) and len(spec) == 2 and isinstance(spec[0], str):
        return spec[0], _factory(spec[1])
    if isinstance(spec, str):
        return spec, _factory(spec)
    factory = _factory(spec)
    inner = factory.func if isinstance(factory, partial) else factory
    return str(getattr(inner, "__name__", type(inner).__name__)), factory


def _factory(spec: object) -> GuideFactory:
    if isinstance(spec, str):
        return _by_name(spec)
    if isinstance(spec, nn.Module) or not callable(spec):
        raise TypeError(
            "compare: every fit needs a guide of its own, so pass a name, a guide class or a function model -> guide, "
            f"not {'the guide' if callable(spec) else 'an object'} of type {type(spec).__name__}"
        )
    return spec


def _by_name(name: str) -> GuideFactory:
    if name in GAUSSIANS:
        return GAUSSIANS[name]
    if name in FLOWS:
        return partial(AutoFlow, flow=name)
    names = [*GAUSSIANS, *FLOWS]
    nearest = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.0)[0]
    raise ValueError(f"compare: unknown guide {name!r}: did you mean {nearest!r}? Known guides: {', '.join(names)}")
