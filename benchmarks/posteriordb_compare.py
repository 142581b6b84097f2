"""Two versions of the package side by side, from the rows that ``posteriordb.py`` wrote with either.

    python benchmarks/posteriordb_compare.py before.csv after.csv --output results/posteriordb_rooms.md

Fits are matched by posterior, guide and seed. The gap is the estimated log evidence less the ELBO, in nats.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

from row_files import read_rows
from tables import markdown_table

Fits = dict[tuple[str, str, str], dict[str, str]]
HEADER = ["posterior", "guide", "seed", "gap before", "gap after", "steps before", "steps after"]
HEADER += ["verdict before", "verdict after", "processor s before", "processor s after", "ratio"]


def read_fits(path: Path) -> Fits:
    """Return the rows of a file by posterior, guide and seed."""
    return {(row["posterior"], row["guide"], row["seed"]): row for row in read_rows(path)}


def gap(row: dict[str, str]) -> float:
    return float(row["log_evidence"]) - float(row["elbo"])


def ratio(before: dict[str, str], after: dict[str, str]) -> float:
    return float(after["cpu_seconds"]) / float(before["cpu_seconds"])


def cells(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Return what was measured in both fits, side by side."""
    formulas: list[Callable[[dict[str, str]], str]] = [
        lambda row: f"{gap(row):.4f}",
        lambda row: row["steps"],
        lambda row: row["verdict"],
        lambda row: f"{float(row['cpu_seconds']):.2f}",
    ]
    return [formula(row) for formula in formulas for row in (before, after)] + [f"{ratio(before, after):.2f}"]


def compare(before: Fits, after: Fits) -> str:
    """Return the table of all fits that both files hold, and a sentence on the whole.

    Raises:
        ValueError: if they have none in common.
    """
    common = sorted(before.keys() & after.keys())
    if not common:
        raise ValueError("the two files have no fit in common: posterior, guide and seed must be the same")
    pairs = [(before[key], after[key]) for key in common]
    rows = [[*key, *cells(*pair)] for key, pair in zip(common, pairs, strict=True)]
    seconds = [sum(float(pair[place]["cpu_seconds"]) for pair in pairs) for place in (0, 1)]
    changed = sum(old["verdict"] != new["verdict"] for old, new in pairs)
    largest = max(abs(gap(new) - gap(old)) for old, new in pairs)
    one, other = (next(iter(fits.values())) for fits in (before, after))
    return f"""# Default fits, before and after

- Before: {one["versions"]}
- After: {other["versions"]}
- {other["date"]}, {other["hardware"]}, one fit at a time

{len(common)} fits. Verdicts that changed: {changed}. Largest change of a gap: {largest:.4f} nats. Processor time in
all: {seconds[0]:.0f} s before, {seconds[1]:.0f} s after, a ratio of {seconds[1] / seconds[0]:.2f}. Median ratio of
a fit: {statistics.median(ratio(*pair) for pair in pairs):.2f}.

{markdown_table(HEADER, rows)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="CSV file of the earlier version")
    parser.add_argument("after", type=Path, help="CSV file of the later version")
    parser.add_argument("--output", type=Path, required=True, help="Markdown file, written anew")
    options = parser.parse_args()
    text = compare(read_fits(options.before), read_fits(options.after))
    options.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
