"""The settings of a training run; the command line, its help and the summary are made from them."""

import dataclasses
import json
from argparse import ArgumentTypeError
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from pyro_flowguides.flows import FLOWS
from pyro_flowguides.nn.arguments import (
    check_count,
    check_mapping,
    check_number,
    check_one_of,
    check_path,
    check_widths,
    describe,
)
from pyro_flowguides.vae.decoders.likelihoods import LIKELIHOODS
from pyro_flowguides.vae.models.recipes import MODELS, NETWORKS, Options

__all__ = ["Settings", "flag_of"]

#: Settings that may change when a run is resumed.
CHANGEABLE = {
    *("data", "shape", "epochs", "patience", "accelerator", "devices", "nodes", "strategy", "shards"),
    *("output", "overwrite", "tensorboard", "progress", "iw_images", "num_iw_samples"),
}

#: Whole numbers that must be at least 1; all others may be 0.
POSITIVE = {"latent_dim", "epochs", "batch_size", "num_samples", "nodes", "num_iw_samples"}

T = TypeVar("T")


def parse_options(text: str) -> dict[str, object]:
    """Parse a JSON object on the command line."""
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise ArgumentTypeError(f"not JSON: {error}") from error
    if not isinstance(options, dict):
        raise ArgumentTypeError(f"expected a JSON object such as '{{\"depth\": 4}}', got {text}")
    return options


def parse_shape(text: str) -> tuple[int, ...]:
    """Parse the shape of an image on the command line."""
    try:
        return tuple(int(size) for size in text.lower().split("x"))
    except ValueError as error:
        raise ArgumentTypeError(f"expected sizes such as 28x20 or 3x32x32, got {text!r}") from error


def _setting(default: T, text: str, **metadata: object) -> T:
    """Define a setting by its default, its help and, in ``metadata``, its group and arguments of argparse."""
    return field(default=default, metadata={"help": text, **metadata})


def _json(text: str) -> dict[str, object]:
    """Return the metadata of a setting that is a JSON object."""
    return {"help": text, "type": parse_options, "metavar": "JSON"}


