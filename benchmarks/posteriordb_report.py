"""Tables and figure of benchmarks/posteriordb.py, made from its CSV file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from tables import markdown_table

from pyro_flowguides.flows import FLOWS

#: A fit reaches the targets if its gap, k-hat and errors are at most these.
GAP, KHAT, ERROR = 0.1, 0.7, 0.1
#: The largest error at which the verdict may be "good".
LARGEST_GOOD_ERROR = 0.3
#: An estimate of the evidence that lies this many standard errors below another one has missed a mode.
CLEAR_DIFFERENCE = 4.0
TEXT_COLUMNS = ["posterior", "guide", "limit", "mean_at", "log_sd_at"]
TEXT_COLUMNS += ["verdict", "note", "date", "hardware", "versions"]
#: Limits of the axes of the figure: smaller gaps are noise.
SMALLEST_GAP, LARGEST_KHAT = 1e-3, 1.5
VERDICTS = ("good", "usable with importance resampling", "do not trust")


def read(path: Path) -> pd.DataFrame:
    """Read all finished fits and chains with the reported budgets; add the columns gap, worst error and violation."""
    table = pd.read_csv(path, dtype=dict.fromkeys(TEXT_COLUMNS, str))
    table[TEXT_COLUMNS] = table[TEXT_COLUMNS].fillna("")
    table["is_chain"] = table["guide"].str.contains("NUTS")
    reported = table[table["is_chain"] | ~table["limit"].str.endswith("steps")]
    table = (reported if len(reported) else table).copy()
    best = {name: best_log_evidence(rows) for name, rows in table[~table["is_chain"]].groupby("posterior")}
    table["gap"] = table["posterior"].map(best).astype(float) - table["elbo"]
    table["worst"] = table[["mean_error", "log_sd_error"]].max(axis=1)
    table["violation"] = (table["verdict"] == "good") & ~(table["worst"] <= LARGEST_GOOD_ERROR)
    return table


def best_log_evidence(rows: pd.DataFrame) -> float:
    """Return the most certain importance-sampling estimate of log Z among all guides of one posterior.

    Among the estimates with a k-hat below the threshold, the one with the smallest standard error wins. Estimates
    clearly below another one do not take part: the weights of a guide that misses a mode are even, but too small. If no
    k-hat is below the threshold, the smallest k-hat wins.
    """
    finite = rows[rows["log_evidence"].map(math.isfinite)]
    if finite.empty:
        return math.nan
    reliable = finite[finite["khat"] < KHAT]
    if reliable.empty:
        return float(finite.sort_values("khat")["log_evidence"].iloc[0])

    def is_complete(row: pd.Series) -> bool:
        joint_error = (reliable["log_evidence_se"] ** 2 + row["log_evidence_se"] ** 2) ** 0.5
        return not (reliable["log_evidence"] - row["log_evidence"] > CLEAR_DIFFERENCE * joint_error).any()

    complete = reliable[reliable.apply(is_complete, axis=1)]
    return float(complete.sort_values("log_evidence_se")["log_evidence"].iloc[0])


# -- text --------------------------------------------------------------------------------------------------------------


CRITERIA: dict[str, Callable[[pd.DataFrame], pd.Series]] = {
    f"gap ≤ {GAP}": lambda rows: rows["gap"] <= GAP,
    f"k-hat < {KHAT}": lambda rows: rows["khat"] < KHAT,
    f"mean ≤ {ERROR}": lambda rows: rows["mean_error"] <= ERROR,
    f"log sd ≤ {ERROR}": lambda rows: rows["log_sd_error"] <= ERROR,
}


def meets_all(rows: pd.DataFrame) -> pd.Series:
    """Return which rows meet all criteria."""
    return pd.concat([is_met(rows) for is_met in CRITERIA.values()], axis=1).all(axis=1)


def _count(is_met: Callable[[pd.DataFrame], pd.Series], rows: pd.DataFrame) -> str:
    return str(int(is_met(rows).sum()))


#: The columns of :func:`counts`, from the rows of one guide.
COUNTS: dict[str, Callable[[pd.DataFrame], str]] = {
    "run": lambda rows: str(len(rows)),
    **{name: partial(_count, is_met) for name, is_met in CRITERIA.items()},
    "all four": partial(_count, meets_all),
    "median s": lambda rows: f"{rows['seconds'].median():.1f}",
    "longest s": lambda rows: f"{rows['seconds'].max():.1f}",
    "median CPU s": lambda rows: f"{rows['cpu_seconds'].median():.1f}",
    "longest CPU s": lambda rows: f"{rows['cpu_seconds'].max():.1f}",
    "verdict good / usable / no": lambda rows: " / ".join(str((rows["verdict"] == kind).sum()) for kind in VERDICTS),
    "failed": partial(_count, lambda rows: rows["verdict"] == "failed"),
    "violations": partial(_count, lambda rows: rows["violation"]),
}


def counts(table: pd.DataFrame) -> str:
    """Return a table of how many posteriors each guide manages, and in what time."""
    fits = table[~table["is_chain"]]
    cells = [[guide, *(cell(rows) for cell in COUNTS.values())] for guide, rows in _groups(fits, "guide")]
    return markdown_table(["guide", *COUNTS], cells)


def gaps(table: pd.DataFrame) -> str:
    """Return a table of all gaps: posteriors down, guides across."""
    fits = table[~table["is_chain"]]
    guides = [guide for guide, _ in _groups(fits, "guide")]
    lines = []
    for posterior, rows in _groups(fits, "posterior"):
        by_guide = {row["guide"]: _gap_cell(row) for row in rows.to_dict("records")}
        lines.append([posterior, *(by_guide.get(guide, "not run") for guide in guides)])
    return markdown_table(["posterior", *guides], lines)


def _gap_cell(row: dict[str, Any]) -> str:
    if row["verdict"] == "failed":
        return "failed"
    text = _number(row["gap"], 3)
    return f"**{text}**" if row["gap"] <= GAP else text


#: The columns of :func:`details`, from one row.
DETAILS: dict[str, Callable[[dict[str, Any]], str]] = {
    "guide": lambda row: row["guide"],
    "gap": lambda row: f"{_number(row['gap'], 3)} ± {_number(row['elbo_se'], 3)}",
    "k-hat": lambda row: _number(row["khat"], 2),
    "ESS, %": lambda row: _number(100 * row["ess_fraction"], 0),
    "mean error": lambda row: f"{_number(row['mean_error'], 3)} ({row['mean_at']})",
    "log sd error": lambda row: f"{_number(row['log_sd_error'], 3)} ({row['log_sd_at']})",
    "resampled: mean, log sd": lambda row: (
        f"{_number(row['resampled_mean_error'], 3)}, {_number(row['resampled_log_sd_error'], 3)}"
    ),
    "s": lambda row: f"{row['seconds']:.1f}",
    "CPU s": lambda row: f"{row['cpu_seconds']:.1f}",
    "steps": lambda row: str(row["steps"]),
    "verdict": lambda row: row["verdict"] + (" (**violation**)" if row["violation"] else ""),
}


def details(table: pd.DataFrame) -> str:
    """Return all numbers of every fit, posterior by posterior."""
    parts = []
    for posterior, rows in _groups(table, "posterior"):
        fits = rows[~rows["is_chain"]].to_dict("records")
        parts += [f"### {posterior}", markdown_table(list(DETAILS), map(_detail_cells, fits))]
        parts += [f"{row['guide']}: {_chain(row)}" for row in rows[rows["is_chain"]].to_dict("records")]
    return "\n\n".join(parts)


def _detail_cells(row: dict[str, Any]) -> list[str]:
    if row["verdict"] == "failed":
        return [row["guide"], f"failed: {row['note']}", *[""] * (len(DETAILS) - 2)]
    return [cell(row) for cell in DETAILS.values()]


def _chain(row: dict[str, Any]) -> str:
    if row["verdict"] == "failed":
        return f"failed: {row['note']}."
    last = f"mean error {_number(row['mean_error'], 3)}, log sd error {_number(row['log_sd_error'], 3)}"
    return (
        f"{row['verdict']}; {row['seconds']:.1f} s (CPU {row['cpu_seconds']:.1f} s), {row['steps']} draws, {last}, "
        f"{row['note']}."
    )


def summary(table: pd.DataFrame) -> str:
    """Return the text printed at the end of a run."""
    wrong = table[table["violation"]]
    lines = [counts(table), "", f"Called good with an error above {LARGEST_GOOD_ERROR}: {len(wrong)}"]
    lines += [
        f"  {row['posterior']}, {row['guide']}: mean {row['mean_error']:.2f}, log sd {row['log_sd_error']:.2f}"
        for row in wrong.to_dict("records")
    ]
    return "\n".join(lines)


def document(table: pd.DataFrame) -> str:
    """Return the Markdown that the documentation includes."""
    ran = " to ".join(sorted({table["date"].min(), table["date"].max()}))
    about = f"Run on {ran}; {'; '.join(_unique(table['hardware']))}; {'; '.join(_unique(table['versions']))}; float64."
    return "\n\n".join(
        [
            "# Results on posteriordb",
            "`python benchmarks/posteriordb.py --posteriordb PATH --peers --numpyro --nuts --report docs`",
            about,
            "## How many posteriors each guide manages",
            counts(table),
            "## Gaps",
            gaps(table),
            "## All numbers",
            details(table) + "\n",
        ]
    )


def _number(value: float, digits: int) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.{digits}f}" if abs(value) < 1000 else f"{value:.1e}"


def _unique(values: Iterable[str]) -> list[str]:
    return sorted({value for value in values if value})


def _groups(table: pd.DataFrame, column: str) -> list[tuple[str, pd.DataFrame]]:
    """Return the groups in the order of their first rows; posteriors in the order of their names."""
    return [(str(name), rows) for name, rows in table.groupby(column, sort=column == "posterior")]


# -- plot --------------------------------------------------------------------------------------------------------------


def plot(table: pd.DataFrame, path: Path) -> None:
    """Plot gap and k-hat of every fit, with their targets."""
    fits = table[~table["is_chain"] & (table["verdict"] != "failed")]
    posteriors = [name for name, _ in _groups(fits, "posterior")]
    figure = Figure(figsize=(11, 1.5 + 0.6 * len(posteriors)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    groups = _groups(fits, "guide")
    colors = matplotlib.colormaps["tab20"]
    for place, (guide, rows) in enumerate(groups):
        offset = 0.6 * (place / max(1, len(groups) - 1) - 0.5)
        heights = [posteriors.index(name) + offset for name in rows["posterior"]]
        marker = "o" if guide in FLOWS else "s"
        style = {"color": colors(place % 20), "marker": marker, "s": 22, "label": guide}
        left.scatter(rows["gap"].clip(lower=SMALLEST_GAP), heights, **style)
        right.scatter(rows["khat"].clip(upper=LARGEST_KHAT), heights, **style)
    left.set_xscale("log")
    left.axvline(GAP, color="grey", linewidth=0.8)
    right.axvline(KHAT, color="grey", linewidth=0.8)
    left.set_xlabel("gap to the best log evidence, nats")
    right.set_xlabel(f"k-hat (at the edge: beyond {LARGEST_KHAT})")
    left.set_yticks(range(len(posteriors)), posteriors)
    left.invert_yaxis()
    for axes in (left, right):
        for edge in range(1, len(posteriors)):
            axes.axhline(edge - 0.5, color="lightgrey", linewidth=0.5)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=110)


def write(table: pd.DataFrame, folder: Path) -> None:
    """Write ``posteriordb_table.md`` and ``posteriordb.png`` to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "posteriordb_table.md").write_text(document(table), encoding="utf-8")
    plot(table, folder / "posteriordb.png")
