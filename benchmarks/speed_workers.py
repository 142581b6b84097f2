"""The competitors of speed.py, each in a process of its own, and the protocol between that process and the program.

    PYTHON benchmarks/speed_workers.py STUDY COMPETITOR

Each line is a JSON object. The worker begins with ``{"versions": ...}`` and then answers requests, one at a time:

- ``{"setup": SETTING}`` by ``{"first": seconds to the end of the first call, "call": seconds of one call, "facts":
  {...}}``;
- ``{"run": n}``, for n calls, by ``{"ms": processor milliseconds of a step}``;
- anything it cannot do by ``{"left_out": reason}``, also instead of the versions.

This file needs only the standard library, so that every competitor can run in the interpreter that has its library.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

#: One thread each, so that processor time is the time of the work.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}
#: Largest D with networks of width D.
WIDE_LIMIT = 2000
PACKAGES = ("torch", "pyro-ppl", "numpyro", "jax", "flowjax", "zuko", "normflows")


@dataclass(frozen=True)
class Job:
    """The work of a competitor: a call, the steps it takes, the number of untimed calls, and facts to report."""

    call: Callable[[], Any]
    steps: int = 1
    warm_up: int = 5
    facts: Callable[[], Mapping[str, Any]] = dict


@dataclass(frozen=True)
class Competitor:
    """The function that makes the job of a competitor: module, name, interpreter and options."""

    module: str
    function: str
    interpreter: str = "own"
    options: Mapping[str, Any] = field(default_factory=dict)


COMPETITORS: dict[str, dict[str, Competitor]] = {
    "steps": {
        "Pyro SVI": Competitor("speed_ours", "pyro_steps"),
        "fit": Competitor("speed_ours", "our_steps"),
        "fit, compiled": Competitor("speed_ours", "our_steps", options={"compiling": True}),
        "fit, compiled, again": Competitor("speed_ours", "our_steps", options={"compiling": True}),
        "by hand": Competitor("speed_torch", "by_hand"),
        "NumPyro, loop": Competitor("speed_jax", "numpyro_steps", "numpyro"),
        "NumPyro, scan": Competitor("speed_jax", "numpyro_steps", "numpyro", {"scan": True}),
        "FlowJAX, loop": Competitor("speed_jax", "flowjax_steps", "numpyro"),
        "zuko": Competitor("speed_peers", "zuko_steps", "peers"),
        "normflows": Competitor("speed_peers", "normflows_steps", "peers"),
        "floor: matrix products": Competitor("speed_torch", "floor", options={"memory": False}),
        "floor: memory traffic": Competitor("speed_torch", "floor", options={"products": False}),
        "floor: both": Competitor("speed_torch", "floor"),
    },
    "inverse": {
        "one coordinate after the other": Competitor("speed_ours", "sequential_inverse"),
        "ours": Competitor("speed_ours", "our_inverse"),
        "zuko": Competitor("speed_peers", "zuko_inverse", "peers"),
        "normflows": Competitor("speed_peers", "normflows_inverse", "peers"),
    },
    "vae": {
        "by hand": Competitor("speed_vae", "training_step", options={"loop": "by hand"}),
        "ours": Competitor("speed_vae", "training_step", options={"loop": "ours"}),
        "ours, compiled": Competitor("speed_vae", "training_step", options={"loop": "ours", "compiling": True}),
        "Pyro SVI": Competitor("speed_vae", "training_step", options={"loop": "Pyro SVI"}),
    },
    "gap": {
        "fit": Competitor("speed_ours", "our_gap"),
        'fit, compile="auto"': Competitor("speed_ours", "our_gap", options={"compiling": "auto"}),
        "Pyro AutoIAFNormal": Competitor("speed_ours", "pyro_gap"),
        "NumPyro AutoIAFNormal": Competitor("speed_jax", "numpyro_gap", "numpyro"),
    },
}


class LeftOut(Exception):
    """A competitor cannot run in a setting."""


def not_below(dim: int, hidden: int) -> list[int]:
    """Return the widths of two hidden layers for Pyro and NumPyro, which take none below D."""
    if dim > WIDE_LIMIT:
        raise LeftOut("takes no widths below D, and with D its weights and Adam's averages are gigabytes")
    return [max(dim, hidden)] * 2


# -- in the worker -----------------------------------------------------------------------------------------------------


def clock(device: str) -> Callable[[], float]:
    """Return a clock of processor seconds; on a GPU, of wall seconds at the end of all work."""
    if device == "cpu":
        return time.process_time
    import torch

    def after_all() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return after_all


def versions() -> dict[str, str]:
    """Return the versions of the installed packages."""
    installed = {"Python": sys.version.split()[0]}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            installed[name] = version(name)
    return installed


class Server:
    """The worker's side: answers the requests about one competitor."""

    def __init__(self, competitor: Competitor, device: str) -> None:
        self.options, self.now, self.job = competitor.options, clock(device), Job(lambda: None)
        self.make = getattr(importlib.import_module(competitor.module), competitor.function)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        return self.setup(request["setup"]) if "setup" in request else self.run(request["run"])

    def setup(self, setting: dict[str, Any]) -> dict[str, Any]:
        begin = time.perf_counter()
        self.job = self.make(**setting, **self.options)
        self.job.call()
        first = time.perf_counter() - begin
        begin = self.now()
        for _ in range(self.job.warm_up):
            self.job.call()
        call = (self.now() - begin) / max(1, self.job.warm_up)
        return {"first": first, "call": call, "facts": self.job.facts()}

    def run(self, calls: int) -> dict[str, Any]:
        begin = self.now()
        for _ in range(calls):
            self.job.call()
        return {"ms": 1e3 * (self.now() - begin) / (calls * self.job.steps)}


