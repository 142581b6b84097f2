"""Faults on purpose: kills, flipped bits, full disks, and many fits in one process.

    python benchmarks/faults.py --scale 1

Every study is a row of ``faults.csv``, which is written anew; ``--studies`` runs some of them and leaves other rows.
The table ``faults.md`` is made from all rows. Runs are processes of their own, which a fork starts without importing
anything again, and which SIGKILL ends at random times.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from machine import processor
from row_files import append_row, read_rows
from tables import markdown_table

import pyro_flowguides as fg
from pyro_flowguides.inference import checkpoint as checkpoints
from pyro_flowguides.vae import Settings, train

RESULTS = Path(__file__).parent / "results" / "faults.csv"
STUDIES = ("kills of fit", "kills of VAE training", "flipped bits", "full disks", "fits in one process")
#: Trials of each study at scale 1.
TRIALS = dict(zip(STUDIES, (100, 50, 3000, 20, 200), strict=True))
#: Growth of the longest time to the next kill of a run, so that one that mostly sets up comes to its end.
GROWTH = 1.1
#: Exit status of a run that was refused, with a message for the user.
REFUSED = 3
#: Entries of a checkpoint that tell the time.
CLOCKS = ("seconds", "images_per_second")


def model() -> None:
    x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x.square(), 1.0).to_event(1), obs=torch.ones(3))


def fit(path: Path, steps: int = 200) -> None:
    """Fit a guide with a bimodal posterior, which takes all its steps."""
    guide = fg.AutoIAF(model, depth=2, hidden_dims=[16])
    options: dict[str, Any] = {"num_particles": 8, "tolerance": 1e-9, "checkpoint_every": 20, "progress": False}
    fg.fit(model, guide, steps=steps, checkpoint=path, **options)


def train_vae(path: Path, epochs: int = 5) -> None:
    """Train a small VAE on the digits of scikit-learn; ``path`` is the checkpoint in its folder."""
    settings = Settings(
        model_options={"hidden": [32]},
        posterior_options={"depth": 2, "hidden_dims": [16]},
        latent_dim=4,
        epochs=epochs,
        warmup=2,
        iw_images=0,
        accelerator="cpu",
        tensorboard=False,
        progress=False,
        output=str(path.parent),
    )
    train(settings)


# -- processes ---------------------------------------------------------------------------------------------------------


def start(function: Callable[[], None]) -> int:
    """Run a function in a new process, with its output thrown away, and return the process's number."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        pyro.clear_param_store()
        function()
        status = 0
    except (OSError, ValueError):
        status = REFUSED
    except BaseException:
        traceback.print_exc()
    os._exit(status)


def wait(process: int) -> int:
    """Return the exit status of a process, the negative number of its signal if one ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill_after(process: int, seconds: float) -> bool:
    """Kill a process after some time; tell whether it was still running."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    return wait(process) == -signal.SIGKILL


def is_same(one: object, other: object) -> bool:
    """Compare the contents of two checkpoints to the last bit, except for times."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        keys = one.keys() - set(CLOCKS)
        return keys == other.keys() - set(CLOCKS) and all(is_same(one[key], other[key]) for key in keys)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(is_same, one, other))
    return type(one) is type(other) and (one == other or one != one)


# -- studies -----------------------------------------------------------------------------------------------------------


def run_with_kills(run: Callable[[Path], None], name: str, trials: int, folder: Path) -> dict[str, int]:
    """Kill a run at random times and resume it until it ends; compare its last checkpoint with that of a whole run."""
    whole = folder / "whole" / name
    whole.parent.mkdir()
    run(whole)  # imports what later processes need, which a fork then shares
    shutil.rmtree(whole.parent)
    whole.parent.mkdir()
    begin = time.monotonic()
    if wait(start(lambda: run(whole))):
        raise RuntimeError("a run without faults has failed")
    duration, expected = time.monotonic() - begin, checkpoints.load(whole)
    counts: Counter[str] = Counter()
    while counts["trials"] < trials:
        path = folder / f"run {counts['runs']}" / name
        path.parent.mkdir()
        longest = 0.8 * duration
        while kill_after(start(lambda path=path: run(path)), random.uniform(0, longest)):  # type: ignore[misc]
            counts["trials"] += 1
            longest *= GROWTH
        counts["runs"] += 1
        counts["identical" if is_same(checkpoints.load(path), expected) else "different"] += 1
        if list(path.parent.glob("*.partial")):
            raise RuntimeError(f"{path.parent} holds a file that is half written")
        shutil.rmtree(path.parent)
    return counts


def kills_of_fit(trials: int, folder: Path) -> dict[str, int]:
    return run_with_kills(fit, "fit.pt", trials, folder)


def kills_of_vae_training(trials: int, folder: Path) -> dict[str, int]:
    return run_with_kills(train_vae, "last.pt", trials, folder)


def flipped_bits(trials: int, folder: Path) -> dict[str, int]:
    """Flip one bit of a checkpoint of each kind, and read it."""
    (folder / "vae").mkdir()
    paths = [folder / "fit.pt", folder / "vae" / "last.pt", folder / "vae" / "best.pt"]
    fit(paths[0], 40)
    train_vae(paths[1], 1)
    contents, states = [path.read_bytes() for path in paths], [checkpoints.load(path) for path in paths]
    counts: Counter[str] = Counter()
    damaged = folder / "damaged.pt"
    for number in range(trials):
        content, state = (each[number % len(paths)] for each in (contents, states))
        position = random.randrange(8 * len(content))  # type: ignore[arg-type]
        flipped = bytearray(content)  # type: ignore[arg-type]
        flipped[position // 8] ^= 1 << position % 8
        damaged.write_bytes(flipped)
        counts["trials"] += 1
        try:
            counts["identical" if is_same(checkpoints.load(damaged), state) else "different"] += 1
        except ValueError:
            counts["refused"] += 1
    return counts


def full_disks(trials: int, folder: Path) -> dict[str, int]:
    """Limit the size of files, as a full disk does, to a random size; then resume without the limit."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        fit(path, steps)

    steps, whole, path = 60, folder / "whole.pt", folder / "fit.pt"
    fit(whole, steps)
    size, expected = whole.stat().st_size, checkpoints.load(whole)
    counts: Counter[str] = Counter()
    for _ in range(trials):
        limit = random.randrange(round(1.05 * size))
        status = wait(start(limited))
        counts["trials"] += 1
        counts["refused"] += status == REFUSED
        if status not in (0, REFUSED) or {entry.name for entry in folder.iterdir()} - {"whole.pt", "fit.pt"}:
            raise RuntimeError(f"a full disk ended the fit with status {status}, or left files")
        resumed = wait(start(lambda: fit(path, steps))) == 0 and is_same(checkpoints.load(path), expected)
        counts["identical" if resumed else "different"] += 1
        path.unlink(missing_ok=True)
    return counts


