"""The result of ``compare``: the better fit of each guide, as a table, a plot and a text."""

from __future__ import annotations

import importlib
import math
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from pyro_flowguides.inference.fitting import FitResult
from pyro_flowguides.programs.types import Guide

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["Comparison"]

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


def _new_axes(num_rows: int) -> Axes:
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(7, 1 + 0.4 * num_rows), layout="constrained")
    axes: Axes = figure.subplots()
    return axes
