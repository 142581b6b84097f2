"""Numbers in the prose of the documentation are those of the CSV files, and each one that is defined is used."""

from __future__ import annotations

import csv
import importlib
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
sys.path += [str(ROOT / "docs" / "_ext"), str(ROOT / "benchmarks")]
measured = importlib.import_module("measured_numbers")
tables = importlib.import_module("flow_tables")
FLOWS = importlib.import_module("pyro_flowguides.flows").FLOWS


@pytest.fixture(scope="module")
def numbers():
    return measured.read_numbers()


@pytest.fixture
def results(tmp_path):
    """A copy of the results that a test may change."""
    return shutil.copytree(RESULTS, tmp_path / "results")


def change(path: Path, column: str, value: str | None, **where: str) -> None:
    """Set a column of the rows with these values; remove the rows if the value is None."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    chosen = [row for row in rows if where.items() <= row.items()]
    assert chosen
    for row in chosen:
        row[column] = value
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(row for row in rows if row[column] is not None)


def test_every_number_is_used_and_every_used_number_is_defined(numbers):
    pages = "\n".join(page.read_text("utf-8") for page in (ROOT / "docs").glob("*.md"))
    used = set(re.findall(r"{{ (\w+\.\w+) }}", pages))
    assert used == {f"{page}.{name}" for page, values in numbers.items() for name in values}
    others = set(re.findall(r"{{ (\w+) }}", pages))
    assert others == {"flows", "layers"}


def test_no_number_is_missing(numbers):
    for page, values in numbers.items():
        for name, text in values.items():
            assert re.fullmatch(r"[0-9.,]+( to [0-9.,]+)?", text), f"{page}.{name}: {text}"


def test_numbers_follow_the_rows(results):
    change(
        results / "speed_steps.csv", "rounds", "8 9 10", competitor="Pyro SVI", dim="10", particles="32", hidden="64"
    )
    change(results / "speed_steps.csv", "rounds", "2 3 4", competitor="fit", dim="10", particles="32", hidden="64")
    change(results / "speed_gap.csv", "near", "False", competitor="fit", dim="100")
    change(results / "posteriordb.csv", "mean_error", "0.2", guide="iaf", posterior="arK-arK")
    change(results / "amortized.csv", "elbo", "-17.88", posterior="IAF", seed="2")
    numbers = measured.read_numbers(results)
    assert numbers["speed"]["eager_10"] == "3.0"  # the median of 8/2, 9/3 and 10/4
    assert numbers["speed"]["gap_fit"] == "2"
    assert numbers["posteriordb"]["iaf_reached"] == "9"
    assert numbers["amortized"]["gain"] == "0.1 to 1.0"


def test_a_missing_row_is_named(results):
    change(results / "vlae_compare.csv", "model", None, model="VLAE")
    with pytest.raises(LookupError, match=r"vlae_compare\.csv has no row with {'model': 'VLAE', 'steps': 2000"):
        measured.read_numbers(results)


def test_a_competitor_that_was_left_out_is_named(results):
    change(results / "speed_steps.csv", "rounds", "", competitor="NumPyro, scan")
    with pytest.raises(LookupError, match=r"speed_steps\.csv has no times of fit, compiled and NumPyro, scan with"):
        measured.read_numbers(results)


def test_an_ambiguous_row_is_named(results):
    change(results / "vlae_frey.csv", "model", "VLAE", model="VAE")
    with pytest.raises(LookupError, match=r"vlae_frey\.csv has 2 rows with {'model': 'VLAE'}"):
        measured.read_numbers(results)


@pytest.mark.parametrize(
    ("count", "value", "text"),
    [
        (2, 5.78, "5.8"),
        (2, 20.6, "21"),
        (2, 22951.0, "23,000"),
        (2, 0.0123, "0.012"),
        (2, 0.997, "1.0"),
        (1, 6.67, "7"),
    ],
)
def test_significant_digits(count, value, text):
    assert measured.digits(count, value) == text


def test_the_table_of_flows_is_the_registry():
    rows = [line.split("|")[1].strip() for line in tables.flow_tables()["flows"].splitlines()[2:]]
    assert rows == [f"`{name}`" for name in FLOWS]
