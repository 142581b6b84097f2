"""``compare``: several guides on one model, each fitted more than once, side by side."""

from __future__ import annotations

import copy
import difflib
import importlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import pyro
import torch
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from pyro.nn import PyroModule
from torch import Tensor, nn
from tqdm import tqdm

from pyro_flowguides.diagnostics import (
    Agreement,
    Diagnosis,
    agreement,
    diagnose,
    importance_resample,
)
from pyro_flowguides.flows import FLOWS
from pyro_flowguides.guides import AutoFlow
from pyro_flowguides.inference.fitting import FitResult, fit

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["Comparison", "compare"]

Factory: TypeAlias = Callable[[Callable[..., Any]], Callable[..., Any]]
GuideSpec: TypeAlias = str | Factory | tuple[str, Factory]

#: Pyro's own guides, by the names that :func:`compare` knows them under.
GAUSSIANS: dict[str, Factory] = {
    "normal": AutoNormal,
    "diagonal": AutoDiagonalNormal,
    "lowrank": AutoLowRankMultivariateNormal,
    "mvn": AutoMultivariateNormal,
}
#: What is compared when nothing is asked for.
DEFAULT_GUIDES = ("normal", "mvn", "planar", "sylvester", "iaf")
#: Draws from which independent fits are compared, before and after resampling.
AGREEMENT_DRAWS = 4000
#: Options of ``fit`` that would be the same for fits that must differ.
RESERVED = ("seed", "checkpoint", "progress")

