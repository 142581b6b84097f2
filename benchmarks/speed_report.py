"""Tables and figures of speed.py, made from its rows."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
from row_files import read_rows
from tables import markdown_table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

#: Largest number of settings in a table.
MAX_COLUMNS = 5
Row = dict[str, Any]
Table = list[Row]


def median(values: Iterable[float]) -> str:
    """Format the median of the finite values with four digits; empty if there is none."""
    finite = [value for value in values if math.isfinite(value)]
    return f"{statistics.median(finite):.4g}" if finite else ""


# -- rows --------------------------------------------------------------------------------------------------------------


def rounds(row: Row) -> list[float]:
    return [float(ms) for ms in row["rounds"].split()]


def ratio(row: Row, reference: Row) -> float:
    """Return the median over the rounds of the ratio to the reference; NaN if one of them was left out."""
    ratios = [a / b for a, b in zip(rounds(row), rounds(reference), strict=False)]
    return statistics.median(ratios) if ratios else math.nan


def find(rows: Table, competitor: str, **setting: Any) -> Row | None:
    """Return the row of a competitor in a setting, or None."""
    wanted = {"competitor": competitor, **{key: str(value) for key, value in setting.items()}}
    return next((row for row in rows if wanted.items() <= row.items()), None)


def distinct(rows: Table, *keys: str) -> list[tuple[str, ...]]:
    """Return the distinct values of some columns, in the order of appearance."""
    return list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows))


# -- studies -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Aim:
    """The largest ratio that a competitor should have to a reference, in one setting of a study."""

    competitor: str
    reference: str
    largest: float
    setting: dict[str, Any]


@dataclass(frozen=True)
class Study:
    """The presentation of a study.

    ``keys`` are the columns that make up a setting, ``names`` names a setting, ``extra`` are further columns with the
    titles of their tables.
    """

    title: str
    text: str
    keys: tuple[str, ...]
    names: Callable[[Row], str]
    reference: str
    draw: Callable[[Table, Any], Any]
    aims: tuple[Aim, ...] = ()
    extra: tuple[tuple[str, str], ...] = ()


def by_setting(rows: Table, study: Study, title: str, cell: Callable[[Row, Row | None], str]) -> str:
    """Return a table with a row for every competitor and a column for every setting."""
    settings = [dict(zip(study.keys, values, strict=True)) for values in distinct(rows, *study.keys)]
    lines = []
    for (competitor,) in distinct(rows, "competitor"):
        cells = []
        for setting in settings:
            row = find(rows, competitor, **setting)
            is_missing = row is None or row["left_out"]
            cells.append("—" if is_missing else cell(row, find(rows, study.reference, **setting)))
        lines.append([competitor, *cells])
    return markdown_table([title, *map(study.names, settings)], lines)


def timed(row: Row, reference: Row | None) -> str:
    """Format milliseconds, and in brackets the speedup over the reference."""
    times = 1 / ratio(row, reference) if reference is not None and ratio(row, reference) else math.nan
    return f"{float(row['ms']):.3g}" + (f" ({times:.3g}×)" if math.isfinite(times) else "")


def two_digits(key: str, row: Row, _: Row | None) -> str:
    return f"{float(row[key]):.2g}"


def near(row: Row, _: Row | None) -> str:
    """Format the seconds, and the last gap if the target was missed."""
    if row["near"] == "True":
        return f"{float(row['seconds']):.1f} s ({row['steps']} steps)"
    return f"not in {float(row['seconds']):.0f} s (gap {float(row['gap']):.2g})"


def groups(study: Study, rows: Table) -> list[Table]:
    """Divide the rows into tables that are not too wide, with networks of other widths than 64 in their own tables."""
    parts = []
    for _, part in itertools.groupby(rows, lambda row: row.get("hidden") in (None, "64")):
        here = list(part)
        settings = distinct(here, *study.keys)
        for start in range(0, len(settings), MAX_COLUMNS):
            chosen = settings[start : start + MAX_COLUMNS]
            parts.append([row for row in here if tuple(row[key] for key in study.keys) in chosen])
    return parts


def tables(study: Study, rows: Table) -> str:
    parts = []
    for part in groups(study, rows):
        if study.reference:
            parts.append(by_setting(part, study, "ms", timed))
            parts += [by_setting(part, study, title, partial(two_digits, key)) for key, title in study.extra]
        else:
            parts.append(by_setting(part, study, "time", near))
    return "\n\n".join(parts)


def aims(study: Study, rows: Table) -> str:
    lines = []
    for aim in study.aims:
        row, reference = find(rows, aim.competitor, **aim.setting), find(rows, aim.reference, **aim.setting)
        if row is None or reference is None or not row["rounds"] or not reference["rounds"]:
            continue
        measured = ratio(row, reference)
        setting = study.names({key: str(value) for key, value in aim.setting.items()})
        name = f"{aim.competitor} / {aim.reference}, {setting}"
        lines.append([name, f"{aim.largest:.3g}", f"{measured:.3g}", "yes" if measured <= aim.largest else "no"])
    return markdown_table(["aim", "at most", "measured", "reached"], lines) if lines else ""


def left_out(rows: Table) -> str:
    """List the competitors that were left out, each reason once."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["left_out"]:
            places = reasons.setdefault((row["competitor"], row["left_out"]), [])
            places.append(f"D = {row['dim']}" if "dim" in row else row["posterior"])
    return "\n".join(f"- {name} ({', '.join(dict.fromkeys(places))}): {why}" for (name, why), places in reasons.items())


