"""Checkpoints: written whole or not at all, read without running code, resumed to the last bit."""

import errno
import itertools
import os
import pickle
import random
import runpy
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pyro_flowguides as fg
from pyro_flowguides.inference import checkpoint, flat_adam


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


def test_every_flipped_bit_is_refused_or_without_effect(tmp_path):
    path = tmp_path / "file"
    state = {"a": torch.arange(40.0), "b": {"c": [1, 2.5, "text"], "d": torch.ones(3, dtype=torch.int64)}}
    checkpoint.save(path, state)
    content, messages = path.read_bytes(), set()
    for position in range(0, 8 * len(content), 61):
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            loaded = checkpoint.load(path)
        except ValueError as error:
            messages.add(f"{error} {error.__cause__}")
        else:
            assert torch.equal(loaded["a"], state["a"])
            assert loaded["b"]["c"] == state["b"]["c"]
            assert torch.equal(loaded["b"]["d"], state["b"]["d"])
    assert any("part archive/data.pkl is damaged" in message for message in messages)
    assert all("file is not a checkpoint" in message and "weights_only" not in message for message in messages)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_state_that_is_not_finite_is_refused(tmp_path, value):
    checkpoint.save(tmp_path / "file", {"kind": "fit", "parameters": {"loc": torch.tensor([0.0, value])}})
    with pytest.raises(ValueError, match=r"resume: \['parameters'\]\['loc'\] is not finite"):
        fit(tmp_path / "file")


def test_a_compressed_file_is_refused_before_it_is_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "file", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**6))
    with pytest.raises(ValueError, match="is compressed"):
        checkpoint.load(tmp_path / "file")


@pytest.mark.parametrize("kind", ["vae run", "vae model", None])
def test_another_kind_of_checkpoint_is_named(tmp_path, kind):
    checkpoint.save(tmp_path / "file", {"kind": kind} if kind else {})
    description = checkpoint.KINDS.get(kind, "a checkpoint of an earlier version")
    with pytest.raises(ValueError, match=f"file is {description}, not a checkpoint of fit. Delete it, or choose"):
        fit(tmp_path / "file")


