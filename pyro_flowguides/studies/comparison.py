"""``compare``: several guides on one model, each fitted more than once, side by side."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from tqdm import tqdm

from pyro_flowguides.diagnostics import agreement
from pyro_flowguides.inference.fitting import FitResult
from pyro_flowguides.programs.batched_run import first_line
from pyro_flowguides.programs.types import Args, Guide, Kwargs, Model
from pyro_flowguides.studies.guide_factories import GuideFactory, GuideSpec, resolve_guides
from pyro_flowguides.studies.isolated_fits import IsolatedFit, diagnose_again, fit_in_isolation

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["Comparison", "compare"]

#: Guides that are compared by default.
DEFAULT_GUIDES = ("normal", "mvn", "planar", "sylvester", "iaf")
#: Options of ``fit`` that must differ between fits, or that ``compare`` sets itself.
RESERVED_OPTIONS = ("seed", "checkpoint", "progress")

_FAILED = "failed"
_COLORS = {"good": "tab:green", "usable with importance resampling": "tab:orange", "do not trust": "tab:red"}
_HEADER = ("guide", "ELBO", "k-hat", "ESS", "agreement", "time", "steps", "verdict")


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
        results: label -> the better of the fits, best guide first; guides that failed are absent.
        repeats: number of independent fits per guide.
    """

    results: dict[str, FitResult[Guide]] = field(repr=False)
    repeats: int
    _rows: tuple[_Row, ...] = field(repr=False)

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
        return self.results[self._rows[0].guide]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Plot the ELBO of each guide with its standard error, best on top, colored by verdict.

        Args:
            ax: where to draw; a new figure, which does not belong to pyplot, if not given.
        """
        ax = _new_axes(len(self._rows)) if ax is None else ax
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
    state, so that nothing outside changes and all results can be used side by side. A guide that fails is listed with
    its error.

    Args:
        model: a Pyro model. If it is a module, each fit trains a copy of its parameters.
        *args: the model's arguments.
        guides: any of the names in :data:`~pyro_flowguides.flows.FLOWS`, ``"normal"``, ``"diagonal"``, ``"lowrank"``
            and ``"mvn"`` (Pyro's ``AutoNormal``, ``AutoDiagonalNormal``, ``AutoLowRankMultivariateNormal`` and
            ``AutoMultivariateNormal``); a guide class or any function ``model -> guide``; or ``(label, function)``.
        repeats: independent fits per guide; one leaves the agreement unchecked.
        fit_options: options of :func:`~pyro_flowguides.fit` for all fits, such as ``steps``.
        seed: seed of everything random; the global generator is restored afterwards.
        progress: show a progress bar over the fits.
        **kwargs: the model's keyword arguments.

    Returns:
        a :class:`Comparison`; print it.

    Raises:
        ValueError: for no guides, an unknown name (the nearest is named), a label that occurs twice, ``repeats``
            below 1, or a ``seed``, ``checkpoint`` or ``progress`` in ``fit_options``.
        TypeError: for a guide that has been made already, because every fit needs its own.

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
    factories, options = resolve_guides(guides), fit_options or {}
    _check(repeats, options)
    fits: dict[str, IsolatedFit | None] = {}
    errors: dict[str, str] = {}
    with tqdm(total=len(factories) * repeats, disable=not progress, leave=False) as bar:
        for label, factory in factories.items():
            bar.set_description(label)
            attempts: list[IsolatedFit | str] = []
            for repeat in range(repeats):
                attempts.append(_attempt(label, factory, model, args, kwargs, options, seed + repeat))
                bar.update()
            fits[label], errors[label] = _best(attempts, seed)
    labels = sorted(fits, key=lambda label: _order(fits[label]))
    results = {label: fit.result for label in labels if (fit := fits[label]) is not None}
    return Comparison(results, repeats, tuple(_row(label, fits[label], errors[label]) for label in labels))


def _check(repeats: int, options: Mapping[str, object]) -> None:
    if repeats < 1:
        raise ValueError(f"compare: repeats must be at least 1, got {repeats}")
    for name in RESERVED_OPTIONS:
        if name in options:
            raise ValueError(f"compare: {name!r} cannot be the same for all fits; leave it out of fit_options")


def _attempt(
    label: str, factory: GuideFactory, model: Model, args: Args, kwargs: Kwargs, options: Kwargs, seed: int
) -> IsolatedFit | str:
    """Fit once; return a message where that fails."""
    try:
        return fit_in_isolation(label, factory, model, args, kwargs, options, seed)
    except Exception as error:  # whatever a program raises, the other guides still count
        return first_line(error)


def _best(attempts: Sequence[IsolatedFit | str], seed: int) -> tuple[IsolatedFit | None, str]:
    """Choose the best fit and judge it again with the agreement of all; return a message on those that failed."""
    fits = [attempt for attempt in attempts if isinstance(attempt, IsolatedFit)]
    messages = [attempt for attempt in attempts if isinstance(attempt, str)]
    if not fits:
        return None, f"failed: {messages[0]}"
    best = max(fits, key=lambda fit: fit.elbo)
    draws = [fit.draws for fit in fits if fit.draws is not None]
    if len(draws) > 1:
        best = diagnose_again(best, agreement(*draws), seed)
    return best, f"{len(messages)} of {len(attempts)} fits failed: {messages[0]}" if messages else ""


def _order(fit: IsolatedFit | None) -> tuple[bool, float]:
    """Sort the best fit first and failures last."""
    return fit is None, 0.0 if fit is None else -fit.elbo


def _row(label: str, fit: IsolatedFit | None, error: str) -> _Row:
    if fit is None:
        return _Row(label, error=error)
    result, diagnosis = fit.result, fit.diagnosis
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


def _new_axes(num_rows: int) -> Axes:
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(7, 1 + 0.4 * num_rows), layout="constrained")
    axes: Axes = figure.subplots()
    return axes
