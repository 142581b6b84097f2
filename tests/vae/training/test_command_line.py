"""The command line of the training program."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

from pyro_flowguides.vae import Settings
from pyro_flowguides.vae.__main__ import main, parse_settings
from tests.vae.training.commands import command

TRAINING_PAGE = Path(__file__).parents[3] / "docs" / "training.md"


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit) as end:
        parse_settings(["--help"])
    text, page = capsys.readouterr().out, TRAINING_PAGE.read_text("utf-8")
    assert end.value.code == 0
    for setting in dataclasses.fields(Settings):
        flag = f"--no-{setting.name}" if setting.default is True else "--" + setting.name.replace("_", "-")
        assert flag in text
        assert f"`{flag}`" in page
    assert "examples:" in text


def test_no_arguments_are_the_defaults_and_every_setting_can_be_given():
    assert parse_settings([]) == Settings()
    settings = Settings(
        shape=(28, 20),
        overwrite=True,
        compile=True,
        progress=False,
        epochs=3,
        lr=0.1,
        num_samples=2,
        model_options={"hidden": [32]},
    )
    assert parse_settings(command(settings)[3:]) == settings


@pytest.mark.parametrize("model", ["vlae", "spatial_vlae"])
def test_published_settings_are_defaults_of_their_models(model):
    settings = parse_settings(["--model", model])
    assert (settings.posterior, settings.prior, settings.network) == ("normal", "maf", "resnet")
    assert (settings.latent_dim, settings.optimizer, settings.ema) == (64, "adamax", 0.998)
    changed = parse_settings(["--prior", "normal", "--model", model, "--latent-dim", "8"])
    assert (changed.prior, changed.latent_dim, changed.optimizer) == ("normal", 8, "adamax")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--ema", "1"], r"--ema must be in \[0, 1\), got 1.0"),
        (["--lr", "-1"], "--lr must be positive"),
        (["--posterior-options", "{depth: 2}"], "not JSON"),
        (["--posterior-options", "[1]"], "expected a JSON object"),
        (["--shape", "axb"], "expected sizes such as 28x20"),
        (["--likelihood", "logistic", "--binarize", "static"], "--binarize must be none"),
        (["--network", "transformer"], "invalid choice"),
        (["--lr", "inf"], "--lr must be positive and finite"),
        (["--free-bits", "nan"], "--free-bits must be finite"),
        (["--devices", "abc"], "--devices must be a positive number or 'auto', got abc"),
        (["--devices", "0"], "--devices must be a positive number"),
        (["--data", ""], "--data must be a path, got an empty one"),
    ],
)
def test_invalid_arguments_are_explained(capsys, arguments, message):
    with pytest.raises(SystemExit):
        parse_settings(arguments)
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--posterior-options", '{"dept": 3}'], "unknown option 'dept', did you mean 'depth'"),
        (["--posterior-options", '{"depth": "x"}'], "depth must be a whole number, got 'x'"),
        (["--model-options", '{"hiden": 3}'], "unknown option 'hiden', did you mean 'hidden'"),
        (["--model-options", '{"hidden": 64}'], r"hidden must be a sequence of whole numbers, such as \[64, 64\]"),
        (["--model", "iafvae", "--model-options", '{"hiden": 3}'], "unexpected keyword argument 'hiden'"),
        (["--prior-options", '{"depth": 3}'], "the normal prior has no options"),
        (["--strategy", "fast"], "strategy"),
    ],
)
def test_options_that_no_model_takes_end_in_one_line(capsys, tmp_path, arguments, message):
    assert main([*arguments, "--output", str(tmp_path / "run"), "--no-progress", "--no-tensorboard"]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_device_that_is_not_there_ends_in_one_line(capsys, tmp_path):
    assert main(["--accelerator", "cuda", "--output", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().err == (
        "error: --accelerator cuda: no CUDA device is available here. Use --accelerator auto or cpu.\n"
    )


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"lr": float("inf")}, ValueError, "--lr must be positive and finite"),
        ({"lr": "x"}, TypeError, "--lr must be a number, got 'x'"),
        ({"epochs": 1.5}, TypeError, "--epochs must be a whole number, got 1.5"),
        ({"shape": "8x8"}, TypeError, "--shape must be a sequence of whole numbers"),
        ({"num_samples": True}, TypeError, "--num-samples must be a whole number, got True"),
        ({"precision": "16"}, ValueError, "--precision must be one of"),
        ({"posterior_options": [1]}, TypeError, r"--posterior-options must map names to values, got \[1\]"),
        ({"compile": 1}, TypeError, "--compile must be True or False, got 1"),
    ],
)
def test_settings_are_checked_where_they_are_made(values, error, message):
    with pytest.raises(error, match=message):
        Settings(**values)