def fits_in_one_process(trials: int, folder: Path) -> dict[str, int]:
    """Fit many guides in one process; note memory and entries of the parameter store after 10 % and at the end."""

    def run() -> None:
        for number in range(1, trials + 1):
            fg.fit(model, fg.AutoIAF(model), steps=40, num_particles=8, seed=number, progress=False)
            for _ in range((number == max(1, trials // 10)) + (number == trials)):
                memory = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
                with notes.open("a") as file:
                    file.write(f"{number} {memory} {len(pyro.get_param_store())}\n")

    notes = folder / "notes"
    if wait(start(run)):
        raise RuntimeError("the fits have failed")
    (first, memory, entries), (last, memory_after, entries_after) = (
        map(int, line.split()) for line in notes.read_text().splitlines()
    )
    kib = (memory_after - memory) / 1024
    return {
        "trials": trials,
        "kib_per_fit": round(kib / max(1, last - first)),
        "mib": round(kib / 1024),
        "new_entries": entries_after - entries,
    }


COLUMNS = ("trials", "runs", "identical", "refused", "different", "kib_per_fit", "mib", "new_entries")


def measure(study: str, scale: float, seed: int) -> dict[str, Any]:
    """Return the row of a study."""
    random.seed(seed)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        counts = globals()[study.lower().replace(" ", "_")](max(1, round(scale * TRIALS[study])), Path(folder))
    return {
        "study": study,
        **{column: counts.get(column, 0 if column in ("refused", "different") else "") for column in COLUMNS},
        "seconds": round(time.monotonic() - begin),
        "date": datetime.date.today(),
        "machine": f"torch {torch.__version__}, Pyro {pyro.__version__}, one thread on {processor()}",
    }


def write_table(path: Path) -> str:
    """Write the table beside the CSV file, and return its text."""
    rows = read_rows(path)
    header = ["fault", "number", "runs to the end", "same result", "refused", "other result", "seconds"]
    names = ("study", "trials", "runs", "identical", "refused", "different", "seconds")
    cells = [[row[name] or "-" for name in names] for row in rows if not row["kib_per_fit"]]
    text = f"""`python benchmarks/faults.py`, {rows[0]["date"]}, {rows[0]["machine"]}.

{markdown_table(header, cells)}
"""
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on all numbers of trials")
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=STUDIES)
    parser.add_argument("--seed", type=int, default=0, help="seed of the times of kills, positions of bits and sizes")
    parser.add_argument("--output", type=Path, default=RESULTS, help="CSV file; rows of other studies are kept")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for study in options.studies:
        row = measure(study, options.scale, options.seed)
        print({name: value for name, value in row.items() if value != ""}, file=sys.stderr)
        rows: dict[str, Any] = {other["study"]: other for other in read_rows(options.output)} | {study: row}
        options.output.unlink(missing_ok=True)
        for name in STUDIES:
            if name in rows:
                append_row(options.output, rows[name])
    print(write_table(options.output))


if __name__ == "__main__":
    main()
