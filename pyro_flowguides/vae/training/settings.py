"""The settings of a training run: one list from which the command line, its help and the summary are made."""

from __future__ import annotations

import dataclasses
import json
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pyro_flowguides.flows import FLOWS
from pyro_flowguides.vae.decoders.likelihoods import LIKELIHOODS
from pyro_flowguides.vae.models.recipes import MODELS, NETWORKS

__all__ = ["Settings", "parse"]

PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed")

#: What some models were published with: their defaults on the command line.
PUBLISHED: dict[str, dict[str, Any]] = {
    model: {
        "network": "resnet",
        "latent_dim": 64,
        "posterior": "normal",
        "prior": "maf",
        "optimizer": "adamax",
        "learning_rate": 2e-3,
        "ema": 0.998,
    }
    for model in ("vlae", "spatial_vlae")
}

DESCRIPTION = """\
Train a variational autoencoder with a flow posterior.

Without arguments: the 8x8 digits of scikit-learn, an IAF posterior, under a minute on two cores. Everything is written
to --output. The same command continues a run that was interrupted, exactly, from its last complete epoch."""

EXAMPLES = """\
examples:
  python -m pyro_flowguides.vae
  python -m pyro_flowguides.vae --data mnist.npz --network gated --posterior sylvester --latent-dim 64 --epochs 200
  python -m pyro_flowguides.vae --data faces.npz --shape 28x20 --likelihood logistic_mixture --prior maf
  python -m pyro_flowguides.vae --data MNIST/raw --accelerator cuda --devices 4 --precision bf16-mixed --compile
  python -m pyro_flowguides.vae --data mnist.npz --model vlae --binarize static --free-bits 7.84
  python -m pyro_flowguides.vae --posterior-options '{"depth": 8, "hidden_dims": [320, 320]}'"""


def _options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise ArgumentTypeError(f"not JSON: {error}") from error
    if not isinstance(options, dict):
        raise ArgumentTypeError(f"expected a JSON object such as '{{\"depth\": 4}}', got {text}")
    return options


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.lower().split("x"))
    except ValueError as error:
        raise ArgumentTypeError(f"expected sizes such as 28x20 or 3x32x32, got {text!r}") from error


def _option(default: Any, text: str, **metadata: Any) -> Any:
    """A setting with its default, its help and what argparse needs besides."""
    return field(default=default, metadata={"help": text, **metadata})


def _json(text: str) -> dict[str, Any]:
    """What :func:`_option` notes, for a setting that is a JSON object, empty by default."""
    return {"help": text, "type": _options, "metavar": "JSON"}