def write(name: str, path: Path) -> str:
    """Write table and figure beside the CSV file, and return the text."""
    study, rows = STUDIES[name], read_rows(path)
    versions = dict(part.rsplit(" ", 1) for row in rows for part in row["versions"].split(", ") if part)
    about = ", ".join(f"{package} {version}" for package, version in versions.items())
    missing = left_out(rows)
    text = "\n\n".join(
        part
        for part in (
            f"# {study.title}",
            f"`python benchmarks/speed.py --numpyro PYTHON --peers PYTHON --studies {name}`",
            f"{rows[0]['date']}, {rows[0]['hardware']}; {about}. {study.text}",
            tables(study, rows),
            aims(study, rows),
            f"Left out:\n\n{missing}" if missing else "",
        )
        if part
    )
    path.with_suffix(".md").write_text(text + "\n", "utf-8")
    figure = study.draw(rows, study)
    figure.savefig(path.with_suffix(".png"), dpi=110, bbox_inches="tight")
    plt.close(figure)
    return text


# -- figures -----------------------------------------------------------------------------------------------------------

STYLES = {
    "Pyro": ("tab:red", "s"),
    "fit": ("tab:blue", "o"),
    "ours": ("tab:blue", "o"),
    "by hand": ("tab:green", "^"),
    "one coordinate": ("tab:red", "s"),
    "NumPyro": ("tab:orange", "D"),
    "FlowJAX": ("tab:brown", "v"),
    "zuko": ("tab:purple", "<"),
    "normflows": ("tab:pink", ">"),
    "floor": ("black", "."),
}
#: Line styles of the variants of a competitor.
DASHES = ("-", "--", ":")


def style(competitor: str, competitors: Sequence[str]) -> dict[str, Any]:
    kind = next(kind for kind in STYLES if competitor.startswith(kind))
    variant = [other for other in competitors if other.startswith(kind)].index(competitor)
    color, marker = STYLES[kind]
    return {"color": color, "marker": marker, "linestyle": DASHES[variant % len(DASHES)]}