_FAILED = "failed"
_COLORS = {"good": "tab:green", "usable with importance resampling": "tab:orange", "do not trust": "tab:red"}
_numbers = itertools.count()


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` returns; print it, or look at ``table``.

    Attributes:
        table: one row per guide, best first: ``guide``, ``elbo``, ``elbo_se``, ``khat``, ``ess_fraction``,
            ``agreement`` (largest difference between the fits of this guide, in posterior sd or log sd; NaN if there
            was only one), ``seconds`` and ``steps`` of the better fit, ``verdict`` and ``error``. Guides of which no
            fit succeeded come last, with the verdict ``"failed"``.
        results: label -> the better of the fits; guides that failed are absent.
        repeats: number of independent fits per guide.
    """

    table: pd.DataFrame = field(repr=False)
    results: dict[str, FitResult] = field(repr=False)
    repeats: int

    @property
    def best(self) -> FitResult:
        """The fit with the highest ELBO.

        Raises:
            RuntimeError: if every fit failed.
        """
        if not self.results:
            raise RuntimeError(f"compare: every fit failed\n{self}")
        return self.results[self.table["guide"][0]]

    def plot(self, ax: Axes | None = None) -> Axes:
        """The ELBO of each guide with its standard error, best on top, colored by verdict.

        Args:
            ax: where to draw; a new figure, which does not belong to pyplot, if not given.
        """
        ax = _new_axes(len(self.table)) if ax is None else ax
        shown = [row for row in self._rows() if math.isfinite(row["elbo"])]
        for verdict, color in _COLORS.items():
            here = [(place, row) for place, row in enumerate(shown) if row["verdict"] == verdict]
            if here:
                places, rows = zip(*here, strict=True)
                elbos, errors = [row["elbo"] for row in rows], [row["elbo_se"] for row in rows]
                ax.errorbar(elbos, places, xerr=errors, fmt="o", capsize=3, color=color, label=verdict)
        ax.set_yticks(range(len(shown)), [row["guide"] for row in shown])
        ax.invert_yaxis()
        ax.set_xlabel("ELBO (nats)")
        if shown:
            ax.legend(fontsize="small")
        return ax

    def __str__(self) -> str:
        header = ["guide", "ELBO", "k-hat", "ESS", "agreement", "time", "steps", "verdict"]
        rows = self._rows()
        cells = [header] + [_cells(row) for row in rows if row["verdict"] != _FAILED]
        widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
        widths[0] = max(len(row["guide"]) for row in rows)
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
        for row in rows:
            if row["error"]:
                lines.append(f"{row['guide'].ljust(widths[0])}  {row['error']}")
        return "\n".join(line.rstrip() for line in lines)

    def _rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.table.to_dict("records")
        return rows


def compare(
    model: Callable[..., Any],
    *args: Any,
    guides: Sequence[GuideSpec] = DEFAULT_GUIDES,
    repeats: int = 2,
    fit_options: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: bool = True,
    **kwargs: Any,
) -> Comparison:
    r"""Fit several guides to one model, each more than once, and rank them by ELBO.

    For data x, the ELBO of every guide bounds the same evidence,

    .. math:: \log p(x) = \text{ELBO}(q) + \text{KL}(q \,\|\, p(\cdot \mid x)),

    so a difference of ELBOs is a difference of divergences, in nats. The independent fits of a guide have different
    seeds; the differences between their importance-resampled draws enter the verdict on the better one, because a fit
    that has lost a mode cannot see it in its own weights. Each fit has a parameter store, parameters and a random state
    of its own: nothing of the caller's is changed, and what ``results`` holds can be used side by side. A guide that
    fails is listed with its error.

    Args:
        model: a Pyro model. If it is a module, each fit trains a copy of its parameters.
        *args: the model's arguments.
        guides: any of the names in :data:`~pyro_flowguides.flows.FLOWS`, ``"normal"``, ``"diagonal"``, ``"lowrank"``
            and ``"mvn"`` (Pyro's ``AutoNormal``, ``AutoDiagonalNormal``, ``AutoLowRankMultivariateNormal`` and
            ``AutoMultivariateNormal``); a guide class or any function ``model -> guide``; or ``(label, function)``.
        repeats: independent fits per guide; one leaves the agreement unchecked.
        fit_options: options of :func:`~pyro_flowguides.fit` for all fits, such as ``steps``.
        seed: of everything random; the global generator is restored afterwards.
        progress: show a progress bar over the fits.
        **kwargs: the model's keyword arguments.

    Returns:
        a :class:`Comparison`; print it.

    Raises:
        ValueError: for no guides, an unknown name (the nearest is named), a label that occurs twice, ``repeats``
            below 1, or a ``seed``, ``checkpoint`` or ``progress`` in ``fit_options``.
        TypeError: for a guide that has been made already: every fit needs its own.

    Cost:
        ``len(guides) * repeats`` fits, and one more diagnosis per guide.

    References:
        Y. Yao, A. Vehtari, D. Simpson, A. Gelman (2018). Yes, but did it work? Evaluating variational inference.
        arXiv:1802.02538. A. Agrawal, D. Sheldon, J. Domke (2020). Advances in black-box VI. arXiv:2006.10343, on
        independent runs.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        ...     pyro.sample("x", dist.Normal(z.sum(-1), 0.3), obs=torch.tensor(1.0))
        >>> options = {"steps": 60}
        >>> found = compare(model, guides=["diagonal", "planar"], repeats=1, fit_options=options, progress=False)
        >>> list(found.table["guide"])  # the posterior is correlated
        ['planar', 'diagonal']
    """
    factories = _resolve(guides)
    options = dict(fit_options or {})
    _check(repeats, options)
    found: list[_Found] = []
    with tqdm(total=len(factories) * repeats, disable=not progress, leave=False) as bar:
        for label, factory in factories.items():
            bar.set_description(label)
            attempts = []
            for repeat in range(repeats):
                attempts.append(_attempt(label, factory, model, args, kwargs, options, seed + repeat))
                bar.update()
            found.append(_judge(label, attempts, seed))
    found.sort(key=_Found.order)
    return Comparison(_table(found), {one.label: one.fit.result for one in found if one.fit is not None}, repeats)


# -- which guides ------------------------------------------------------------------------------------------------------


def _check(repeats: int, options: Mapping[str, Any]) -> None:
    if repeats < 1:
        raise ValueError(f"compare: repeats must be at least 1, got {repeats}")
    for name in RESERVED:
        if name in options:
            raise ValueError(f"compare: {name!r} cannot be the same for all fits; leave it out of fit_options")


def _resolve(guides: Iterable[GuideSpec]) -> dict[str, Factory]:
    """label -> what makes a guide."""
    factories: dict[str, Factory] = {}
    for spec in [guides] if isinstance(guides, str) else guides:
        label, factory = _labeled(spec)
        if label in factories:
            raise ValueError(f"compare: two guides are labeled {label!r}; give (label, guide) to tell them apart")
        factories[label] = factory
    if not factories:
        raise ValueError(f"compare: no guides given; there are {', '.join([*GAUSSIANS, *FLOWS])}")
    return factories


def _labeled(spec: Any) -> tuple[str, Factory]:
    if isinstance(spec, str):
        return spec, _by_name(spec)
    if isinstance(spec, tuple) and len(spec) == 2 and isinstance(spec[0], str):
        label, factory = spec
        return label, _by_name(factory) if isinstance(factory, str) else _checked(factory)
    factory = _checked(spec)
    inner = factory.func if isinstance(factory, partial) else factory
    return str(getattr(inner, "__name__", type(inner).__name__)), factory


def _by_name(name: str) -> Factory:
    if name in GAUSSIANS:
        return GAUSSIANS[name]
    if name in FLOWS:
        return partial(AutoFlow, flow=name)
    known = [*GAUSSIANS, *FLOWS]
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.0)[0]
    raise ValueError(f"compare: unknown guide {name!r}: did you mean {near!r}? Known guides: {', '.join(known)}")


def _checked(factory: Any) -> Factory:
    if isinstance(factory, nn.Module) or not callable(factory):
        raise TypeError(
            f"compare: every fit needs a guide of its own, so give a name, a guide class or a function model -> guide, "
            f"not {'the guide' if callable(factory) else 'an object'} of type {type(factory).__name__}"
        )
    made: Factory = factory
    return made


# -- one fit -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Fit:
    """One fit that succeeded: its result, its verdict and resampled draws, if its weights allow any."""

    result: FitResult
    diagnosis: Diagnosis
    draws: dict[str, Tensor] | None

    @property
    def elbo(self) -> float:
        """The ELBO, −inf where it is undefined."""
        return -math.inf if math.isnan(self.diagnosis.elbo) else self.diagnosis.elbo


class _Kept:
    """A model or guide whose parameters live in a parameter store that is kept aside."""

    def __init__(self, program: Callable[..., Any], state: Any) -> None:
        self.program, self.state = program, state
        self.__name__ = str(getattr(program, "__name__", type(program).__name__))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with pyro.get_param_store().scope(self.state):
            return self.program(*args, **kwargs)


@contextmanager
def _isolated(seed: int) -> Iterator[Any]:
    """A parameter store and a random state that end with the block; yields the store's state, full afterwards."""
    with torch.random.fork_rng(devices=[]), pyro.get_param_store().scope() as state:
        torch.manual_seed(seed)
        yield state


def _attempt(
    label: str,
    factory: Factory,
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: Mapping[str, Any],
    seed: int,
) -> _Fit | str:
    """Fit once; a string says what went wrong."""
    try:
        with _isolated(seed) as state:
            own = copy.deepcopy(model) if isinstance(model, nn.Module) else model
            guide = _rename(factory(own), label)
            result = fit(own, guide, *args, seed=seed, progress=False, **options, **kwargs)
            if result.diagnosis is None:
                return f"cannot be judged: {result.why_no_verdict}"
            draws = _resampled(result)
        return _Fit(_keep(result, state), result.diagnosis, draws)
    except Exception as error:  # whatever a program raises: the other guides are to be seen all the same
        return _describe(error)


def _rename(guide: Any, label: str) -> Callable[..., Any]:
    """Give a guide names in the parameter store that no other guide has."""
    if not callable(guide):
        raise TypeError(f"the function for {label!r} must return a guide, not {type(guide).__name__}")
    if isinstance(guide, PyroModule) and not guide._pyro_context.used:
        guide._pyro_set_supermodule(f"compare_{next(_numbers)}_{label}", guide._pyro_context)
    made: Callable[..., Any] = guide
    return made


def _keep(result: FitResult, state: Any) -> FitResult:
    """The result with model and guide tied to the parameters that are not their own modules' attributes."""
    modules = [program for program in (result.model, result.guide) if isinstance(program, PyroModule)]
    owned = {id(parameter) for module in modules for parameter in module.parameters()}
    if all(id(parameter) in owned for parameter in state["params"].values()):
        return result
    model, guide = (
        program if isinstance(program, PyroModule) else _Kept(program, state)
        for program in (result.model, result.guide)
    )
    return replace(result, program=replace(result.program, model=model, guide=guide))


def _resampled(result: FitResult) -> dict[str, Tensor] | None:
    """Draws to compare with those of other fits; ``None`` where the weights allow none."""
    resampled = partial(importance_resample, num_samples=AGREEMENT_DRAWS, num_proposals=AGREEMENT_DRAWS)
    try:
        return resampled(result.model, result.guide, *result.args, **result.kwargs)
    except ValueError:  # no draw has a positive weight: the diagnosis says so
        return None


def _describe(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# -- all fits of one guide ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """The better fit of one guide, judged together with the others; ``None`` if all failed."""

    label: str
    fit: _Fit | None
    error: str

    def order(self) -> tuple[bool, float]:
        """Sorts the best first and failures last."""
        return self.fit is None, 0.0 if self.fit is None else -self.fit.elbo


def _judge(label: str, attempts: Sequence[_Fit | str], seed: int) -> _Found:
    """Choose the better fit and judge it again with the agreement of all."""
    fits = [one for one in attempts if isinstance(one, _Fit)]
    errors = [one for one in attempts if isinstance(one, str)]
    if not fits:
        return _Found(label, None, f"failed: {errors[0]}")
    note = f"{len(errors)} of {len(attempts)} fits failed: {errors[0]}" if errors else ""
    best = max(fits, key=lambda one: one.elbo)
    draws = [one.draws for one in fits if one.draws is not None]
    if len(draws) > 1:
        best = _judge_again(best, agreement(*draws), seed)
    return _Found(label, best, note)


def _judge_again(best: _Fit, agreed: Agreement, seed: int) -> _Fit:
    result = best.result
    with _isolated(seed):
        diagnosis = diagnose(result.model, result.guide, *result.args, agreement=agreed, **result.kwargs)
    return _Fit(replace(result, diagnosis=diagnosis), diagnosis, best.draws)


# -- the table ---------------------------------------------------------------------------------------------------------


def _table(found: Sequence[_Found]) -> pd.DataFrame:
    frame: pd.DataFrame = importlib.import_module("pandas").DataFrame([_row(one) for one in found])
    return frame.astype({"steps": "Int64"})


def _row(one: _Found) -> dict[str, Any]:
    if one.fit is None:
        numbers = dict.fromkeys(("elbo", "elbo_se", "khat", "ess_fraction", "agreement", "seconds"), math.nan)
        return {"guide": one.label, **numbers, "steps": None, "verdict": _FAILED, "error": one.error}
    result, diagnosis = one.fit.result, one.fit.diagnosis
    return {
        "guide": one.label,
        "elbo": diagnosis.elbo,
        "elbo_se": diagnosis.elbo_se,
        "khat": diagnosis.khat,
        "ess_fraction": diagnosis.ess_fraction,
        "agreement": math.nan if diagnosis.agreement is None else diagnosis.agreement.worst_difference,
        "seconds": result.seconds,
        "steps": result.steps,
        "verdict": diagnosis.verdict,
        "error": one.error,
    }


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        row["guide"],
        f"{row['elbo']:.2f} ± {row['elbo_se']:.2f}",
        f"{row['khat']:.2f}",
        f"{100 * row['ess_fraction']:.0f} %",
        "-" if math.isnan(row["agreement"]) else f"{row['agreement']:.2f}",
        f"{row['seconds']:.1f} s",
        str(row["steps"]),
        row["verdict"],
    ]


def _new_axes(rows: int) -> Axes:
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(7, 1 + 0.4 * rows), layout="constrained")
    axes: Axes = figure.subplots()
    return axes
