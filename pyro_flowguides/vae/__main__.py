"""``python -m pyro_flowguides.vae``: train a VAE from the command line."""

import dataclasses
import os
import signal
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence

from pyro_flowguides.vae.models.recipes import Options
from pyro_flowguides.vae.training.loop import TrainingDivergedError, train
from pyro_flowguides.vae.training.run_folder import Summary
from pyro_flowguides.vae.training.settings import Settings, flag_of

#: The published settings of the variational lossy autoencoder.
VLAE_SETTINGS: Options = {"network": "resnet", "latent_dim": 64, "posterior": "normal", "prior": "maf"}
VLAE_TRAINING: Options = {"optimizer": "adamax", "lr": 2e-3, "ema": 0.998}
#: Defaults of models that were published with settings of their own.
PUBLISHED_DEFAULTS = {model: {**VLAE_SETTINGS, **VLAE_TRAINING} for model in ("vlae", "spatial_vlae")}

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, print the results, and return the exit status: 0, 1 after an error with a message, 130 if interrupted."""
    settings = parse_settings(arguments)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        summary = train(settings)
    except KeyboardInterrupt:
        print(f"interrupted: {settings.output} holds all complete epochs; the same command continues", file=sys.stderr)
        return 130
    except (OSError, ValueError, ImportError, TrainingDivergedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
    if os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("NODE_RANK", "0") == "0":
        print(_describe(settings, summary))
    return 0


def _describe(settings: Settings, summary: Summary) -> str:
    test, weighted = summary["test"], summary.get("iw_log_likelihood")
    lines = [
        f"{summary['epochs']} epochs in {summary['seconds']:.0f} s ({summary['reason']}); best epoch "
        f"{summary['best_epoch']}",
        f"test ELBO {test['elbo']:.2f} nats per image (reconstruction {test['reconstruction']:.2f}, KL "
        f"{test['kl']:.2f}), {test['bits_per_dim']:.3f} bits/dim",
    ]
    if weighted:
        lines.append(
            f"importance-weighted log-likelihood {weighted['mean']:.2f} ± {weighted['standard_error']:.2f} "
            f"({weighted['images']} images, {weighted['num_samples']} draws each)"
        )
    lines.append(f"written to {settings.output}: summary.json, metrics.csv, best.pt, last.pt and pictures")
    return "\n".join(lines)


def parse_settings(arguments: Sequence[str] | None = None) -> Settings:
    """Parse a command line; an invalid one ends the program with a message.

    A model with published settings has them as defaults.

    Args:
        arguments: words of the command line, by default those of the program.

    Example:
        >>> from pyro_flowguides.vae.__main__ import parse_settings
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
    for setting in dataclasses.fields(Settings):
        if "group" in setting.metadata:
            section = parser.add_argument_group(setting.metadata["group"])
        _add_flag(section.add_argument, setting)
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


if __name__ == "__main__":
    sys.exit(main())
