"""The fingerprint of a fit: by what a checkpoint is recognized as one of the same data, model and guide."""

import hashlib
import math
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from pyro_flowguides.programs.batched_run import Layout
from pyro_flowguides.programs.program import Program
from pyro_flowguides.programs.running import evaluation, trace_guide, trace_program
from pyro_flowguides.programs.sites import innermost, is_data, latent_sites, sample_sites
from pyro_flowguides.programs.types import Guide, Site

__all__ = ["Fingerprint", "Probe", "find_changes", "find_differences", "own_parameters", "probe", "take_fingerprint"]

#: For each kind of thing (``"data"``, ``"site"``, ``"guide"``, ``"parameter"``), what it is, by name.
Fingerprint: TypeAlias = dict[str, dict[str, str]]
#: Numbers that a model and a guide give, by name, and how large the terms of each are.
Probe: TypeAlias = dict[str, tuple[float, float]]

#: Most differences that a message lists.
MAX_LISTED = 4
#: Draws that are tried where a model fails at some.
NUM_DRAWS = 10


def take_fingerprint(program: Program) -> Fingerprint:
    """Describe data, model and guide, independent of the values of the parameters."""
    _, model_trace = _trace(program)
    again = dict(_hashes(program, _trace(program)[1]))  # data may be drawn anew in every run
    return {
        "data": {name: value for name, value in _hashes(program, model_trace) if again[name] == value},
        "site": {name: _describe_site(site) for name, site in sample_sites(model_trace)},
        "guide": dict(_configuration(program.guide)),
        "parameter": {name: _describe_tensor(value) for name, value in own_parameters(program).items()},
    }


def own_parameters(program: Program) -> dict[str, Tensor]:
    """Return the parameters by their names within the guide, whose own name Pyro's store may number."""
    prefix = f"{getattr(program.guide, '_pyro_name', '')}."
    return {
        f"guide.{name.removeprefix(prefix)}" if name.startswith(prefix) else name: parameter
        for name, parameter in program.parameters.items()
    }


def find_differences(saved: Fingerprint, own: Fingerprint) -> list[str]:
    """Describe how two fingerprints differ; an empty list if they do not."""
    differences = []
    for kind, values in own.items():
        for name in saved[kind] | values:
            before, now = saved[kind].get(name), values.get(name)
            if before is None or now is None:
                differences.append(f"{kind} {name!r} is {'new' if before is None else 'gone'}")
            elif before != now:
                what = "has other values" if kind == "data" else f"was {before} and is {now}"
                differences.append(f"{kind} {name!r} {what}")
    return _shortened(differences)


def probe(program: Program) -> Probe:
    """Return log densities at a draw of the guide whose random numbers are the same at every call.

    They change with whatever the fingerprint cannot see: the scale of a prior, a function that the model calls.
    """
    try:
        guide_trace, model_trace = _trace(program)
        with evaluation():
            guide_trace.compute_log_prob()
            model_trace.compute_log_prob()
    except Exception:  # a model may fail in any way where it is not defined
        return {}
    densities = {f"model's log density of {name!r}": site["log_prob"] for name, site in sample_sites(model_trace)}
    draws = {f"guide's draw of {name!r}": guide_trace.nodes[name]["value"] for name in program.latents}
    log_q = torch.stack([site["log_prob"].sum() for _, site in latent_sites(guide_trace)])
    return {name: _summarize(value) for name, value in {"guide's log density": log_q, **draws, **densities}.items()}


def find_changes(saved: Probe, program: Program) -> list[str]:
    """Describe how log densities differ from those of a saved :func:`probe`, beyond rounding.

    A model or guide with random numbers of its own differs at every call, and is not compared.
    """
    own, tolerance = probe(program), program.tolerance
    changed = _unequal(saved, own, tolerance)
    if changed and _unequal(own, probe(program), tolerance):
        return []
    from_guide = [name for name in changed if name.startswith("guide")]  # the model's densities then change too
    return _shortened([f"the {name} has changed" for name in from_guide or changed])


def _unequal(one: Probe, other: Probe, tolerance: float) -> list[str]:
    missing = (math.nan, math.inf)
    return [name for name in one | other if not _is_close(one.get(name, missing), other.get(name, missing), tolerance)]


def _is_close(one: tuple[float, float], other: tuple[float, float], tolerance: float) -> bool:
    (value, size), (other_value, other_size) = one, other
    difference = abs(value - other_value)
    if not math.isfinite(difference):
        return (str(value), str(size)) == (str(other_value), str(other_size))
    return difference <= tolerance * max(1.0, size, other_size)


def _shortened(differences: list[str]) -> list[str]:
    more = len(differences) - MAX_LISTED
    return [*differences[:MAX_LISTED], f"and {more} more"] if more > 0 else differences


def _trace(program: Program) -> tuple[Trace, Trace]:
    """Run guide and model with random numbers that are the same at every call."""
    alone = Layout(None, 0)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), evaluation():
        for seed in range(NUM_DRAWS):
            torch.manual_seed(seed)
            try:
                guide_trace = trace_guide(program.guide, program.args, program.kwargs, alone)
                drawn = {name: site["value"] for name, site in latent_sites(guide_trace)}
                return guide_trace, trace_program(program.model, program.args, program.kwargs, alone, drawn)
            except Exception as error:  # a model may fail in any way where it is not defined
                failure = error
        raise failure


def _summarize(values: Tensor) -> tuple[float, float]:
    values = torch.as_tensor(values).detach().cpu().double()
    return float(values.sum()), float(values.abs().sum())


def _configuration(guide: Guide) -> Iterator[tuple[str, str]]:
    """Yield the class of a guide, and the options of the modules of this package within it."""
    yield "class", getattr(guide, "__qualname__", type(guide).__qualname__)
    for path, module in guide.named_modules() if isinstance(guide, nn.Module) else ():
        if module is guide or not type(module).__module__.startswith(__name__.partition(".")[0]):
            continue
        yield path, type(module).__name__
        for name, value in vars(module).items():
            if not name.startswith("_") and name != "training":
                if isinstance(value, bool | int | float | str | tuple):
                    yield f"{path}.{name}", str(value)
                elif callable(value):
                    yield f"{path}.{name}", getattr(value, "__name__", type(value).__name__)
        for name, buffer in module.named_buffers(recurse=False):
            yield f"{path}.{name}", _hash(buffer)


def _describe_tensor(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"


def _describe_site(site: Site) -> str:
    role = "observed" if site["is_observed"] else "latent"
    try:
        support = type(site["fn"].support).__name__
    except (AttributeError, NotImplementedError):
        support = "unknown"
    return f"{role} {type(innermost(site['fn'])).__name__} with support {support}, {_describe_tensor(site['value'])}"


def _hashes(program: Program, trace: Trace) -> Iterator[tuple[str, str]]:
    """Yield a hash of each observed value and argument that is data."""
    for name, site in sample_sites(trace):
        if is_data(site):
            yield name, _hash(site["value"])
    for keys, value in tree_flatten_with_path((program.args, program.kwargs))[0]:
        name = f"argument {keystr(keys[1:])}"
        if isinstance(value, Tensor | np.ndarray):
            yield name, _hash(torch.as_tensor(value))
        elif isinstance(value, bool | int | float | str | None):
            yield name, str(value)


def _hash(value: Tensor) -> str:
    """Return a hash of type, shape and values of a tensor."""
    flat = value.detach().cpu().contiguous().reshape(-1)
    content = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return hashlib.sha256(f"{_describe_tensor(value)}:".encode() + content).hexdigest()