# -- disks, locks and interruptions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none/file", r"could not write .*none/file \(No such file or directory\). Create the folder"),
        ("text/file", r"could not write .*text/file \(Not a directory\). Create the folder"),
        ("", "it is a folder.*Choose the name of a file"),
    ],
)
def test_a_path_that_cannot_be_written_is_noticed_at_once(tmp_path, path, message):
    (tmp_path / "text").write_text("")
    with pytest.raises(OSError, match=message):
        fit(tmp_path / path, lambda: pytest.fail("the model ran"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["text"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_disk_that_cannot_be_written_is_noticed_at_once(tmp_path, monkeypatch, number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", fail)
    remedy = "Make room there" if number == errno.ENOSPC else "Choose a folder that you may write to"
    with pytest.raises(OSError, match=rf"could not write .*file \({os.strerror(number)}\). {remedy}"):
        fit(tmp_path / "file", lambda: pytest.fail("the model ran"))


@pytest.mark.parametrize("after", [1, 3])
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, after):
    """The first save, before the first step, shows that there is room."""
    whole, path, num_saves, fsync = fit(None), tmp_path / "file", itertools.count(1), os.fsync

    def fill(handle):
        if next(num_saves) == after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fill)
        intact = "there is no checkpoint yet" if after == 1 else "step 7 is intact, and the guide stands at step 14"
        message = rf"checkpoint .*file \(No space left on device\): .*{intact}. Make room there, and call fit again"
        with pytest.raises(OSError, match=message):
            fit(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"][: after - 1]
    assert same(parameters(fit(path)), parameters(whole))


def test_two_runs_cannot_use_one_file(tmp_path):
    path = tmp_path / "file"
    with (
        checkpoint.reserved(path),
        pytest.raises(BlockingIOError, match=rf"file is in use .*{os.getpid()}.*another path"),
    ):
        fit(path)
    assert list(tmp_path.iterdir()) == []
    for name in ("file.partial", "file.lock"):  # of a process that was killed
        (tmp_path / name).write_text("123456789")
    fit(path, steps=3)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_an_interrupted_fit_leaves_guide_and_checkpoint_usable(tmp_path, monkeypatch):
    """After Ctrl-C within an update, where scaled parameters hold the step alone for a moment."""
    expected, calls, adam = parameters(fit(None)), itertools.count(), flat_adam.adam
    guide = fg.AutoFlow(model, "planar", depth=2)

    def interrupt(*args, **options):
        adam(*args, **options)
        if next(calls) == 20:
            raise KeyboardInterrupt

    options = {"steps": 40, "num_particles": 8, "checkpoint_every": 7, "progress": False}
    with monkeypatch.context() as patch:
        patch.setattr(flat_adam, "adam", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fg.fit(model, guide, checkpoint=tmp_path / "file", **options)
    assert abs(guide.median()["x"] - 0.5) < 0.3
    result = fg.fit(model, guide, checkpoint=tmp_path / "file", **options)
    assert same(parameters(result), expected)


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


def program(y=1.0, prior=1.0, name="x", family=dist.Normal, function=torch.neg, size=2, dtype=torch.float64):
    """A model of which each argument is something that a checkpoint must know."""

    def model():
        loc = torch.zeros(size, dtype=dtype)
        x = pyro.sample(name, family(loc + prior, prior).to_event(1))
        pyro.sample("y", dist.Normal(function(x), 1.0).to_event(1), obs=torch.full((size,), y))

    return model


@pytest.mark.parametrize("kind", ["iaf", "normal"])
def test_a_checkpoint_of_another_fit_is_refused_with_what_differs(tmp_path, kind):
    def run(guide=None, **changes):
        target = program(**changes)
        guide = (guide or fg.AutoFlow)(target, **({"flow": "iaf", "hidden_dims": [4]} | options))
        options.clear()
        fit_options = {"steps": 10, "num_particles": 4, "progress": False}
        return fg.fit(target, guide, checkpoint=tmp_path / "file", **fit_options)

    def refused(message, guide=None, **changes):
        before = (tmp_path / "file").read_bytes()
        with pytest.raises(ValueError, match=f"checkpoint of other data, another model or guide: .*{message}"):
            run(guide, **changes)
        assert (tmp_path / "file").read_bytes() == before

    options: dict[str, object] = {}
    if kind == "normal":
        normal = lambda target, **_: AutoNormal(target)  # noqa: E731
        run(normal)
        refused("data 'y' has other values", normal, y=-8.0)
        refused("model's log density of 'x' has changed", normal, prior=2.0)
        return
    run()
    refused("data 'y' has other values", y=-8.0)
    refused("site 'x' is gone; site 'z' is new", name="z")
    refused("site 'x' was latent Normal .* and is latent LogNormal", family=dist.LogNormal)
    refused("site 'x' was latent Normal .* of shape .2,. and is .* of shape .3,.", size=3)
    refused("site 'x' was .* float64 .* and is .* float32", dtype=torch.float32)
    refused("model's log density of 'x' has changed", prior=2.0)
    refused("model's log density of 'y' has changed", function=torch.sin)
    for option, value, message in [
        ("activation", torch.tanh, "activation' was silu and is tanh"),
        ("update", "gated", "update' was affine and is gated"),
        ("depth", 4, "parts.3' is new"),
    ]:
        options[option] = value
        refused(message)
    refused("guide 'class' was AutoFlow and is AutoIAF", lambda target, flow, **o: fg.AutoIAF(target, **o))


def drawn_anew():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 2, subsample_size=1):
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor([random.gauss(0.0, 1.0)]))


@pytest.mark.parametrize("target", [model, minibatch, drawn_anew])
def test_the_same_call_resumes_in_the_same_process(tmp_path, target):
    """Without a cleared store, the second guide's parameters have other names in it."""
    options = {"num_particles": 4, "checkpoint": tmp_path / "file", "progress": False}
    first, again, longer = (
        fg.fit(target, fg.AutoNICE(target, depth=1) if target is model else AutoNormal(target), steps=steps, **options)
        for steps in (10, 10, 20)
    )
    assert again.elbo_history == first.elbo_history
    assert longer.elbo_history[:10] == first.elbo_history
    assert len(longer.elbo_history) == (20 if target is not model else longer.steps) > 10


def test_more_steps_before_the_refinement_change_nothing_else(tmp_path, monkeypatch):
    options = {"warm_start": False, "target": one_by_one, "checkpoint_every": 3}
    whole = fit(None, steps=16, **options)
    interrupted(tmp_path / "file", monkeypatch, 1, steps=12, **options)
    resumed = fit(tmp_path / "file", steps=16, **options)
    assert (resumed.elbo_history, resumed.reason) == (whole.elbo_history, whole.reason)
    assert same(parameters(resumed), parameters(whole))


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
    script.write_text(SCRIPT.format(root=root).replace("STEPS", "400"))
    file, env = tmp_path / "file", {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(file), str(tmp_path / "resumed")]
    process = subprocess.Popen(command, env=env)

    def saved_step():
        state = checkpoint.load(file)
        return state["schedule"]["step"] if state else 0

    try:
        deadline = time.monotonic() + 120
        while saved_step() == 0 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "resumed").exists()
    assert 0 < saved_step() < 400
    subprocess.run(command, env=env, check=True, timeout=120)
    pyro.clear_param_store()
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "whole")])
    runpy.run_path(str(script))
    whole, resumed = (torch.load(tmp_path / name, weights_only=True) for name in ("whole", "resumed"))
    assert same(whole, resumed)
