"""The registry of flows: builders by name.

The decorator :func:`register` enters a builder into :data:`FLOWS`. Autoguides, comparisons, tests, benchmarks and the
tables of the documentation iterate over this registry: no other place lists the flows.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Concatenate, ParamSpec, Protocol, TypeAlias, cast, overload

import torch

from pyro_flowguides.nn.arguments import describe
from pyro_flowguides.transforms import Compose, ConditionalFlow, Flow

__all__ = ["FLOWS", "Builder", "Layer", "Recipe", "check_options", "get_flow", "layer_class", "register"]

P = ParamSpec("P")
Layer: TypeAlias = Flow | ConditionalFlow

#: A function ``(input_dim, context_dim=0, **options)`` that returns a flow; one without ``context_dim`` serves where
#: there is no context.
Builder: TypeAlias = Callable[..., Layer]


class Recipe(Protocol[P]):
    """The type of a registered builder: a conditional flow if there is a context, else a flow."""

    __name__: str
    #: The name within those of classes: the autoguide of the title "RealNVP" is ``AutoRealNVP``.
    title: str

    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, input_dim: int, context_dim: int, *args: P.args, **kwargs: P.kwargs
    ) -> ConditionalFlow: ...
    @overload
    def __call__(self, input_dim: int, *args: P.args, **kwargs: P.kwargs) -> Flow: ...


#: Every kind of flow by name, in the order of registration.
FLOWS: dict[str, Recipe[...]] = {}


#: Names that options have elsewhere.
SYNONYMS = {
    **dict.fromkeys(("num_flows", "num_layers", "num_steps", "num_transforms", "n_flows", "n_layers"), "depth"),
    **dict.fromkeys(("hidden", "hidden_dim", "hidden_features", "hidden_size", "hidden_units", "width"), "hidden_dims"),
    "nonlinearity": "activation",
}


def register(title: str) -> Callable[[Callable[Concatenate[int, int, P], Layer]], Recipe[P]]:
    """Enter the decorated builder into :data:`FLOWS` under the function's name.

    This gives the flow an autoguide, ``fg.Auto<title>``, whose signature and docstring are made from the builder's, and
    its name a meaning wherever a flow is chosen by name. A builder may replace one of the same module and name.

    Args:
        title: the flow's name within those of classes, for example ``"RealNVP"``.

    Returns:
        a decorator that returns the builder itself. The builder has the signature ``(input_dim, context_dim=0, *,
        option=default, ...)``: every option is a keyword with a default, and is described under ``Args`` in the
        docstring.

    Raises:
        ValueError: if the builder has another signature, or its name or title belongs to another flow.

    Example:
        >>> import pyro_flowguides as fg
        >>> from pyro_flowguides.transforms import Compose, ConditionalCompose, ConditionalRadial, Radial
        >>> @fg.flows.register("TwoRadial")
        ... def two_radial(input_dim, context_dim=0):
        ...     '''Build a flow of two radial layers.'''
        ...     if context_dim:
        ...         return ConditionalCompose([ConditionalRadial(input_dim, context_dim) for _ in range(2)])
        ...     return Compose([Radial(input_dim) for _ in range(2)])
        >>> fg.AutoTwoRadial.__name__
        'AutoTwoRadial'
        >>> del fg.flows.FLOWS["two_radial"]
    """

    if not isinstance(title, str) or not title.isidentifier():
        raise ValueError(
            f"register: the title must be part of a class name, such as 'RealNVP', got {describe(title)}. Write "
            '@register("Title") above the builder.'
        )

    def add(builder: Callable[Concatenate[int, int, P], Layer]) -> Recipe[P]:
        recipe = cast("Recipe[P]", builder)
        _check_signature(recipe)
        _check_unused(recipe, title)
        recipe.title = title
        FLOWS[recipe.__name__] = recipe
        return recipe

    return add


def _check_signature(recipe: Recipe[...]) -> None:
    signature = inspect.signature(recipe)
    sizes, options = list(signature.parameters.values())[:2], list(signature.parameters.values())[2:]
    if (
        [size.name for size in sizes] != ["input_dim", "context_dim"]
        or sizes[1].default != 0
        or any(option.kind is not option.KEYWORD_ONLY or option.default is option.empty for option in options)
    ):
        raise ValueError(
            f"register: {recipe.__name__} must have the signature (input_dim, context_dim=0, *, option=default, ...), "
            f"got {signature}"
        )


def _check_unused(recipe: Recipe[...], title: str) -> None:
    for name, other in FLOWS.items():
        same = name == recipe.__name__
        if same and other.__module__ != recipe.__module__:
            raise ValueError(f"register: the name {name!r} belongs to {other.__module__}.{name}. Rename the builder.")
        if not same and other.title == title:
            raise ValueError(f"register: the title {title!r} belongs to the flow {name!r}. Choose another title.")


def get_flow(flow: str | Builder) -> Builder:
    """Return the builder of a registered name; return a builder unchanged.

    Raises:
        ValueError: for an unknown name, with the nearest known one.
        TypeError: for anything but a name or a builder.

    Example:
        >>> from pyro_flowguides.flows import get_flow, iaf
        >>> get_flow("iaf") is iaf
        True
    """
    if callable(flow):
        return flow
    if flow in FLOWS:
        return FLOWS[flow]
    if not isinstance(flow, str):
        raise TypeError(f"a flow is a name or a builder, got {describe(flow)}. Known flows: {', '.join(FLOWS)}")
    near = difflib.get_close_matches(flow.lower(), FLOWS, n=1, cutoff=0.0)
    raise ValueError(f"unknown flow {flow!r}: did you mean {near[0]!r}? Known flows: {', '.join(FLOWS)}")


def layer_class(flow: str) -> type[Flow]:
    """Return the class of the first layer of a registered flow.

    Raises:
        ValueError: for an unknown name.

    Example:
        >>> from pyro_flowguides.flows import layer_class
        >>> layer_class("iaf").__name__
        'InverseAutoregressive'
    """
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        built = get_flow(flow)(2)
    return type(cast("Flow", built.parts[0] if isinstance(built, Compose) else built))


def check_options(
    owner: str, builder: Callable[..., object], options: Iterable[str], others: Iterable[str] = ()
) -> None:
    """Refuse an option that the builder does not take, before the builder is called.

    Args:
        owner: the class to name in the message.
        builder: the builder; one with ``**options`` of its own may take any.
        options, others: names of the builder's options, and of the owner's own, for the hint.

    Raises:
        TypeError: with the nearest name and all names.

    Example:
        >>> from pyro_flowguides.flows import check_options, planar
        >>> check_options("AutoPlanar", planar, ["dept"])
        Traceback (most recent call last):
        TypeError: AutoPlanar: unknown option 'dept', did you mean 'depth'? Options of planar: depth, hidden_dims.
    """
    parameters = list(inspect.signature(builder).parameters.values())
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = [parameter.name for parameter in parameters[1:] if parameter.name != "context_dim"]
    for name in options:
        if name not in known:
            near = [SYNONYMS[name]] if SYNONYMS.get(name) in known else []
            near = near or difflib.get_close_matches(name, [*known, *others], n=1)
            hint = f", did you mean {near[0]!r}?" if near else "."
            kind = getattr(builder, "__name__", "the builder")
            raise TypeError(f"{owner}: unknown option {name!r}{hint} Options of {kind}: {', '.join(known)}.")
