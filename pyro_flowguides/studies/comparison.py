"""``compare``: several guides on one model, each fitted more than once, as a table, a plot and a text."""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, TypeAlias

from pyro.infer.autoguide import AutoDiagonalNormal, AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal
from tqdm import tqdm

from pyro_flowguides.diagnostics import agreement
from pyro_flowguides.diagnostics.plots import new_figure
from pyro_flowguides.flows import FLOWS
from pyro_flowguides.guides import AutoFlow
from pyro_flowguides.inference.fitting import FitResult
from pyro_flowguides.nn.arguments import check_callable, check_count, check_seed
from pyro_flowguides.programs.batched_run import first_line
from pyro_flowguides.programs.types import Guide, Kwargs, Model
from pyro_flowguides.studies.isolated_fits import (
    GuideFactory,
    IsolatedFit,
    check_factory,
    check_fit_options,
    diagnose_again,
    fit_in_isolation,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["Comparison", "compare"]

#: A name or a factory, or a pair of a label and one of them.
GuideSpec: TypeAlias = str | GuideFactory | tuple[str, str | GuideFactory]

#: Pyro's own guides by name.
GAUSSIANS: dict[str, GuideFactory] = {
    "normal": AutoNormal,
    "diagonal": AutoDiagonalNormal,
    "lowrank": AutoLowRankMultivariateNormal,
    "mvn": AutoMultivariateNormal,
}
#: Guides to compare by default.
DEFAULT_GUIDES = ("normal", "mvn", "planar", "sylvester", "iaf")
#: Options of ``fit`` that must differ between fits or that ``compare`` sets itself.
RESERVED_OPTIONS = ("seed", "checkpoint", "progress")

_FAILED = "failed"
_COLORS = {"good": "tab:green", "usable with importance resampling": "tab:orange", "do not trust": "tab:red"}
_HEADER = ("guide", "ELBO", "k-hat", "ESS", "agreement", "time", "steps", "verdict")


def compare(
    model: Model,
    *args: object,
    guides: Sequence[GuideSpec] = DEFAULT_GUIDES,
    repeats: int = 2,
    fit_options: Kwargs | None = None,
    seed: int = 0,
    progress: bool = True,
    **kwargs: object,
) -> Comparison:
    r"""Fit several guides to one model, each more than once, and rank them by ELBO.

    For data x, the ELBO of every guide bounds the same evidence,

    .. math:: \log p(x) = \text{ELBO}(q) + \text{KL}(q \,\|\, p(\cdot \mid x)),

    so a difference of ELBOs is a difference of divergences, in nats. The independent fits of a guide have different
    seeds. The differences between their importance-resampled draws enter the verdict on the better one, because a fit
    that has lost a mode cannot see that in its own weights. Each fit has its own parameter store, parameters and random
    state, so that nothing outside changes and all results can be used side by side. The table lists the error of a
    guide that fails.

    Args:
        model: a Pyro model. If it is a module, each fit trains a copy of its parameters.
        *args, **kwargs: the model's arguments.
        guides: any of the names in :data:`~pyro_flowguides.flows.FLOWS`, ``"normal"``, ``"diagonal"``, ``"lowrank"``
            and ``"mvn"`` (Pyro's ``AutoNormal``, ``AutoDiagonalNormal``, ``AutoLowRankMultivariateNormal`` and
            ``AutoMultivariateNormal``); a guide class or any function ``model -> guide``; or ``(label, function)``.
        repeats: independent fits per guide; one leaves the agreement unchecked.
        fit_options: options of :func:`~pyro_flowguides.fit` for all fits, such as ``steps``.
        seed: seed of everything random; the global generator is restored afterwards.
        progress: show a progress bar over the fits.

    Returns:
        a :class:`Comparison`; print it.

    Raises:
        ValueError: for no guides, an unknown name (the nearest is named), a label that occurs twice, ``repeats``
            below 1, or a ``seed``, ``checkpoint`` or ``progress`` in ``fit_options``.
        TypeError: for a guide instead of a function that makes one, since every fit needs its own guide; for an option
            that ``fit`` does not have.

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
        >>> comparison = compare(model, guides=["diagonal", "planar"], repeats=1, fit_options=options, progress=False)
        >>> list(comparison.table["guide"])  # the posterior is correlated
        ['planar', 'diagonal']
    """
    check_callable("compare", "model", model, "a Pyro model, a function that calls pyro.sample")
    repeats, seed = check_count("compare", "repeats", repeats), check_seed("compare", seed)
    factories = resolve_guides(guides)
    options = check_fit_options("compare", fit_options or {}, RESERVED_OPTIONS)
    best_fits: dict[str, IsolatedFit] = {}
    errors: dict[str, str] = {}
    with tqdm(total=len(factories) * repeats, disable=not progress, leave=False) as bar:
        for label, factory in factories.items():
            bar.set_description(label)
            fits, messages = [], []
            for repeat in range(repeats):
                try:
                    fits.append(fit_in_isolation(label, factory, model, args, kwargs, options, seed + repeat))
                except Exception as error:  # a program may raise anything; the other fits still count
                    messages.append(first_line(error))
                bar.update()
            if fits:
                best_fits[label] = _best(fits, seed)
            if messages:
                count = f"{len(messages)} of {repeats} fits failed" if fits else "failed"
                errors[label] = f"{count}: {messages[0]}"
    labels = sorted(best_fits, key=lambda label: -best_fits[label].elbo)
    return Comparison({label: best_fits[label].result for label in labels}, repeats, errors)


def _best(fits: Sequence[IsolatedFit], seed: int) -> IsolatedFit:
    """Choose the fit with the highest ELBO, and diagnose it again with the agreement of all fits."""
    best = max(fits, key=lambda fit: fit.elbo)
    draws = [fit.draws for fit in fits if fit.draws is not None]
    return diagnose_again(best, agreement(*draws), seed) if len(draws) > 1 else best


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
    return _by_name(spec) if isinstance(spec, str) else check_factory("compare", spec)


def _by_name(name: str) -> GuideFactory:
    if name in GAUSSIANS:
        return GAUSSIANS[name]
    if name in FLOWS:
        return partial(AutoFlow, flow=name)
    names = [*GAUSSIANS, *FLOWS]
    nearest = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.0)[0]
    raise ValueError(f"compare: unknown guide {name!r}: did you mean {nearest!r}? Known guides: {', '.join(names)}")


