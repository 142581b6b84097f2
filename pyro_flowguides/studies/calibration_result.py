"""The result of ``vsbc``: a table of all marginals, and their histograms."""

from __future__ import annotations

import importlib
import itertools
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyro_flowguides.programs.types import Values
from pyro_flowguides.studies.symmetry import symmetry_test

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["VSBC"]

#: Level of the test of all marginals together.
LEVEL = 0.05
#: Standard errors beyond which a histogram counts as too wide or too narrow.
WIDTH_LIMIT = 3.0
#: Most marginals that are printed and plotted.
MAX_SHOWN = 12


@dataclass(frozen=True)
class _Marginal:
    """The p of one scalar parameter, and its row of the table; :attr:`VSBC.table` explains the columns."""

    marginal: str
    p: Tensor
    mean_p: float
    statistic: float
    p_value: float
    bias: str
    width: str


@dataclass(frozen=True)
class VSBC:
    """The result of :func:`vsbc`; print it, or look at ``table``.

    Attributes:
        p: site -> share of the guide's draws below the true value, ``(R, *site)`` for R replicates.
        num_samples: draws of the guide for each share.
        errors: messages of the replicates that failed; these are left out.
    """

    p: Values = field(repr=False)
    num_samples: int
    errors: tuple[str, ...] = ()

    @property
    def replicates(self) -> int:
        """Number of replicates R that succeeded."""
        return next(iter(self.p.values())).shape[0]

    @cached_property
    def p_values(self) -> Values:
        """site -> p-value of the symmetry of each marginal's histogram, shaped like the site."""
        return {
            name: torch.tensor([marginal.p_value for marginal in marginals], dtype=torch.float64).reshape(p.shape[1:])
            for (name, p), marginals in zip(self.p.items(), self._by_site, strict=True)
        }

    @cached_property
    def _by_site(self) -> list[list[_Marginal]]:
        num_marginals = sum(p[0].numel() for p in self.p.values())
        return [
            [_test(label, column, num_marginals) for label, column in zip(_labels(name, p), _columns(p), strict=True)]
            for name, p in self.p.items()
        ]

    @cached_property
    def _marginals(self) -> list[_Marginal]:
        """All marginals, smallest p-value first."""
        return sorted(itertools.chain(*self._by_site), key=lambda marginal: marginal.p_value)

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per scalar, smallest p-value first.

        The columns: ``marginal`` (site and index), ``mean_p``, ``statistic`` and ``p_value`` of the symmetry test,
        ``bias`` (where the guide lies, ``"too low"`` or ``"too high"``, if that is significant at 5 % over all
        marginals together; else empty) and ``width`` (``"too narrow"`` or ``"too wide"`` if the spread of p differs
        from that of a uniform p by more than three standard errors; else empty). The symmetry test does not detect
        symmetric errors of scale, which ``width`` shows.
        """
        columns = ("marginal", "mean_p", "statistic", "p_value", "bias", "width")
        rows = [[getattr(marginal, column) for column in columns] for marginal in self._marginals]
        frame: pd.DataFrame = importlib.import_module("pandas").DataFrame(rows, columns=columns)
        return frame

    @property
    def biased(self) -> list[str]:
        """The marginals whose asymmetry is significant at 5 % over all marginals together."""
        return [marginal.marginal for marginal in self._marginals if marginal.bias]

    def plot(self) -> Figure:
        """Plot histograms of p for the marginals with the smallest p-values, at most twelve; flat for an exact guide.

        The histogram rises to the right if the guide lies too low, and is shaped like a U if the guide is too narrow.

        Returns:
            a figure, which is not shown and does not belong to pyplot.
        """
        shown = self._marginals[:MAX_SHOWN]
        num_columns = min(len(shown), 4)
        num_rows = math.ceil(len(shown) / num_columns)
        figure: Figure = importlib.import_module("matplotlib.figure").Figure(
            figsize=(2.6 * num_columns, 2.2 * num_rows), layout="constrained"
        )
        axes = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
        for ax, marginal in itertools.zip_longest(axes, shown):
            if marginal is None:
                ax.set_axis_off()
            else:
                _plot_histogram(ax, marginal)
        return figure

    def __str__(self) -> str:
        total, num_biased = len(self._marginals), len(self.biased)
        failed = f", {len(self.errors)} failed" if self.errors else ""
        head = f"{num_biased} of {total} marginals biased ({self.replicates} replicates{failed}; 5 % for all together)"
        formatters = dict.fromkeys(("mean_p", "statistic", "p_value"), "{:.3f}".format)
        body = self.table.head(MAX_SHOWN).to_string(index=False, formatters=formatters)
        return f"{head}\n{body}" + (f"\n... and {total - MAX_SHOWN} more" if total > MAX_SHOWN else "")


def _test(label: str, p: Tensor, num_marginals: int) -> _Marginal:
    """Test one marginal, at a level shared among all."""
    statistic, p_value = symmetry_test(p)
    mean = float(p.mean())
    bias = ("too low" if mean > 0.5 else "too high") if p_value * num_marginals < LEVEL else ""
    return _Marginal(label, p, mean, statistic, p_value, bias, _width(p))


def _width(p: Tensor) -> str:
    """Compare the mean distance from 1/2 with that of a uniform p."""
    excess = (float((p - 0.5).abs().mean()) - 0.25) * math.sqrt(48 * len(p))
    if abs(excess) < WIDTH_LIMIT:
        return ""
    return "too narrow" if excess > 0 else "too wide"


def _columns(p: Tensor) -> list[Tensor]:
    return list(p.reshape(p.shape[0], -1).unbind(1))


def _labels(name: str, p: Tensor) -> list[str]:
    shape = p.shape[1:]
    return [f"{name}[{','.join(map(str, index))}]" for index in np.ndindex(*shape)] if shape else [name]


def _plot_histogram(ax: Axes, marginal: _Marginal) -> None:
    num_bins = max(5, min(20, len(marginal.p) // 10))
    color = "tab:red" if marginal.bias else "tab:blue"
    ax.hist(marginal.p.numpy(), bins=num_bins, range=(0, 1), color=color, alpha=0.7)
    ax.axhline(len(marginal.p) / num_bins, color="black", linewidth=1)
    notes = ", ".join(filter(None, (marginal.bias, marginal.width)))
    title = f"{marginal.marginal}: {marginal.p_value:.2g}" + (f"\n{notes}" if notes else "")
    ax.set_title(title, fontsize="small")
    ax.set_yticks([])