@dataclass(frozen=True)
class Settings:
    """All settings of a run, with their defaults; ``python -m pyro_flowguides.vae --help`` explains each.

    Raises:
        ValueError: for a value out of range.

    Example:
        >>> from pyro_flowguides.vae.training.settings import Settings
        >>> Settings(posterior="planar", epochs=3).latent_dim
        16
    """

    data: str = _option("digits", "'digits', an .npz file, or a folder of IDX files or images", group="data")
    shape: tuple[int, ...] = _option((), "shape of flat rows that are not square images", type=_shape, metavar="HxW")
    binarize: str = _option(
        "auto",
        "pixels drawn as bits anew each time, once, or not at all; auto: dynamic for the Bernoulli likelihood",
        choices=("auto", "dynamic", "static", "none"),
    )

    model: str = _option(
        "vae", "the model; those called vlae bring published settings with them", choices=tuple(MODELS), group="model"
    )
    network: str = _option("mlp", "encoder and decoder", choices=tuple(NETWORKS))
    likelihood: str = _option("bernoulli", "distribution of a pixel", choices=tuple(LIKELIHOODS))
    latent_dim: int = _option(16, "width of the latent vector")
    posterior: str = _option("iaf", f"posterior: normal, or a flow: {', '.join(FLOWS)}")
    posterior_options: dict[str, Any] = field(default_factory=dict, metadata=_json('its options, such as {"depth": 4}'))
    prior: str = _option("normal", "prior: normal, vamp, or a flow")
    prior_options: dict[str, Any] = field(default_factory=dict, metadata=_json("its options"))
    model_options: dict[str, Any] = field(default_factory=dict, metadata=_json('such as {"hidden": [300, 300]}'))

    epochs: int = _option(60, "most epochs", group="optimization")
    batch_size: int = _option(100, "images per step, over all processes")
    samples: int = _option(1, "draws of z per image")
    optimizer: str = _option("adam", "optimizer", choices=("adam", "adamax"))
    learning_rate: float = _option(2e-3, "step size")
    clip: float = _option(10.0, "largest norm of the gradient; 0: none")
    warmup: int = _option(10, "epochs over which the weight of the KL rises from 0 to 1")
    free_bits: float = _option(0.0, "nats of every group's KL that cost nothing")
    free_bits_kind: str = _option("hard", "free bits by clamping, or by adjusting a weight", choices=("hard", "soft"))
    ema: float = _option(0.99, "decay of the averaged weights that are validated and kept; 0: none")
    patience: int = _option(10, "epochs without a better validation ELBO after which training stops; 0: never")
    seed: int = _option(0, "of everything random")

    accelerator: str = _option("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"), group="machine")
    devices: str = _option("1", "how many devices (processes, on the CPU) of this machine, or 'auto'")
    nodes: int = _option(1, "number of machines")
    strategy: str = _option("auto", "Lightning Fabric's strategy, such as ddp")
    precision: str = _option("32-true", "precision of training", choices=PRECISIONS)
    compile: bool = _option(False, "compile the model with torch.compile")
    shards: int = _option(0, "parts of a batch, each with its own random numbers; 0: one per process")

    output: str = _option("vae_output", "folder for everything that is written", group="output")
    overwrite: bool = _option(False, "start anew where the folder holds another run")
    tensorboard: bool = _option(True, "write TensorBoard logs")
    progress: bool = _option(True, "show a progress bar")
    iw_images: int = _option(200, "test images for the importance-weighted log-likelihood; 0: leave it out")
    iw_samples: int = _option(200, "draws per image for it")

    def __post_init__(self) -> None:
        for name in ("latent_dim", "epochs", "batch_size", "samples", "nodes", "iw_samples"):
            self._need(name, getattr(self, name) >= 1, "at least 1")
        for name in ("clip", "warmup", "free_bits", "patience", "shards", "iw_images", "seed"):
            self._need(name, getattr(self, name) >= 0, "at least 0")
        self._need("learning_rate", self.learning_rate > 0, "positive")
        self._need("ema", 0 <= self.ema < 1, "in [0, 1)")
        if self.binarize == "none" or self.likelihood == "bernoulli":
            return
        self._need("binarize", self.binarize == "auto", f"none for the likelihood {self.likelihood!r}")

    def _need(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise ValueError(f"{_flag(name)} must be {wanted}, got {getattr(self, name)}")

    @property
    def binarization(self) -> str:
        """``dynamic``, ``static`` or ``none``."""
        if self.binarize != "auto":
            return self.binarize
        return "dynamic" if self.likelihood == "bernoulli" else "none"

    def identity(self) -> dict[str, Any]:
        """The settings that a run cannot change when it is resumed: all that its parameters depend on.

        More epochs or patience, other places to write to and another machine are allowed; the data are compared by
        their pixels and not by their place.
        """
        values = dataclasses.asdict(self)
        groups = _groups()
        free = {"data", "shape", "epochs", "patience", *groups["output"], *groups["machine"]}
        fixed = set(values) - free | {"precision", "compile"}
        return {name: value for name, value in values.items() if name in fixed}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _groups() -> dict[str, list[str]]:
    """The names of the settings by group: a group begins with the setting that names it."""
    groups: dict[str, list[str]] = {}
    current: list[str] = []
    for setting in dataclasses.fields(Settings):
        if "group" in setting.metadata:
            current = groups.setdefault(setting.metadata["group"], [])
        current.append(setting.name)
    return groups


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m pyro_flowguides.vae",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=RawDescriptionHelpFormatter,
    )
    fields = {setting.name: setting for setting in dataclasses.fields(Settings)}
    for group, names in _groups().items():
        section = parser.add_argument_group(group)
        for name in names:
            _add(section.add_argument, fields[name])
    return parser


def _add(add: Callable[..., Any], setting: dataclasses.Field[Any]) -> None:
    metadata = {key: value for key, value in setting.metadata.items() if key != "group"}
    default: Any = {} if setting.default is dataclasses.MISSING else setting.default
    text = metadata.pop("help")
    if isinstance(default, bool):
        flag = f"--no-{setting.name}" if default else _flag(setting.name)
        text = text if not default else f"do not {text}"
        add(flag, dest=setting.name, action="store_false" if default else "store_true", help=text)
        return
    metadata.setdefault("type", type(default))
    if "choices" not in metadata:
        metadata.setdefault("metavar", {int: "N", float: "X", str: "NAME"}.get(type(default)))
    shown = "" if default in ((), {}) else f" (default: {default})"
    add(_flag(setting.name), default=default, help=text + shown, **metadata)


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """Settings from a command line, those a model was published with being its defaults; a bad one ends the program.

    Example:
        >>> from pyro_flowguides.vae.training.settings import parse
        >>> parse(["--posterior", "planar", "--posterior-options", '{"depth": 4}']).posterior_options
        {'depth': 4}
    """
    parser = _parser()
    model = parser.parse_known_args(arguments)[0].model
    parser.set_defaults(**PUBLISHED.get(model, {}))
    values = vars(parser.parse_args(arguments))
    try:
        return Settings(**values)
    except ValueError as error:
        parser.error(str(error))
