"""One autoguide class per registered flow, with the flow's options in its signature and docstring.

The classes are created on first use: ``pyro_flowguides.guides.AutoRealNVP`` is the autoguide of the flow that is
registered with the title "RealNVP".
"""

import difflib
import inspect
import textwrap
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from types import new_class
from typing import Any, cast

from pyro_flowguides import transforms
from pyro_flowguides.flows import FLOWS, Builder, layer_class
from pyro_flowguides.guides.autoflow import AutoFlow, RegisteredFlowGuide
from pyro_flowguides.programs.types import Model
from pyro_flowguides.transforms.docstrings import format_sections, parse_docstring

__all__ = ["find_guide", "guide_names"]

#: Options of Pyro's class that have no counterpart here.
WITHOUT_EFFECT = ("log_scale_max_clip", "log_scale_min_clip", "sigmoid_bias")


class PyroIAFGuide(RegisteredFlowGuide):
    """Base of the autoguide with inverse autoregressive layers.

    It replaces Pyro's ``AutoIAFNormal`` and understands its options. ``log_scale_min_clip``, ``log_scale_max_clip`` and
    ``sigmoid_bias`` are accepted with a warning: scales are bounded smoothly here.

    Args:
        hidden_dim: Pyro's name for ``hidden_dims``.
        num_transforms: Pyro's name for ``depth``.
        stable: Pyro's name for ``update="gated"``.
    """

    def __init__(
        self,
        model: Model,
        hidden_dim: Sequence[int] | None = None,
        init_loc_fn: Callable[..., object] | None = None,
        num_transforms: int | None = None,
        *,
        stable: bool = False,
        **options: Any,
    ) -> None:
        owner = type(self).__name__
        for name in [name for name in WITHOUT_EFFECT if name in options]:
            warnings.warn(f"{owner}: {name} has no effect, scales are bounded smoothly", UserWarning, stacklevel=3)
            del options[name]
        renamed = [
            ("hidden_dim", "hidden_dims", hidden_dim),
            ("num_transforms", "depth", num_transforms),
            ("stable", "update", "gated" if stable else None),
        ]
        for pyros, name, value in renamed:
            if value is not None and name in options:
                raise TypeError(f"{owner}: {pyros} is Pyro's name for {name}, give only one of them")
            if value is not None:
                options[name] = value
        if init_loc_fn is not None:
            options["init_loc_fn"] = init_loc_fn
        super().__init__(model, **options)


#: Base classes of the guides that understand more than the options of their flow, by name of the flow.
BASES: dict[str, type[RegisteredFlowGuide]] = {"iaf": PyroIAFGuide}


def guide_names() -> list[str]:
    """List the names of the autoguides of all registered flows."""
    return [f"Auto{recipe.title}" for recipe in FLOWS.values()]


def find_guide(module: str, name: str) -> type[RegisteredFlowGuide]:
    """Return the autoguide of this name, for an attribute access on a module.

    Raises:
        AttributeError: if no registered flow has it, with the nearest name.

    Example:
        >>> from pyro_flowguides.guides.registered import find_guide
        >>> find_guide("pyro_flowguides", "AutoRealNVP").flow
        'realnvp'
    """
    for flow, recipe in FLOWS.items():
        if name == f"Auto{recipe.title}":
            return _create_class(name, flow, cast("Builder", recipe))
    near = difflib.get_close_matches(name, guide_names(), n=1) if name.startswith("Auto") else []
    hint = f", did you mean {near[0]!r}?" if near else ""
    raise AttributeError(f"module {module!r} has no attribute {name!r}{hint}")


@cache
def _create_class(name: str, flow: str, builder: Builder) -> type[RegisteredFlowGuide]:
    base = BASES.get(flow, RegisteredFlowGuide)
    signature = _join_signatures(base, builder)

    def __init__(self: RegisteredFlowGuide, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, *args, **kwargs)

    __init__.__signature__ = signature  # type: ignore[attr-defined]
    __init__.__doc__ = f"Create the guide; see :class:`{name}`."
    namespace = {
        "__module__": __package__,
        "__doc__": _join_docstrings(name, flow, builder, base, signature),
        "__init__": __init__,
        "flow": flow,
    }
    return new_class(name, (base,), exec_body=lambda members: members.update(namespace))


def _join_signatures(base: type[RegisteredFlowGuide], builder: Builder) -> inspect.Signature:
    """Join the parameters of the base class, of :class:`AutoFlow` and of the builder, the positional ones first."""
    parameters: dict[str, inspect.Parameter] = {}
    for function in (base.__init__, AutoFlow.__init__, builder):
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind is not parameter.VAR_KEYWORD and name not in ("flow", "input_dim", "context_dim"):
                parameters.setdefault(name, parameter)
    return inspect.Signature(sorted(parameters.values(), key=lambda parameter: parameter.kind))


def _join_docstrings(
    name: str, flow: str, builder: Builder, base: type[RegisteredFlowGuide], signature: inspect.Signature
) -> str:
    """Describe the guide, its flow and one layer of it, then all arguments."""
    layer = layer_class(flow)
    auto, own, recipe, one = (parse_docstring(source.__doc__) for source in (AutoFlow, base, builder, layer))
    arguments = recipe.arguments | auto.arguments | own.arguments
    listed = [f"{option}: {arguments.get(option, '(not described)')}" for option in signature.parameters]
    raises = [docs.sections["Raises"] for docs in (auto, recipe) if "Raises" in docs.sections]
    sections = {
        "Args": "\n".join(listed[1:]),  # without self
        "Raises": "\n".join(raises),
        "References": one.sections.get("References", ""),
        "Example": EXAMPLE.format(name=name),
    }
    introduction = (
        f"This is an :class:`~pyro_flowguides.guides.AutoFlow` (see there for the base distribution, the tails and the "
        f"affine map) with a flow from :func:`~{builder.__module__}.{flow}`. {recipe.body}"
    )
    module = transforms.__name__ if hasattr(transforms, layer.__name__) else layer.__module__
    one_layer = f"**One layer**, :class:`~{module}.{layer.__name__}`. {one.summary}"
    paragraphs = [
        f"Autoguide whose posterior is {recipe.summary.removeprefix('Build ') or flow}",
        textwrap.fill(introduction, 110, break_long_words=False),
        own.body,
        textwrap.fill(one_layer, 110, break_long_words=False),
        one.body,
        format_sections(sections),
    ]
    return "\n\n".join(filter(None, paragraphs)) + "\n"


EXAMPLE = """\
>>> import pyro, pyro.distributions as dist, pyro_flowguides as fg
>>> from pyro.infer import SVI, Trace_ELBO
>>> def model():
...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
...     pyro.sample("y", dist.Normal(x**2, 1.0).expand([2]).to_event(1))
>>> guide = fg.{name}(model)
>>> svi = SVI(model, guide, pyro.optim.Adam({{"lr": 1e-2}}), Trace_ELBO())
>>> loss = svi.step()
>>> sorted(guide.median())
['x', 'y']"""
