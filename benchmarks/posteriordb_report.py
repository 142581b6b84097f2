"""The table and the plot of benchmarks/posteriordb.py, from its CSV file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from pyro_flowguides.flows import FLOWS

#: What a fit is expected to reach.
GAP, KHAT, ERROR = 0.1, 0.7, 0.1
#: The error from which on a posterior must not be called good.
DISHONEST = 0.3
#: Standard errors by which one estimate of the evidence must exceed another to show that that one missed something.
CLEARLY = 4.0
TEXTS = ("posterior", "guide", "limit", "mean_at", "log_sd_at", "verdict", "note", "date", "hardware", "versions")
#: The plot's least gap: less is noise.
LEAST_GAP = 1e-3
MOST_KHAT = 1.5


def read(path: Path) -> pd.DataFrame:
    """All finished fits and chains with the budgets that are reported, and what follows from comparing them."""
    table = pd.read_csv(path, dtype=dict.fromkeys(TEXTS, str))
    table[list(TEXTS)] = table[list(TEXTS)].fillna("")
    table["is_chain"] = table["guide"].str.contains("NUTS")
    reported = table[table["is_chain"] | ~table["limit"].str.endswith("steps")]
    table = (reported if len(reported) else table).copy()
    best = {name: best_log_evidence(rows) for name, rows in table[~table["is_chain"]].groupby("posterior")}
    table["gap"] = table["posterior"].map(best).astype(float) - table["elbo"]
    table["worst"] = table[["mean_error", "log_sd_error"]].max(axis=1)
    table["violation"] = (table["verdict"] == "good") & ~(table["worst"] <= DISHONEST)
    return table


def best_log_evidence(rows: pd.DataFrame) -> float:
    """The most certain importance-sampling estimate of log Z among all guides of one posterior.

    Of estimates with a k-hat below the threshold, that with the smallest standard error; but none that lies clearly
    below another one, since weights that miss a mode are even and too small. Where no k-hat is below the threshold,
    the estimate with the smallest k-hat.
    """
    known = rows[rows["log_evidence"].map(math.isfinite)]
    if known.empty:
        return math.nan
    sure = known[known["khat"] < KHAT]
    if sure.empty:
        return float(known.sort_values("khat")["log_evidence"].iloc[0])

    def is_complete(one: pd.Series) -> bool:
        joint = (sure["log_evidence_se"] ** 2 + one["log_evidence_se"] ** 2) ** 0.5
        return not (sure["log_evidence"] - one["log_evidence"] > CLEARLY * joint).any()

    complete = sure[sure.apply(is_complete, axis=1)]
    return float(complete.sort_values("log_evidence_se")["log_evidence"].iloc[0])


# -- text --------------------------------------------------------------------------------------------------------------


def criteria(rows: pd.DataFrame) -> dict[str, pd.Series]:
    """What a fit is held to: whether each row reaches it."""
    return {
        f"gap ≤ {GAP}": rows["gap"] <= GAP,
        f"k-hat < {KHAT}": rows["khat"] < KHAT,
        f"mean ≤ {ERROR}": rows["mean_error"] <= ERROR,
        f"log sd ≤ {ERROR}": rows["log_sd_error"] <= ERROR,
    }


def counts(table: pd.DataFrame) -> str:
    """How many posteriors each guide manages, and what it takes."""
    fits = table[~table["is_chain"]]
    header = [
        *criteria(fits),
        "all four",
        "median s",
        "longest s",
        "verdict good / usable / no",
        "failed",
        "violations",
    ]
    lines = [_line(["guide", "run", *header]), "|---" * (len(header) + 2) + "|"]
    for guide, rows in _groups(fits, "guide"):
        reached = criteria(rows)
        together = pd.concat(reached.values(), axis=1).all(axis=1)
        verdicts = rows["verdict"].value_counts()
        cells = [str(int(column.sum())) for column in [*reached.values(), together]]
        for column in ("seconds", "cpu_seconds"):
            known = rows[column].dropna()
            cells += [f"{known.median():.1f}", f"{known.max():.1f}"]
        kinds = ("good", "usable with importance resampling", "do not trust")
        cells += [" / ".join(str(verdicts.get(kind, 0)) for kind in kinds)]
        cells += [str(verdicts.get("failed", 0)), str(int(rows["violation"].sum()))]
        lines.append(_line([guide, str(len(rows)), *cells]))
    return "\n".join(lines)


def gaps(table: pd.DataFrame) -> str:
    """The gap of every fit: posteriors down, guides across."""
    fits = table[~table["is_chain"]]
    guides = [guide for guide, _ in _groups(fits, "guide")]
    lines = [_line(["posterior", *guides]), "|---" * (len(guides) + 1) + "|"]
    for posterior, rows in _groups(fits, "posterior"):
        by_guide = {row["guide"]: _gap_cell(row) for row in rows.to_dict("records")}
        lines.append(_line([posterior, *(by_guide.get(guide, "not run") for guide in guides)]))
    return "\n".join(lines)


def _gap_cell(row: dict[str, Any]) -> str:
    if row["verdict"] == "failed":
        return "failed"
    text = _number(row["gap"], 3)
    return f"**{text}**" if row["gap"] <= GAP else text


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
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
    """All numbers of every fit, posterior after posterior."""
    parts = []
    for posterior, rows in _groups(table, "posterior"):
        lines = [f"### {posterior}", "", _line(COLUMNS), "|---" * len(COLUMNS) + "|"]
        for row in rows[~rows["is_chain"]].to_dict("records"):
            if row["verdict"] == "failed":
                lines.append(_line([row["guide"], f"failed: {row['note']}", *[""] * (len(COLUMNS) - 2)]))
            else:
                lines.append(_line(cell(row) for cell in COLUMNS.values()))
        for row in rows[rows["is_chain"]].to_dict("records"):
            lines += ["", f"{row['guide']}: {_chain(row)}"]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _chain(row: dict[str, Any]) -> str:
    if row["verdict"] == "failed":
        return f"failed: {row['note']}."
    last = f"mean error {_number(row['mean_error'], 3)}, log sd error {_number(row['log_sd_error'], 3)}"
    return (
        f"{row['verdict']}; {row['seconds']:.1f} s (CPU {row['cpu_seconds']:.1f} s), {row['steps']} draws, {last}, "
        f"{row['note']}."
    )


def summary(table: pd.DataFrame) -> str:
    """What is said at the end of a run."""
    wrong = table[table["violation"]]
    lines = [counts(table), "", f"Called good with an error above {DISHONEST}: {len(wrong)}"]
    lines += [
        f"  {row['posterior']}, {row['guide']}: mean {row['mean_error']:.2f}, log sd {row['log_sd_error']:.2f}"
        for row in wrong.to_dict("records")
    ]
    return "\n".join(lines)


def document(table: pd.DataFrame) -> str:
    """The Markdown that the documentation includes."""
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


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float, digits: int) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.{digits}f}" if abs(value) < 1000 else f"{value:.1e}"


def _unique(values: Iterable[str]) -> list[str]:
    return sorted({value for value in values if value})


def _groups(table: pd.DataFrame, column: str) -> list[tuple[str, pd.DataFrame]]:
    """Groups in the order of their first rows; posteriors in that of their names."""
    return [(str(name), rows) for name, rows in table.groupby(column, sort=column == "posterior")]


# -- plot --------------------------------------------------------------------------------------------------------------


def plot(table: pd.DataFrame, path: Path) -> None:
    """Gap and k-hat of every fit, with what they are held to."""
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
        left.scatter(rows["gap"].clip(lower=LEAST_GAP), heights, **style)
        right.scatter(rows["khat"].clip(upper=MOST_KHAT), heights, **style)
    left.set_xscale("log")
    left.axvline(GAP, color="grey", linewidth=0.8)
    right.axvline(KHAT, color="grey", linewidth=0.8)
    left.set_xlabel("gap to the best log evidence, nats")
    right.set_xlabel(f"k-hat (beyond {MOST_KHAT}: at the edge)")
    left.set_yticks(range(len(posteriors)), posteriors)
    left.invert_yaxis()
    for axes in (left, right):
        for edge in range(1, len(posteriors)):
            axes.axhline(edge - 0.5, color="lightgrey", linewidth=0.5)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=110)


def write(table: pd.DataFrame, folder: Path) -> None:
    """``posteriordb_table.md`` and ``posteriordb.png`` in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "posteriordb_table.md").write_text(document(table), encoding="utf-8")
    plot(table, folder / "posteriordb.png")