def plot_lines(axes: Any, rows: Table, key: str, title: str) -> None:
    """Plot the milliseconds of every competitor against one column."""
    competitors = [name for (name,) in distinct(rows, "competitor") if not name.endswith("again")]
    for name in competitors:
        points = sorted((float(row[key]), float(row["ms"])) for row in rows if row["competitor"] == name and row["ms"])
        if points:
            axes.plot(*zip(*points, strict=True), label=name, **style(name, competitors))
    values = sorted({int(row[key]) for row in rows})
    axes.set(xscale="log", yscale="log", title=title)
    axes.set_xticks(values, [f"{value}" for value in values], rotation=45)
    axes.minorticks_off()
    axes.grid(True, alpha=0.3)


def draw_steps(rows: Table, _: Study) -> Any:
    shared = [row for row in rows if row["hidden"] == "64"]
    panels = [
        ("dim", [row for row in shared if row["particles"] == "32"], "widths 64, 32 particles", "latent variables"),
        ("particles", [row for row in shared if row["dim"] == "10"], "widths 64, D = 10", "particles"),
        ("dim", [row for row in rows if row["hidden"] == row["dim"]], "widths D, 32 particles", "latent variables"),
    ]
    panels = [panel for panel in panels if panel[1]]
    figure, all_axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 5), squeeze=False)
    for axes, (key, part, title, label) in zip(all_axes[0], panels, strict=True):
        plot_lines(axes, part, key, title)
        axes.set_xlabel(label)
    all_axes[0, 0].set_ylabel("processor time of a step, ms")
    all_axes[0, -1].legend(*all_axes[0, 0].get_legend_handles_labels(), bbox_to_anchor=(1.02, 1), loc="upper left")
    return figure


def draw_inverse(rows: Table, _: Study) -> Any:
    figure, axes = plt.subplots(figsize=(6, 4.5))
    plot_lines(axes, rows, "dim", "inverse of three layers, batch of 256")
    axes.set(xlabel="dimensions", ylabel="processor time, ms")
    axes.legend()
    return figure


def bars(rows: Table, study: Study, value: str, label: str, scale: str) -> Any:
    """Draw a panel of bars for every setting, with pale bars for competitors that missed the target."""
    settings = distinct(rows, *study.keys)
    competitors = [name for (name,) in distinct(rows, "competitor")]
    figure, all_axes = plt.subplots(
        1, len(settings), figsize=(2 + 3 * len(settings), 0.5 + 0.45 * len(competitors)), sharey=True, squeeze=False
    )
    for axes, setting in zip(all_axes[0], settings, strict=True):
        here = dict(zip(study.keys, setting, strict=True))
        for place, name in enumerate(competitors):
            row = find(rows, name, **here)
            if row is None or not row[value]:
                continue
            is_reached = row.get("near", "True") == "True"
            length = float(row[value])
            axes.barh(place, length, color=style(name, competitors)["color"], alpha=0.9 if is_reached else 0.25)
            text = f" {length:.3g}" if is_reached else " not reached"
            axes.annotate(text, (length, place), va="center", fontsize=8)
        axes.set(xscale=scale, title=study.names(here), xlabel=label)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.set_yticks(range(len(competitors)), competitors)
        if scale == "log":
            lengths = [float(row[value]) for row in rows if row[value]]
            axes.set_xlim(min(lengths) / 2, 8 * max(lengths))
        else:
            axes.margins(x=0.35)
    all_axes[0, 0].invert_yaxis()
    figure.tight_layout()
    return figure


def setting_name(row: Row) -> str:
    widths = "" if row["hidden"] == "64" else f", widths {row['hidden']}"
    return f"D={row['dim']}, P={row['particles']}{widths}"


def step_aim(competitor: str, reference: str, largest: float, dim: int) -> Aim:
    return Aim(competitor, reference, largest, {"dim": dim, "particles": 32, "hidden": 64})


