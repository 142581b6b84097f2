"""Fits that leave nothing behind: each has its own parameter store, parameters and random state."""

import copy
import difflib
import inspect
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeAlias, cast

import pyro
import torch
from pyro.nn import PyroModule
from pyro.params.param_store import StateDict
from torch import nn

from pyro_flowguides.diagnostics import Agreement
from pyro_flowguides.diagnostics.psis import resample
from pyro_flowguides.diagnostics.verdict import diagnose_program
from pyro_flowguides.diagnostics.weights import weigh
from pyro_flowguides.inference.fitting import FitResult, fit
from pyro_flowguides.nn.arguments import check_mapping
from pyro_flowguides.programs.running import PYRO_LOCK
from pyro_flowguides.programs.types import Args, Guide, Kwargs, Model, Values

__all__ = [
    "GuideFactory",
    "IsolatedFit",
    "check_factory",
    "check_fit_options",
    "diagnose_again",
    "fit_in_isolation",
    "isolation",
]

#: A guide class, or a function that makes a guide for a model.
GuideFactory: TypeAlias = Callable[[Model], Guide]
Result: TypeAlias = FitResult[Guide]

#: Number of draws that compare independent fits, before and after resampling.
NUM_AGREEMENT_SAMPLES = 4000

KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY

_guide_numbers = itertools.count()


def check_fit_options(owner: str, options: object, reserved: Collection[str]) -> Kwargs:
    """Return options of :func:`~pyro_flowguides.fit` as a dictionary.

    Raises:
        TypeError: for anything but a mapping of options that ``fit`` has; the nearest name is named.
        ValueError: for a reserved option, which differs between fits.
    """
    check_mapping(owner, "fit_options", options)
    options = dict(cast("Mapping[str, object]", options))
    known = [name for name, parameter in inspect.signature(fit).parameters.items() if parameter.kind is KEYWORD_ONLY]
    for name in options:
        if name in reserved:
            raise ValueError(f"{owner}: {name!r} cannot be the same for all fits; leave it out of fit_options")
        if name not in known:
            nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
            raise TypeError(
                f"{owner}: fit has no option {name!r}, did you mean {nearest!r}? Options: {', '.join(known)}"
            )
    return options


def check_factory(owner: str, factory: object) -> GuideFactory:
    """Return a guide class or a function that makes guides.

    Raises:
        TypeError: for a guide, since every fit needs its own, or for an object that cannot be called.
    """
    if isinstance(factory, nn.Module) or not callable(factory):
        raise TypeError(
            f"{owner}: every fit needs a guide of its own, so pass a guide class or a function model -> guide, "
            f"not {'the guide' if callable(factory) else 'an object'} of type {type(factory).__name__}"
        )
    return factory


@dataclass(frozen=True)
class IsolatedFit:
    """A fit that succeeded.

    Attributes:
        result: the result. Its model and guide find their parameters with any parameter store.
        draws: importance-resampled draws; ``None`` where no draw has a positive weight.
    """

    result: Result
    draws: Values | None

    @property
    def elbo(self) -> float:
        """The ELBO, −inf where it is undefined."""
        diagnosis = self.result.diagnosis
        return -math.inf if diagnosis is None or math.isnan(diagnosis.elbo) else diagnosis.elbo


def fit_in_isolation(
    label: str, factory: GuideFactory, model: Model, args: Args, kwargs: Kwargs, options: Kwargs, seed: int
) -> IsolatedFit:
    """Make a guide and fit it; if the model is a module, train a copy of it.

    Raises:
        TypeError: if the factory does not return a guide.
        ValueError: if the fit cannot be diagnosed.
        Exception: anything that the model, the guide or the fit raises.
    """
    with isolation(seed) as store_state:
        own = copy.deepcopy(model) if isinstance(model, nn.Module) else model
        guide = _with_own_names(factory(own), label)
        result = fit(own, guide, *args, seed=seed, progress=False, **options, **kwargs)
        if result.diagnosis is None:
            raise ValueError(result.why_no_verdict)
        weighted = weigh(result.program, NUM_AGREEMENT_SAMPLES)
        has_weight = bool(weighted.log_w.isfinite().any())
        draws = resample(weighted, NUM_AGREEMENT_SAMPLES).draws if has_weight else None
    return IsolatedFit(_with_parameters(result, store_state), draws)


def diagnose_again(fit: IsolatedFit, agreement: Agreement, seed: int) -> IsolatedFit:
    """Diagnose a fit again, with the agreement of independent fits."""
    with isolation(seed):
        diagnosis = diagnose_program(fit.result.program, agreement=agreement)
    return replace(fit, result=replace(fit.result, diagnosis=diagnosis))


@contextmanager
def isolation(seed: int) -> Iterator[StateDict]:
    """Provide a parameter store and a random state for a block; yield the store's state."""
    with PYRO_LOCK, torch.random.fork_rng(devices=[]), pyro.get_param_store().scope() as state:
        torch.manual_seed(seed)
        yield state


def _with_own_names(guide: Guide, label: str) -> Guide:
    """Give a guide names in the parameter store that no other guide has."""
    if not callable(guide):
        raise TypeError(f"the function for {label!r} must return a guide, not {type(guide).__name__}")
    if isinstance(guide, PyroModule) and not guide._pyro_context.used:
        guide._pyro_set_supermodule(f"compare_{next(_guide_numbers)}_{label}", guide._pyro_context)
    return guide


class _WithStore:
    """A model or guide that always runs with a given state of the parameter store."""

    def __init__(self, program: Model, state: StateDict) -> None:
        self.program, self.state = program, state
        self.__name__ = str(getattr(program, "__name__", type(program).__name__))

    def __call__(self, *args: object, **kwargs: object) -> object:
        with pyro.get_param_store().scope(self.state):
            return self.program(*args, **kwargs)


def _with_parameters(result: Result, state: StateDict) -> Result:
    """Tie model and guide to the parameters of the fit, unless all of them belong to modules."""
    program = result.program
    modules = [part for part in (program.model, program.guide) if isinstance(part, PyroModule)]
    owned = {id(parameter) for module in modules for parameter in module.parameters()}
    if all(id(parameter) in owned for parameter in state["params"].values()):
        return result
    model, guide = (
        part if isinstance(part, PyroModule) else _WithStore(part, state) for part in (program.model, program.guide)
    )
    return replace(result, program=replace(program, model=model, guide=guide))