def serve(study: str, name: str, device: str) -> None:
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print to stderr, not into the answers

    def attempt(work: Callable[[], dict[str, Any]]) -> bool:
        try:
            answer = work()
        except Exception as error:  # a competitor may fail in any way
            kind = "" if isinstance(error, (LeftOut, ImportError)) else f"{type(error).__name__}: "
            answer = {"left_out": kind + (str(error).splitlines() or [""])[0][:200]}
        print(json.dumps(answer), file=channel)
        return "left_out" not in answer

    server: Server

    def start() -> dict[str, Any]:
        nonlocal server
        server = Server(COMPETITORS[study][name], device)
        return {"versions": versions()}

    if attempt(start):
        for line in sys.stdin:
            request = json.loads(line)
            attempt(partial(server.answer, request))


# -- in the program ----------------------------------------------------------------------------------------------------


class Worker:
    """The program's side: the process of a competitor.

    ``left_out`` is the reason why it takes no part in the current setting; with ``is_hopeless``, in any setting.
    """

    def __init__(self, study: str, name: str, interpreters: Mapping[str, str], device: str, cache: Path) -> None:
        self.name, self.left_out, self.is_hopeless = name, "", False
        kind = COMPETITORS[study][name].interpreter
        self.process: subprocess.Popen[str] | None = None
        self.versions: dict[str, str] = {}
        if kind not in interpreters:
            self.left_out, self.is_hopeless = "measured on the processor only", True
            return
        environment = {**os.environ, **ONE_THREAD, "SPEED_DEVICE": device, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
        command = [interpreters[kind], str(Path(__file__)), study, name, "--device", device]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        try:
            self.process = subprocess.Popen(command, **pipes, text=True, env=environment)
        except OSError as error:
            self.left_out, self.is_hopeless = str(error), True

    def start(self) -> None:
        """Wait until the process is ready."""
        if self.process is not None:
            answer = self._read()
            self.versions = answer.get("versions", {})
            self.is_hopeless = bool(self.left_out)

    def ask(self, **request: Any) -> dict[str, Any]:
        """Return the answer to a request, or an empty dictionary if there is none."""
        if self.is_hopeless or self.process is None or self.process.stdin is None:
            return {}
        self.left_out = ""
        with suppress(BrokenPipeError):
            print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process is not None
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"left_out": "its process ended"}
        self.left_out = answer.get("left_out", "")
        self.is_hopeless = self.is_hopeless or not line
        return {} if self.left_out else answer

    def stop(self) -> None:
        if self.process is not None:
            with suppress(BrokenPipeError):
                self.process.communicate()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=COMPETITORS)
    parser.add_argument("name")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    # The modules of the competitors import this module under its name, not as __main__.
    importlib.import_module("speed_workers").serve(arguments.study, arguments.name, arguments.device)
