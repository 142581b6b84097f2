"""The training program: results, errors, exact resumption and several processes."""

import csv
import dataclasses
import errno
import functools
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightning_fabric")
pytest.importorskip("sklearn")
pytest.importorskip("tensorboard")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pyro_flowguides.inference import checkpoint as checkpoints
from pyro_flowguides.vae import MODELS, Settings, TrainingDivergedError, load_images, load_model, train
from pyro_flowguides.vae.__main__ import main
from pyro_flowguides.vae.training.ema import EMA
from tests.vae.training.commands import command

SMALL = {
    "model_options": {"hidden": [32]},
    "posterior_options": {"depth": 2, "hidden_dims": [16]},
    "latent_dim": 4,
    "epochs": 3,
    "batch_size": 200,
    "warmup": 0,
    "iw_images": 10,
    "num_iw_samples": 20,
    "accelerator": "cpu",
    "tensorboard": False,
    "progress": False,
}


def small(tmp_path, **changes):
    return Settings(**{**SMALL, "output": str(tmp_path / "run"), **changes})


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if k != "images_per_second"} for row in csv.DictReader(file)]


def assert_same(first, second, path="checkpoint"):
    """Equal to the last bit, clock times excepted."""
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), path
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for key in first.keys() - {"seconds", "images_per_second"}:
            assert_same(first[key], second[key], f"{path}.{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), path
        for number, pair in enumerate(zip(first, second, strict=True)):
            assert_same(*pair, f"{path}.{number}")
    else:
        assert first == second, path


def assert_improved(summary, tmp_path, skipped=0):
    history = rows(tmp_path / "run")
    assert history[-1]["valid_elbo"] > history[0]["valid_elbo"]
    assert summary["skipped_steps"] == history[-1]["skipped"] == skipped


# -- results -----------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_writes_everything(tmp_path, capsys):
    settings = small(tmp_path, epochs=12, lr=5e-3, warmup=4, tensorboard=True)
    assert main(command(settings)[3:]) == 0
    assert "test ELBO" in capsys.readouterr().out
    folder = tmp_path / "run"
    summary = json.loads((folder / "summary.json").read_text())
    history = rows(folder)
    assert [row["epoch"] for row in history] == list(range(1, 13))
    assert history[-1]["valid_elbo"] > history[0]["valid_elbo"] + 1
    assert summary["test"]["elbo"] == pytest.approx(summary["test"]["reconstruction"] - summary["test"]["kl"])
    assert summary["test"]["bits_per_dim"] == pytest.approx(-summary["test"]["elbo"] / 64 / np.log(2))
    assert summary["reason"] == "12 epochs are complete"
    assert summary["iw_log_likelihood"]["images"] == 10
    for name in ("samples.png", "reconstructions.png", "curve.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"

    events = EventAccumulator(str(folder / "tensorboard")).Reload().Scalars("valid/elbo")
    assert [event.step for event in events] == list(range(1, 13))
    assert [event.value for event in events] == pytest.approx([row["valid_elbo"] for row in history], rel=1e-6)


def test_the_reported_bound_is_that_of_the_saved_model(tmp_path):
    settings = small(tmp_path)
    summary = train(settings)
    vae, loaded = load_model(tmp_path / "run" / "best.pt")
    assert loaded == settings
    x = load_images().binarized().test.float()
    elbo = vae.terms(x, 200).elbo.mean().item()
    assert elbo == pytest.approx(summary["test"]["elbo"], abs=0.3)  # the sd of the 10-draw estimate is 0.05


def test_grey_images_reach_the_likelihood_as_whole_numbers(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (120, 5, 4), dtype=np.uint8)
    np.savez(tmp_path / "grey.npz", train=pixels, test=pixels)
    changes = {"data": str(tmp_path / "grey.npz"), "likelihood": "logistic", "batch_size": 54, "clip": 0.0}
    summary = train(small(tmp_path, **changes))
    assert summary["data"]["shape"] == (1, 5, 4)
    assert 7 < summary["test"]["bits_per_dim"] < 20  # uniform pixels hold 8 bits each


@pytest.mark.parametrize("prior", ["vamp", "maf"])
def test_learned_priors(tmp_path, prior):
    settings = small(tmp_path, prior=prior, posterior="planar", posterior_options={}, optimizer="adamax", epochs=2)
    assert_improved(train(settings), tmp_path)


def test_training_stops_early_when_nothing_improves(tmp_path):
    summary = train(small(tmp_path, epochs=50, lr=1e-30, patience=3))
    assert (summary["epochs"], summary["best_epoch"]) == (4, 1)
    assert "did not improve for 3 epochs" in summary["reason"]


def test_mixed_precision_is_near_full_precision(tmp_path):
    full = train(small(tmp_path / "full"))
    mixed = train(small(tmp_path / "mixed", precision="bf16-mixed"))
    assert mixed["test"]["elbo"] == pytest.approx(full["test"]["elbo"], abs=0.3)
    assert mixed["test"]["elbo"] != full["test"]["elbo"]


def test_double_precision(tmp_path):
    assert_improved(train(small(tmp_path, precision="64-true")), tmp_path)
    assert next(load_model(tmp_path / "run" / "best.pt")[0].parameters()).dtype == torch.float64


def test_a_step_without_a_finite_gradient_is_skipped(tmp_path, monkeypatch):
    """With a model whose gradient is NaN at the steps 1, 2 and 9."""

    def flawed(*arguments, **options):
        vae, steps = MODELS["vae"](*arguments, **options), iter(range(1000))
        terms = vae.terms

        def flawed_terms(x, num_samples=1):
            result = terms(x, num_samples)
            if torch.is_grad_enabled() and next(steps) in (1, 2, 9):
                return result._replace(kl=torch.nan * result.kl)
            return result

        vae.terms = flawed_terms
        return vae

    monkeypatch.setitem(MODELS, "flawed", flawed)
    assert_improved(train(small(tmp_path, model="flawed")), tmp_path, skipped=3)


def test_too_many_steps_without_a_finite_gradient_end_the_run(tmp_path):
    with pytest.raises(TrainingDivergedError, match="not finite for 50 steps in a row"):
        train(small(tmp_path, epochs=100, lr=1e30))


def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr("lightning_fabric.loggers.tensorboard._TENSORBOARD_AVAILABLE", False)
        patch.setattr("lightning_fabric.loggers.tensorboard._TENSORBOARDX_AVAILABLE", False)
        assert main(command(small(tmp_path, tensorboard=True))[3:]) == 1
    error = capsys.readouterr().err
    assert "error: TensorBoard logs need the package: pip install 'pyro-flowguides[vae]', or leave them out" in error
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    with pytest.raises(ImportError, match=r"training needs Lightning Fabric: pip install 'pyro-flowguides\[vae\]'"):
        train(small(tmp_path))


# -- interruptions -----------------------------------------------------------------------------------------------------


def kill_after_epochs(settings, epochs):
    """Start the program, and kill it in the middle of the epoch after the given number of logged ones."""
    process = subprocess.Popen(command(settings), env=ENVIRONMENT, stderr=subprocess.PIPE)
    metrics, deadline = folder_of(settings) / "metrics.csv", time.monotonic() + 900
    while not metrics.exists() or metrics.read_text().count("\n") <= epochs:
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def folder_of(settings):
    """The folder of a run."""
    return Path(settings.output)


def test_a_killed_run_continues_to_the_same_bits(tmp_path):
    changes = {"epochs": 1000, "batch_size": 20, "warmup": 2, "free_bits": 2.0, "free_bits_kind": "soft"}
    whole, broken = small(tmp_path / "whole", **changes), small(tmp_path / "broken", **changes)
    kill_after_epochs(broken, 2)
    reached = checkpoints.load(folder_of(broken) / "last.pt")["progress"]["step"]
    assert 2 * 71 <= reached < 1000 * 71
    assert reached % 71 == 0
    # Both train to the same later epoch, one of them from the start.
    end = reached // 71 + 2
    train(dataclasses.replace(broken, epochs=end))
    train(dataclasses.replace(whole, epochs=end))
    assert_same(checkpoints.load(folder_of(whole) / "last.pt"), checkpoints.load(folder_of(broken) / "last.pt"))
    assert rows(folder_of(whole)) == rows(folder_of(broken))


def test_a_finished_run_is_reported_again_and_can_be_extended(tmp_path):
    settings = small(tmp_path)
    first, again = train(settings), train(settings)
    assert again["test"] == first["test"]
    longer = train(dataclasses.replace(settings, epochs=4))
    assert longer["epochs"] == 4
    assert [row["epoch"] for row in rows(folder_of(settings))] == [1, 2, 3, 4]


def test_a_folder_with_another_run_is_refused(tmp_path, capsys):
    settings = small(tmp_path, epochs=1)
    train(settings)
    before = (folder_of(settings) / "last.pt").read_bytes()
    other = dataclasses.replace(settings, lr=1e-4)
    assert main(command(other)[3:]) == 1
    assert "holds a run with other settings (lr=0.002): choose another --output" in capsys.readouterr().err
    assert (folder_of(settings) / "last.pt").read_bytes() == before
    train(dataclasses.replace(other, overwrite=True))
    assert checkpoints.load(folder_of(settings) / "last.pt")["identity"]["lr"] == 1e-4


def test_a_damaged_checkpoint_is_named(tmp_path, capsys):
    settings = small(tmp_path, epochs=1)
    train(settings)
    path = folder_of(settings) / "last.pt"
    path.write_bytes(path.read_bytes()[:1000])
    assert main(command(settings)[3:]) == 1
    assert "last.pt is not a checkpoint that can be read" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"last.pt is not a checkpoint that can be read"):
        load_model(path)


def test_a_full_disk_is_reported_and_the_last_checkpoint_is_intact(tmp_path):
    settings = small(tmp_path, epochs=2)
    train(dataclasses.replace(settings, epochs=1))
    last = folder_of(settings) / "last.pt"
    before = last.read_bytes()
    limit = len(before) // 2  # writing fails at a file size limit as on a full disk

    def limit_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(command(settings), env=ENVIRONMENT, capture_output=True, text=True, preexec_fn=limit_files)
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert "could not write last.pt" in done.stderr
    assert "the checkpoint of epoch 1 is intact" in done.stderr
    assert "Traceback" not in done.stderr
    assert last.read_bytes() == before
    assert not list(folder_of(settings).glob("*.partial"))
    resumed = train(settings)
    assert resumed["test"] == train(small(tmp_path / "whole", epochs=2))["test"]


def test_a_folder_that_cannot_be_created_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(command(small(tmp_path, output=str(tmp_path / "file" / "run")))[3:]) == 1
    assert "could not write the output folder" in capsys.readouterr().err


class _Kill(BaseException):
    """The process ends at once."""


def kill_at_save(monkeypatch, settings, number):
    """End a run at one of its saves."""
    save, numbers = checkpoints.save, itertools.count(1)

    def save_or_die(*arguments):
        if next(numbers) == number:
            raise _Kill
        save(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", save_or_die)
        with pytest.raises(_Kill):
            train(settings)


def test_overwriting_replaces_all_files_and_continues_after_a_kill(tmp_path, monkeypatch):
    def files():
        return sorted(path.name for path in folder_of(settings).glob("*.p[tn]*"))

    settings = small(tmp_path, epochs=3, lr=1e-30, iw_images=0)
    train(dataclasses.replace(settings, epochs=1))
    overwriting = dataclasses.replace(settings, lr=2e-3, overwrite=True)
    kill_at_save(monkeypatch, overwriting, 2)  # the first is before the first step, the second a best.pt
    assert files() == ["last.pt"]
    kill_at_save(monkeypatch, overwriting, 3)  # within the second epoch; the first was saved in this call
    assert checkpoints.load(folder_of(settings) / "last.pt")["progress"]["step"] == 7
    resumed = train(overwriting)
    whole = train(dataclasses.replace(overwriting, output=str(tmp_path / "whole")))
    assert resumed["test"] == whole["test"]
    before = checkpoints.load(folder_of(settings) / "best.pt")
    train(dataclasses.replace(overwriting, epochs=1))  # a finished run starts again
    assert checkpoints.load(folder_of(settings) / "last.pt")["progress"]["step"] == 7
    assert checkpoints.load(folder_of(settings) / "best.pt")["epoch"] == 1 != before["epoch"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_program_with_one_line(tmp_path, monkeypatch, capsys, number):
    settings, steps, update = small(tmp_path, epochs=2, iw_images=0), itertools.count(1), EMA.update

    def interrupt(self, module):
        update(self, module)
        if next(steps) == 10:
            os.kill(os.getpid(), number)

    before = signal.signal(number, signal.default_int_handler)  # a process in the background may ignore SIGINT
    handler = signal.getsignal(number)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(EMA, "update", interrupt)
            assert main(command(settings)[3:]) == 130
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
    assert capsys.readouterr().err.splitlines() == [
        f"interrupted: {settings.output} holds all complete epochs; the same command continues"
    ]
    assert checkpoints.load(folder_of(settings) / "last.pt")["progress"]["step"] == 7
    assert not (folder_of(settings) / "last.pt.lock").exists()


def test_overwriting_replaces_a_damaged_checkpoint(tmp_path):
    settings = small(tmp_path, epochs=1, iw_images=0, overwrite=True)
    folder_of(settings).mkdir()
    (folder_of(settings) / "last.pt").write_text("damaged")
    assert train(settings)["epochs"] == 1


def test_a_full_disk_is_noticed_before_the_first_step(tmp_path, monkeypatch, capsys):
    def fail(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    settings = small(tmp_path, epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        patch.setattr(EMA, "update", lambda *_: pytest.fail("a step was taken"))
        assert main(command(settings)[3:]) == 1
    message = "(No space left on device): there is no checkpoint yet. Make room there and repeat the command"
    assert message in capsys.readouterr().err
    assert list(folder_of(settings).iterdir()) == []


def test_two_runs_cannot_write_to_one_folder(tmp_path, capsys):
    settings = small(tmp_path, epochs=1)
    folder_of(settings).mkdir()
    with checkpoints.reserved(folder_of(settings) / "last.pt"):
        assert main(command(settings)[3:]) == 1
    assert "last.pt is in use by another run" in capsys.readouterr().err
    assert list(folder_of(settings).iterdir()) == []


def test_checkpoints_of_other_kinds_are_refused(tmp_path):
    settings = small(tmp_path, epochs=1)
    for name, kind in [("last.pt", "fit"), ("best.pt", "fit"), ("best.pt", "vae run"), ("last.pt", "vae model")]:
        path = tmp_path / "run" / name
        path.parent.mkdir(exist_ok=True)
        checkpoints.save(path, {"kind": kind})
        expected = "a checkpoint of VAE training" if name == "last.pt" else "the best.pt of VAE training"
        with pytest.raises(ValueError, match=f"{name} is {checkpoints.KINDS[kind]}, not {expected}"):
            train(settings) if name == "last.pt" else load_model(path)
        path.unlink()


# -- several processes -------------------------------------------------------------------------------------------------


def test_two_processes_have_the_losses_of_one(tmp_path):
    changes = {"shards": 2, "free_bits": 2.0, "prior": "maf", "num_samples": 2}
    one, two = small(tmp_path / "one", **changes), small(tmp_path / "two", **changes, devices="2", strategy="ddp")
    train(one)
    done = subprocess.run(command(two), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "distributed_backend=gloo" in done.stderr
    assert json.loads((folder_of(two) / "summary.json").read_text())["machine"]["processes"] == 2
    for of_one, of_two in zip(rows(folder_of(one)), rows(folder_of(two)), strict=True):
        assert of_two == pytest.approx(of_one, rel=1e-5)
    first, second = (checkpoints.load(folder_of(run) / "last.pt")["model"] for run in (one, two))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-3, atol=1e-5)


def test_shards_must_divide_the_batch(tmp_path):
    with pytest.raises(ValueError, match="a batch of 200 images cannot be split into 3 equal shards"):
        train(small(tmp_path, shards=3))


@pytest.mark.skipif(torch.__version__ < (2, 5), reason="its compiler fails")
def test_compiling_changes_only_rounding(tmp_path, monkeypatch):
    # Capture and differentiate the graph, but do not generate machine code, which takes a minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    changes = {"epochs": 1, "iw_images": 0, "shards": 2}
    eager, compiled = train(small(tmp_path / "eager", **changes)), train(small(tmp_path / "c", **changes, compile=True))
    assert compiled["test"]["elbo"] == pytest.approx(eager["test"]["elbo"], abs=1e-2)


def test_training_continues_without_a_compiler_that_fails(tmp_path, monkeypatch):
    def compile_(function):
        def fails(*_):
            raise AssertionError("no graph of this\nand much more")

        return fails

    monkeypatch.setattr(torch, "compile", compile_)
    changes = {"epochs": 1, "iw_images": 0}
    eager = train(small(tmp_path / "eager", **changes))
    with pytest.warns(UserWarning, match="train: continues without compiling: AssertionError: no graph of this$"):
        compiled = train(small(tmp_path / "c", **changes, compile=True))
    assert compiled["test"] == eager["test"]


@pytest.mark.skipif("FLOWGUIDES_DATA" not in os.environ, reason="needs FLOWGUIDES_DATA")
def test_real_images(tmp_path):
    data = os.path.join(os.environ["FLOWGUIDES_DATA"], "data", "freyfaces.npz")
    summary = train(small(tmp_path, data=data, shape=(28, 20), likelihood="logistic", epochs=5))
    assert summary["data"]["shape"] == (1, 28, 20)
    assert summary["test"]["bits_per_dim"] < 8


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_on_a_gpu(tmp_path, precision, compiled):
    summary = train(small(tmp_path, accelerator="cuda", precision=precision, compile=compiled, epochs=5))
    assert summary["machine"]["accelerator"] == "cuda"
    assert_improved(summary, tmp_path)