@dataclass(frozen=True)
class _Row:
    """A row of the table: the better fit of one guide, or why there is none."""

    guide: str
    elbo: float = math.nan
    elbo_se: float = math.nan
    khat: float = math.nan
    ess_fraction: float = math.nan
    agreement: float = math.nan
    seconds: float = math.nan
    steps: int | None = None
    verdict: str = _FAILED
    error: str = ""

    @property
    def cells(self) -> list[str]:
        """The cells of the printed table."""
        return [
            self.guide,
            f"{self.elbo:.2f} ± {self.elbo_se:.2f}",
            f"{self.khat:.2f}",
            f"{100 * self.ess_fraction:.0f} %",
            "-" if math.isnan(self.agreement) else f"{self.agreement:.2f}",
            f"{self.seconds:.1f} s",
            str(self.steps),
            self.verdict,
        ]


@dataclass(frozen=True)
class Comparison:
    """The result of :func:`compare`; print it, or look at ``table``.

    Attributes:
        results: label -> the better of the fits, best guide first; guides of which every fit failed are absent.
        repeats: number of independent fits per guide.
        errors: label -> message, for guides of which a fit failed.
    """

    results: dict[str, FitResult[Guide]] = field(repr=False)
    repeats: int
    errors: dict[str, str] = field(repr=False)

    @cached_property
    def _rows(self) -> list[_Row]:
        labels = dict.fromkeys([*self.results, *self.errors])
        return [_row(label, self.results.get(label), self.errors.get(label, "")) for label in labels]

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per guide, best first.

        The columns: ``guide``, ``elbo``, ``elbo_se``, ``khat``, ``ess_fraction``, ``agreement`` (largest difference
        between the fits of this guide, in posterior sd or log sd; NaN if there was only one), ``seconds`` and ``steps``
        of the better fit, ``verdict`` and ``error``. Guides of which no fit succeeded come last, with the verdict
        ``"failed"``.
        """
        frame: pd.DataFrame = importlib.import_module("pandas").DataFrame([asdict(row) for row in self._rows])
        return frame.astype({"steps": "Int64"})

    @property
    def best(self) -> FitResult[Guide]:
        """The fit with the highest ELBO.

        Raises:
            RuntimeError: if every fit failed.
        """
        if not self.results:
            raise RuntimeError(f"compare: every fit failed\n{self}")
        return next(iter(self.results.values()))

    def plot(self, ax: Axes | None = None) -> Axes:
        """Plot the ELBO of each guide with its standard error, best on top, colored by verdict.

        Args:
            ax: where to draw; a new figure, which does not belong to pyplot, if not given.
        """
        ax = new_figure(7, 1 + 0.4 * len(self._rows)).subplots() if ax is None else ax
        rows = [row for row in self._rows if math.isfinite(row.elbo)]
        for verdict, color in _COLORS.items():
            places = [place for place, row in enumerate(rows) if row.verdict == verdict]
            if places:
                elbos, errors = [rows[place].elbo for place in places], [rows[place].elbo_se for place in places]
                ax.errorbar(elbos, places, xerr=errors, fmt="o", capsize=3, color=color, label=verdict)
        ax.set_yticks(range(len(rows)), [row.guide for row in rows])
        ax.invert_yaxis()
        ax.set_xlabel("ELBO (nats)")
        if rows:
            ax.legend(fontsize="small")
        return ax

    def __str__(self) -> str:
        cells = [list(_HEADER)] + [row.cells for row in self._rows if row.verdict != _FAILED]
        widths = [max(len(line[column]) for line in cells) for column in range(len(_HEADER))]
        widths[0] = max(len(row.guide) for row in self._rows)
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
        lines += [f"{row.guide.ljust(widths[0])}  {row.error}" for row in self._rows if row.error]
        return "\n".join(line.rstrip() for line in lines)


def _row(label: str, result: FitResult[Guide] | None, error: str) -> _Row:
    if result is None or result.diagnosis is None:
        return _Row(label, error=error)
    diagnosis = result.diagnosis
    return _Row(
        guide=label,
        elbo=diagnosis.elbo,
        elbo_se=diagnosis.elbo_se,
        khat=diagnosis.khat,
        ess_fraction=diagnosis.ess_fraction,
        agreement=math.nan if diagnosis.agreement is None else diagnosis.agreement.worst_difference,
        seconds=result.seconds,
        steps=result.steps,
        verdict=diagnosis.verdict,
        error=error,
    )
