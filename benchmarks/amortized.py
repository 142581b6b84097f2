"""The example ``vae_three_lines.py`` for several seeds: what an IAF posterior gains on the digits of scikit-learn.

    python benchmarks/amortized.py

Every posterior and seed is a row of ``amortized.csv``; an interrupted program resumes where it stopped. The table
``amortized.md`` is made from all rows.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import sys
from pathlib import Path
from typing import Any

import pyro
import torch
from row_files import append_row, read_rows
from tables import markdown_table

RESULTS = Path(__file__).parent / "results" / "amortized.csv"
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
example: Any = importlib.import_module("vae_three_lines")
VAES = {"diagonal Gaussian": example.PlainVAE, "IAF": example.FlowVAE}


def measure(posterior: str, seed: int, epochs: int) -> dict[str, Any]:
    """Train and evaluate a VAE as the example does, and return its row."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    training, test = example.digits()
    pyro.set_rng_seed(seed)
    vae = VAES[posterior]()
    example.train(vae, training, epochs)
    elbo, log_likelihood = example.evaluate(vae, test)
    return {
        "posterior": posterior,
        "seed": seed,
        "epochs": epochs,
        "elbo": f"{elbo:.2f}",
        "log_likelihood": f"{log_likelihood:.2f}",
        "gap": f"{log_likelihood - elbo:.2f}",
        "date": datetime.date.today(),
        "versions": f"torch {torch.__version__}, Pyro {pyro.__version__}",
    }


def write_table(path: Path) -> str:
    """Write the table beside the CSV file, and return its text."""
    rows = read_rows(path)
    header = ["posterior", "seed", "ELBO", "log p(x)", "gap"]
    cells = [[row[name] for name in ("posterior", "seed", "elbo", "log_likelihood", "gap")] for row in rows]
    text = (
        f"`python benchmarks/amortized.py`, {rows[0]['date']}, {rows[0]['versions']}; {rows[0]['epochs']} epochs, nats "
        f"per test image.\n\n{markdown_table(header, cells)}\n"
    )
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file; its rows are kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seeds:
        for posterior in VAES:
            key = {"posterior": posterior, "seed": str(seed), "epochs": str(options.epochs)}
            if not any(key.items() <= row.items() for row in read_rows(options.output)):
                append_row(options.output, measure(posterior, seed, options.epochs))
    print(write_table(options.output))


if __name__ == "__main__":
    main()
