"""Checkpoints: written whole or not at all, read without running code, resumed to the last bit."""

import itertools
import os
import pickle
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flowguides as fg
from pyro_flowguides.inference import checkpoint


@pytest.fixture(autouse=True)
def _double_precision(_fresh_state):
    torch.set_default_dtype(torch.float64)


def model():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(1.0))


def fit(path, target=model, **options):
    pyro.clear_param_store()
    guide = fg.AutoFlow(target, "planar", depth=2)
    options = {"steps": 40, "num_particles": 8, "checkpoint_every": 7, "progress": False, **options}
    return fg.fit(target, guide, checkpoint=path, **options)


def parameters(result):
    return {name: value.detach().clone() for name, value in result.guide.named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# -- the file ----------------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    state = {"a": torch.arange(3.0), "b": [1.5, float("inf")], "c": {"d": "text", "e": None}}
    checkpoint.save(tmp_path / "file", state)
    loaded = checkpoint.load(tmp_path / "file")
    assert torch.equal(loaded["a"], state["a"])
    assert (loaded["b"], loaded["c"]) == (state["b"], state["c"])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert checkpoint.load(tmp_path / "none") is None


@pytest.mark.parametrize("where", ["torch.save", "os.fsync", "os.replace"])
def test_a_failure_while_writing_leaves_the_old_file(tmp_path, monkeypatch, where):
    path = tmp_path / "file"
    checkpoint.save(path, {"a": 1})
    before = path.read_bytes()

    def fail(*args, **kwargs):
        if where == "torch.save":
            args[1].write(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(torch if where == "torch.save" else os, where.split(".")[1], fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(path, {"a": 2})
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        checkpoint.save(tmp_path / "missing" / "file", {})


class _Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_loading_a_file_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": checkpoint.FORMAT, "a": _Bomb()}, "file")
    with pytest.raises(ValueError, match="not a checkpoint"):
        checkpoint.load("file")
    assert not Path("exploded").exists()
    torch.load("file", weights_only=False)
    assert Path("exploded").exists()  # the file would run code if it were trusted


def truncate(path):
    data = bytearray(path.read_bytes())
    path.write_bytes(data[: len(data) // 2])


def damage(path, content):
    if callable(content):
        return content(path)
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)


@pytest.mark.parametrize(
    "content",
    [truncate, b"", b"no checkpoint", pickle.dumps({"a": 1}), {"a": 1}, torch.ones(3), {"parameters": {}}],
    ids=["half", "empty", "text", "pickle", "dict", "tensor", "other dict"],
)
def test_other_files_are_refused_and_left_as_they_are(tmp_path, content):
    path = tmp_path / "file"
    fit(path, steps=10)
    damage(path, content)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"file is not a checkpoint"):
        fit(path, steps=10)
    assert path.read_bytes() == before


# -- resuming ----------------------------------------------------------------------------------------------------------


class _Stop(Exception):
    """The fit is interrupted."""


def interrupted(path, monkeypatch, after, **options):
    """Stop a fit after some of its saves."""
    num_saves, save = itertools.count(1), checkpoint.save

    def save_and_stop(*args):
        save(*args)
        if next(num_saves) == after + 1:  # the first is before the first step
            raise _Stop

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_stop)
        with pytest.raises(_Stop):
            fit(path, **options)


def minibatch():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 10, subsample_size=5) as index:
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.arange(10.0)[index])


def one_by_one():
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x.sum(), 1.0), obs=torch.tensor(1.0))


