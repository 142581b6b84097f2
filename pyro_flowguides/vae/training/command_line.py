"""The command line of the training program, made from :class:`~pyro_flowguides.vae.Settings`."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence

from pyro_flowguides.vae.models.components import Options
from pyro_flowguides.vae.training.settings import Settings, flag_of, settings_by_group

__all__ = ["parse_settings"]

#: Defaults of models that were published with settings of their own.
PUBLISHED_DEFAULTS: dict[str, Options] = {
    model: {
        "network": "resnet",
        "latent_dim": 64,
        "posterior": "normal",
        "prior": "maf",
        "optimizer": "adamax",
        "lr": 2e-3,
        "ema": 0.998,
    }
    for model in ("vlae", "spatial_vlae")
}

DESCRIPTION = """\
Train a variational autoencoder with a flow posterior.

Without arguments: the 8x8 digits of scikit-learn with an IAF posterior, in less than a minute on two cores. All results
go to --output. The same command continues an interrupted run exactly, from its last complete epoch."""

EXAMPLES = """\
examples:
  python -m pyro_flowguides.vae
  python -m pyro_flowguides.vae --data mnist.npz --network gated --posterior sylvester --latent-dim 64 --epochs 200
  python -m pyro_flowguides.vae --data faces.npz --shape 28x20 --likelihood logistic_mixture --prior maf
  python -m pyro_flowguides.vae --data MNIST/raw --accelerator cuda --devices 4 --precision bf16-mixed --compile
  python -m pyro_flowguides.vae --data mnist.npz --model vlae --binarize static --free-bits 7.84
  python -m pyro_flowguides.vae --posterior-options '{"depth": 8, "hidden_dims": [320, 320]}'"""

#: Placeholders of values in the help, by type.
METAVARS = {int: "N", float: "X", str: "NAME"}


def parse_settings(arguments: Sequence[str] | None = None) -> Settings:
    """Parse a command line; an invalid one ends the program with a message.

    A model with published settings has them as defaults.

    Args:
        arguments: words of the command line, by default those of the program.

    Example:
        >>> from pyro_flowguides.vae.training.command_line import parse_settings
        >>> parse_settings(["--posterior", "planar", "--posterior-options", '{"depth": 4}']).posterior_options
        {'depth': 4}
    """
    parser = _make_parser()
    model = parser.parse_known_args(arguments)[0].model
    parser.set_defaults(**PUBLISHED_DEFAULTS.get(model, {}))
    values = vars(parser.parse_args(arguments))
    try:
        return Settings(**values)
    except ValueError as error:
        parser.error(str(error))


def _make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m pyro_flowguides.vae",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
    )
    fields = {setting.name: setting for setting in dataclasses.fields(Settings)}
    for group, names in settings_by_group().items():
        section = parser.add_argument_group(group)
        for name in names:
            _add_flag(section.add_argument, fields[name])
    return parser


def _add_flag(add_argument: Callable[..., object], setting: dataclasses.Field[object]) -> None:
    metadata = {key: value for key, value in setting.metadata.items() if key != "group"}
    default = {} if setting.default is dataclasses.MISSING else setting.default
    text = metadata.pop("help")
    if default is True:
        add_argument(f"--no-{setting.name}", dest=setting.name, action="store_false", help=f"do not {text}")
        return
    if default is False:
        add_argument(flag_of(setting.name), action="store_true", help=text)
        return
    metadata.setdefault("type", type(default))
    if "choices" not in metadata:
        metadata.setdefault("metavar", METAVARS.get(type(default)))
    shown = "" if default in ((), {}) else f" (default: {default})"
    add_argument(flag_of(setting.name), default=default, help=text + shown, **metadata)
