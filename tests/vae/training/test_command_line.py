"""The command line of the training program."""

import dataclasses
import re
from pathlib import Path

import pytest

from pyro_flowguides.vae import Settings
from pyro_flowguides.vae.__main__ import parse_settings
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
    ],
)
def test_invalid_arguments_are_explained(capsys, arguments, message):
    with pytest.raises(SystemExit):
        parse_settings(arguments)
    assert re.search(message, capsys.readouterr().err)