@pytest.mark.parametrize(
    ("target", "after", "options"),
    [
        (model, 1, {}),
        (model, 5, {}),  # while averaging
        (model, 4, {"temper": 0.1}),
        (model, 3, {"importance": 4}),
        (minibatch, 2, {}),  # draws from the global generator
        (one_by_one, 2, {"steps": 12, "checkpoint_every": 3}),
    ],
    ids=["exploring", "averaging", "tempered", "importance", "minibatch", "traces"],
)
def test_resuming_changes_nothing(tmp_path, monkeypatch, target, after, options):
    whole = fit(None, target, **options)
    expected = parameters(whole)
    interrupted(tmp_path / "file", monkeypatch, after, target=target, **options)
    torch.manual_seed(99)
    torch.randn(7)
    resumed = fit(tmp_path / "file", target, **options)
    assert same(parameters(resumed), expected)
    assert resumed.elbo_history == whole.elbo_history
    assert (resumed.start, resumed.reason, resumed.num_dropped) == (whole.start, whole.reason, whole.num_dropped)


def test_a_finished_fit_is_resumed_without_further_steps(tmp_path):
    first = fit(tmp_path / "file")
    expected = parameters(first)
    again = fit(tmp_path / "file")
    assert same(parameters(again), expected)
    assert again.elbo_history == first.elbo_history
    assert again.seconds >= checkpoint.load(tmp_path / "file")["seconds"] - 1e-6 > 0


def test_seconds_add_up_over_processes(tmp_path, monkeypatch):
    interrupted(tmp_path / "file", monkeypatch, 1)
    state = checkpoint.load(tmp_path / "file")
    checkpoint.save(tmp_path / "file", {**state, "seconds": 1000.0})
    assert fit(tmp_path / "file").seconds > 1000


def other():
    pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    fit(tmp_path / "file", steps=10)
    with pytest.raises(ValueError, match="checkpoint of other data, another model or guide"):
        fit(tmp_path / "file", other, steps=10)


@pytest.mark.parametrize(
    "options", [{"steps": 9}, {"seed": 1}, {"num_particles": 4}, {"path_gradient": False}], ids=str
)
def test_a_checkpoint_of_other_settings_is_refused(tmp_path, options):
    fit(tmp_path / "file", steps=10)
    with pytest.raises(ValueError, match=f"other settings.*{next(iter(options))}="):
        fit(tmp_path / "file", **{"steps": 10, **options})


def test_a_checkpoint_of_another_device_is_refused(tmp_path):
    """Generators of other devices have states of other sizes."""
    fit(tmp_path / "file", steps=10)
    state = checkpoint.load(tmp_path / "file")
    checkpoint.save(tmp_path / "file", {**state, "generator": state["generator"][:16]})
    with pytest.raises(ValueError, match="another kind of device"):
        fit(tmp_path / "file", steps=10)


SCRIPT = """
import sys, torch
sys.path.insert(0, {root!r})
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
import pyro, pyro.distributions as dist, pyro_flowguides as fg

def model():
    x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x.square(), 1.0).to_event(1), obs=torch.ones(3))

guide = fg.AutoFlow(model, "iaf", depth=2, hidden_dims=[8])
checkpoint = sys.argv[1] if len(sys.argv) > 2 else None
fg.fit(model, guide, steps=STEPS, num_particles=8, tolerance=1e-9, checkpoint=checkpoint, checkpoint_every=7,
       progress=False)
torch.save(guide.state_dict(), sys.argv[-1])
"""


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, monkeypatch):
    """A process is killed without warning while it works; another takes over."""
    root = str(Path(__file__).parents[2])
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(root=root).replace("STEPS", "600"))
    file, env = tmp_path / "file", {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(file), str(tmp_path / "resumed")]
    process = subprocess.Popen(command, env=env)
    try:
        deadline = time.monotonic() + 120
        while not file.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        assert file.exists()
        time.sleep(0.2)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "resumed").exists()
    step = checkpoint.load(file)["schedule"]["step"]
    assert 0 < step < 600
    subprocess.run(command, env=env, check=True, timeout=120)
    pyro.clear_param_store()
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "whole")])
    runpy.run_path(str(script))
    whole, resumed = (torch.load(tmp_path / name, weights_only=True) for name in ("whole", "resumed"))
    assert same(whole, resumed)