STEPS = """Processor time of a training step, median over interleaved rounds; in brackets the speedup over Pyro's SVI.
A three-layer IAF with two hidden layers of 64 (the default of `AutoIAF` for every D) unless stated otherwise, on a
hierarchical normal target with D latent variables, with P particles, in float32, on one thread. Pyro and NumPyro take
no widths below D. Beyond D = 64, their widths are D, and only the columns with widths D compare equal networks. The
first call includes all preparation and compilation, in wall seconds. The caches of the compilers are empty, except
for "again", a second process after the first. The floor consists of the matrix products of the layers, one forward
and two backward, and of reading and writing the parameters with Adam's averages. For small D, it is the overhead of
the calls of torch."""
INVERSE = """Processor time of an inverse in float32, median over interleaved rounds; in brackets the speedup over one
coordinate after the other. Three layers, two hidden layers of 64, batch of 256, one thread. Weight matrices are N(0,
1.5² / inputs), biases N(0, 0.1²), large enough for the log-scales of our layers to reach their bound. Our inverse and
the loop invert the same flow, with masked weights computed beforehand. The layers of zuko and normflows have the same
sizes and the same distribution of the weights. Errors are the root mean square and the largest of |x − x'|, where x'
is the inverse at the image of a standard normal x; the median over five draws of the weights."""
VAES = """Processor time of a step, median over interleaved rounds; in brackets the speedup over a loop written by
hand with the same modules. MLP 784-300-300, 64 latent variables, default flows of the registry, float32, one thread.
The first call includes compilation, in wall seconds."""
GAP = """Wall seconds until the ELBO is within 0.1 nat of the known log evidence, on one thread. They include
compilation and warm start; import time is excluded for all competitors. `fit` runs until it stops by itself, and its
gap is that of its diagnosis. Peers (three flows of their default widths D, 32 particles, Adam at 0.01) stop at the
first check that finds them near, one check every 100 steps; checks are not timed. The caches of the compilers are
empty. Targets: "location" is the hierarchical normal model, whose posterior is normal and within reach of the warm
start alone. "scale" has group means with an unknown scale, whose posterior is a funnel cut off by data."""
#: The table of the seconds to the end of the first call.
FIRST = (("first", "first call, s"),)

STUDIES = {
    "steps": Study(
        "Cost of a training step",
        STEPS,
        ("dim", "particles", "hidden"),
        setting_name,
        "Pyro SVI",
        draw_steps,
        (
            step_aim("fit", "Pyro SVI", 1 / 3, 10),
            step_aim("fit, compiled", "Pyro SVI", 1 / 12, 10),
            step_aim("fit, compiled", "NumPyro, loop", 1, 10),
            step_aim("fit, compiled", "NumPyro, scan", 1, 10),
            step_aim("fit", "Pyro SVI", 1 / 8, 500),
            step_aim("fit, compiled", "Pyro SVI", 1 / 8, 500),
            step_aim("fit, compiled", "floor: both", 1.5, 500),
        ),
        FIRST,
    ),
    "inverse": Study(
        "Inverse of an autoregressive flow",
        INVERSE,
        ("dim",),
        lambda row: f"D={row['dim']}",
        "one coordinate after the other",
        draw_inverse,
        tuple(
            Aim("ours", "one coordinate after the other", largest, {"dim": dim})
            for dim, largest in ((10, 1.0), (100, 1 / 10), (500, 1 / 60))
        ),
        (
            ("error32", "error, float32"),
            ("largest32", "largest error, float32"),
            ("error64", "error, float64"),
            ("largest64", "largest error, float64"),
        ),
    ),
    "vae": Study(
        "A training step of a VAE",
        VAES,
        ("posterior", "batch"),
        lambda row: f"{row['posterior']}, batch {row['batch']}",
        "by hand",
        lambda rows, study: bars(rows, study, "ms", "processor time, ms", "linear"),
        tuple(
            Aim(ours, "by hand", 1.2, {"posterior": "normal", "batch": batch})
            for ours in ("ours", "ours, compiled")
            for batch in (100, 500)
        ),
        FIRST,
    ),
    "gap": Study(
        "Time to the evidence",
        GAP,
        ("target", "dim"),
        lambda row: f"{row['target']}, D={row['dim']}",
        "",
        lambda rows, study: bars(rows, study, "seconds", "wall seconds", "log"),
    ),
}