@dataclass(frozen=True)
class Settings:
    """All settings of a run, with their defaults; ``python -m pyro_flowguides.vae --help`` explains each.

    Raises:
        TypeError: if a value is of another type.
        ValueError: if a value is out of range.

    Example:
        >>> from pyro_flowguides.vae import Settings
        >>> Settings(posterior="planar", epochs=3).latent_dim
        16
    """

    data: str = _setting("digits", "'digits', an .npz file, or a folder of IDX files or images", group="data")
    shape: tuple[int, ...] = _setting(
        (), "shape of flat rows that are not square images", type=parse_shape, metavar="HxW"
    )
    binarize: str = _setting(
        "auto",
        "draw pixels as 0 or 1: at every step, once, or never; auto: dynamic for the Bernoulli likelihood, else none",
        choices=("auto", "dynamic", "static", "none"),
    )

    model: str = _setting(
        "vae",
        "kind of VAE; vlae and spatial_vlae have their published settings as defaults",
        choices=MODELS,
        group="model",
    )
    network: str = _setting("mlp", "encoder and decoder", choices=NETWORKS)
    likelihood: str = _setting("bernoulli", "distribution of a pixel", choices=LIKELIHOODS)
    latent_dim: int = _setting(16, "width of the latent vector")
    posterior: str = _setting("iaf", f"posterior: normal, or a flow: {', '.join(FLOWS)}")
    posterior_options: Options = field(
        default_factory=dict, metadata=_json('options of the posterior, such as {"depth": 4}')
    )
    prior: str = _setting("normal", "prior: normal, vamp, or a flow")
    prior_options: Options = field(default_factory=dict, metadata=_json("options of the prior"))
    model_options: Options = field(
        default_factory=dict, metadata=_json('other options of the model, such as {"hidden": [300, 300]}')
    )

    epochs: int = _setting(60, "maximal number of epochs", group="optimization")
    batch_size: int = _setting(100, "images per step, over all processes")
    num_samples: int = _setting(1, "draws of z per image")
    optimizer: str = _setting("adam", "optimizer", choices=("adam", "adamax"))
    lr: float = _setting(2e-3, "step size")
    clip: float = _setting(10.0, "maximal norm of the gradient; 0: no limit")
    warmup: int = _setting(10, "epochs over which the weight of the KL rises from 0 to 1")
    free_bits: float = _setting(0.0, "nats of every group's KL that cost nothing")
    free_bits_kind: str = _setting("hard", "free bits by clamping, or by adjusting a weight", choices=("hard", "soft"))
    ema: float = _setting(0.99, "decay of the averaged weights, which are evaluated and saved; 0: no averaging")
    patience: int = _setting(10, "stop after this many epochs without a better validation ELBO; 0: never")
    seed: int = _setting(0, "seed of all random numbers")

    accelerator: str = _setting("auto", "kind of device", choices=("auto", "cpu", "cuda", "mps"), group="machine")
    devices: str = _setting("1", "number of devices per machine (of processes, on a CPU), or 'auto'")
    nodes: int = _setting(1, "number of machines")
    strategy: str = _setting("auto", "strategy of Lightning Fabric, such as ddp")
    precision: Literal["32-true", "64-true", "bf16-mixed", "16-mixed"] = _setting(
        "32-true", "precision of training", choices=("32-true", "64-true", "bf16-mixed", "16-mixed")
    )
    compile: bool = _setting(False, "compile the model with torch.compile")
    shards: int = _setting(0, "parts of a batch, each with random numbers of its own; 0: one per process")

    output: str = _setting("vae_output", "folder for all results", group="output")
    overwrite: bool = _setting(False, "replace a run that is finished, damaged, or has other settings or data")
    tensorboard: bool = _setting(True, "write TensorBoard logs")
    progress: bool = _setting(True, "show a progress bar")
    iw_images: int = _setting(200, "test images for the importance-weighted log-likelihood; 0: none")
    num_iw_samples: int = _setting(200, "draws per image for the importance-weighted log-likelihood")

    def __post_init__(self) -> None:
        for setting in dataclasses.fields(self):
            self._check(setting.name, getattr(self, setting.name), setting.default, setting.metadata.get("choices"))
        self._require(0 <= self.ema < 1, "ema", "in [0, 1)")
        is_count = self.devices.isdigit() and int(self.devices) > 0
        self._require(is_count or self.devices == "auto", "devices", "a positive number or 'auto'")
        if self.likelihood != "bernoulli":
            self._require(self.binarize in ("auto", "none"), "binarize", f"none for the likelihood {self.likelihood!r}")

    def _check(self, name: str, value: object, default: object, choices: Collection[str] | None) -> None:
        """Check a setting against the type of its default; one without is a mapping of options."""
        flag = flag_of(name)
        if choices is not None:
            check_one_of("Settings", flag, value, list(choices))
        elif isinstance(default, bool):
            if not isinstance(value, bool):
                raise TypeError(f"Settings: {flag} must be True or False, got {describe(value)}")
        elif isinstance(default, int):
            check_count("Settings", flag, value, minimum=int(name in POSITIVE))
        elif isinstance(default, float):
            check_number("Settings", flag, value, 0.0, inclusive=name != "lr")
        elif isinstance(default, str):
            check_path("Settings", flag, value)
        elif isinstance(default, tuple):
            check_widths("Settings", flag, value)
        else:
            check_mapping("Settings", flag, value)

    def _require(self, condition: bool, name: str, requirement: str) -> None:
        if not condition:
            raise ValueError(f"{flag_of(name)} must be {requirement}, got {getattr(self, name)}")

    @property
    def binarization(self) -> str:
        """``dynamic``, ``static`` or ``none``."""
        if self.binarize != "auto":
            return self.binarize
        return "dynamic" if self.likelihood == "bernoulli" else "none"

    def identity(self) -> dict[str, object]:
        """Return the settings that determine the parameters of a run, and must not change when it is resumed.

        A resumed run may have more epochs, another patience, other output settings and another machine. Its data are
        compared by their pixels, not by their path.
        """
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in CHANGEABLE}


def flag_of(name: str) -> str:
    """Return the command-line flag of a setting."""
    return "--" + name.replace("_", "-")
