"""Recipes: one builder per kind of flow, all with one signature.

A builder returns the whole composed flow: a :class:`~pyro_flowguides.transforms.Compose`, or with ``context_dim > 0``
a :class:`~pyro_flowguides.transforms.ConditionalCompose`, whose ``condition(context)`` is the flow for a context.
Layers that treat coordinates in an order alternate between the natural and the reversed one. The order is part of the
layer, so every recipe starts at the identity.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeAlias, TypeVar, cast

from torch import Tensor
from torch.nn.functional import silu

from pyro_flowguides import transforms as T
from pyro_flowguides.flow_registry import FLOWS, Builder, Layer, Recipe, check_options, get_flow, layer_class, register
from pyro_flowguides.nn.arguments import check_count, check_one_of
from pyro_flowguides.transforms import Compose, ConditionalCompose, Flow
from pyro_flowguides.transforms.docstrings import format_sections, parse_docstring

__all__ = ["FLOWS", "Builder", "Layer", "Recipe", "check_options", "get_flow", "layer_class", "register"]

Activation: TypeAlias = Callable[[Tensor], Tensor]
AnyBuilder = TypeVar("AnyBuilder", bound=Builder)

#: Hidden widths of the conditioners of autoregressive and coupling layers.
HIDDEN_DIMS = (64, 64)


def _layers(
    recipe: str,
    family: type[T.AmortizedFlow | T.ContextFlow],
    input_dim: int,
    context_dim: int,
    depth: int,
    **options: object,
) -> list[Layer]:
    """Build layers of a conditional family, or without a context of the family behind it; options of None are defaults.

    ``hidden_dims`` are the widths of the conditioners, or of the hypernetworks where the context amortizes all
    parameters. Layers that take an ``order`` alternate between the natural and the reversed one.
    """
    input_dim = check_count(recipe, "input_dim", input_dim)
    context_dim = check_count(recipe, "context_dim", context_dim, 0)
    check_count(recipe, "depth", depth)
    options = {name: value for name, value in options.items() if value is not None}
    if issubclass(family, T.ContextFlow):
        options = {"hidden_dims": HIDDEN_DIMS, "activation": silu} | options
    elif not context_dim:
        options.pop("hidden_dims", None)
    build: Builder = partial(family, input_dim, context_dim) if context_dim else partial(family.family, input_dim)
    if "order" not in inspect.signature(family.family).parameters:
        return [build(**options) for _ in range(depth)]
    orders = [range(input_dim), range(input_dim)[::-1]]
    return [build(order=orders[place % 2], **options) for place in range(depth)]


def _compose(layers: Iterable[Layer], context_dim: int) -> Layer:
    return ConditionalCompose(layers) if context_dim else Compose(cast("Iterable[Flow]", layers))


#: Descriptions of the arguments that recipes share; a recipe's own docstring goes before.
ARGUMENTS = {
    "input_dim": "number of coordinates, D.",
    "context_dim": "width of the context, 0 for none.",
    "depth": "number of layers.",
    "hidden_dims": "hidden widths of the network in each layer (default 64, 64).",
    "update": 'the map of one coordinate, "affine", "gated" or "shift".',
    "activation": "elementwise nonlinearity of the networks (default SiLU).",
    "lowest_degree": "lowest degree of a hidden unit. 0 includes units that read no coordinate, only the context\n"
    "    (default: 1, with a context 0).",
}


def _complete_docstring(builder: AnyBuilder) -> AnyBuilder:
    """Add to a docstring the arguments and errors that recipes share."""
    docs = parse_docstring(builder.__doc__)
    arguments = ARGUMENTS | docs.arguments
    raises = [docs.sections.get("Raises", ""), "ValueError: if ``depth < 1`` or ``input_dim < 1``."]
    sections = {
        "Args": "\n".join(f"{name}: {arguments[name]}" for name in inspect.signature(builder).parameters),
        "Raises": "\n".join(filter(None, raises)),
        "Example": docs.sections.get("Example", ""),
    }
    builder.__doc__ = "\n\n".join(filter(None, [docs.summary, docs.body, format_sections(sections)]))
    return builder


# -- recipes -----------------------------------------------------------------------------------------------------------


@register("Planar")
@_complete_docstring
def planar(input_dim: int, context_dim: int = 0, *, depth: int = 8, hidden_dims: Sequence[int] | None = None) -> Layer:
    """Build a flow of planar layers (Rezende & Mohamed 2015).

    Args:
        hidden_dims: hidden widths of the hypernetworks that read a context (default: none); unused without one.

    Example:
        >>> import torch, pyro_flowguides as fg
        >>> fg.flows.planar(3, depth=4)(torch.randn(5, 3)).shape
        torch.Size([5, 3])
    """
    family = T.ConditionalPlanar
    return _compose(_layers("planar", family, input_dim, context_dim, depth, hidden_dims=hidden_dims), context_dim)


@register("Radial")
@_complete_docstring
def radial(input_dim: int, context_dim: int = 0, *, depth: int = 8, hidden_dims: Sequence[int] | None = None) -> Layer:
    """Build a flow of radial layers (Rezende & Mohamed 2015).

    Args:
        hidden_dims: hidden widths of the hypernetworks that read a context (default: none); unused without one.

    Example:
        >>> import torch, pyro_flowguides as fg
        >>> fg.flows.radial(3, context_dim=2).condition(torch.randn(5, 2))(torch.randn(5, 3)).shape
        torch.Size([5, 3])
    """
    family = T.ConditionalRadial
    return _compose(_layers("radial", family, input_dim, context_dim, depth, hidden_dims=hidden_dims), context_dim)


SYLVESTER_VARIANTS: dict[str, type[T.AmortizedFlow]] = {
    "orthogonal": T.ConditionalOrthogonalSylvester,
    "householder": T.ConditionalHouseholderSylvester,
    "triangular": T.ConditionalTriangularSylvester,
}


@register("Sylvester")
@_complete_docstring
def sylvester(
    input_dim: int,
    context_dim: int = 0,
    *,
    depth: int = 4,
    hidden_dims: Sequence[int] | None = None,
    variant: str = "orthogonal",
    bottleneck: int | None = None,
    reflections: int | None = None,
) -> Layer:
    """Build a flow of Sylvester layers (van den Berg et al. 2018).

    The other variants are :class:`~pyro_flowguides.transforms.HouseholderSylvester` and
    :class:`~pyro_flowguides.transforms.TriangularSylvester`, whose layers alternate the order of the coordinates.

    Args:
        hidden_dims: hidden widths of the hypernetworks that read a context (default: none); unused without one.
        variant: where Q comes from: "orthogonal", "householder" or "triangular".
        bottleneck: M ≤ D (default: the smaller of D and 32).
        reflections: number of Householder reflections, even (default 4); only for the variant "householder".

    Raises:
        ValueError: for an unknown variant, a bottleneck outside 1..D, reflections that are odd or of another variant.

    Example:
        >>> import torch, pyro_flowguides as fg
        >>> fg.flows.sylvester(3, variant="householder", bottleneck=2)(torch.randn(5, 3)).shape
        torch.Size([5, 3])
    """
    check_one_of("sylvester", "variant", variant, tuple(SYLVESTER_VARIANTS))
    if reflections is not None and variant != "householder":
        raise ValueError(f"sylvester: the variant {variant!r} has no reflections, only 'householder' does")
    width = min(check_count("sylvester", "input_dim", input_dim), 32) if bottleneck is None else bottleneck
    options = {"bottleneck": width, "reflections": reflections, "hidden_dims": hidden_dims}
    family = SYLVESTER_VARIANTS[variant]
    return _compose(_layers("sylvester", family, input_dim, context_dim, depth, **options), context_dim)


@register("IAF")
@_complete_docstring
def iaf(
    input_dim: int,
    context_dim: int = 0,
    *,
    depth: int = 3,
    hidden_dims: Sequence[int] | None = None,
    update: str = "affine",
    activation: Activation | None = None,
    lowest_degree: int | None = None,
) -> Layer:
    """Build a flow of inverse autoregressive layers (Kingma et al. 2016).

    Every other layer takes the coordinates in reversed order.

    Raises:
        ValueError: for an unknown update.

    Example:
        >>> import torch, pyro_flowguides as fg
        >>> fg.flows.iaf(3, depth=2, hidden_dims=[16], update="gated")(torch.randn(5, 3)).shape
        torch.Size([5, 3])
    """
    options = {"update": update, "activation": activation, "lowest_degree": lowest_degree, "hidden_dims": hidden_dims}
    family = T.ConditionalInverseAutoregressive
    return _compose(_layers("iaf", family, input_dim, context_dim, depth, **options), context_dim)


@register("MAF")
@_complete_docstring
def maf(
    input_dim: int,
    context_dim: int = 0,
    *,
    depth: int = 3,
    hidden_dims: Sequence[int] | None = None,
    update: str = "affine",
    activation: Activation | None = None,
    lowest_degree: int | None = None,
) -> Layer:
    """Build a flow of masked autoregressive layers (Papamakarios et al. 2017).

    Every other layer takes the coordinates in reversed order. Drawing is the expensive direction: prefer
    :func:`~pyro_flowguides.flows.iaf` for a posterior, unless draws of other distributions must be scored.

    Raises:
        ValueError: for an unknown update.

    Example:
        >>> import torch, pyro_flowguides as fg
        >>> fg.flows.maf(3).inv(torch.randn(5, 3)).shape
        torch.Size([5, 3])
    """
    options = {"update": update, "activation": activation, "lowest_degree": lowest_degree, "hidden_dims": hidden_dims}
    family = T.ConditionalMaskedAutoregressive
    return _compose(_layers("maf", family, input_dim, context_dim, depth, **options), context_dim)


@register("NICE")
@_complete_docstring
def nice(
    input_dim: int,
    context_dim: int = 0,
    *,
    depth: int = 6,
    hidden_dims: Sequence[int] | None = None,
    activation: Activation | None = None,
) -> Layer:
    """Build a flow of additive couplings and a final elementwise scale (Dinh et al. 2015).

    Couplings alternate between the two halves of the coordinates.

    Example:
        >>> import torch, pyro_flowguides as fg
        >>> fg.flows.nice(4, depth=2)(torch.randn(5, 4)).shape
        torch.Size([5, 4])
    """
    family, options = T.ConditionalAdditiveCoupling, {"hidden_dims": hidden_dims, "activation": activation}
    couplings = _layers("nice", family, input_dim, context_dim, depth, **options)
    scale = _layers("nice", T.ConditionalElementwiseAffine, input_dim, context_dim, 1)
    return _compose([*couplings, *scale], context_dim)


@register("RealNVP")
@_complete_docstring
def realnvp(
    input_dim: int,
    context_dim: int = 0,
    *,
    depth: int = 6,
    hidden_dims: Sequence[int] | None = None,
    activation: Activation | None = None,
) -> Layer:
    """Build a flow of affine couplings (Dinh et al. 2017).

    Couplings alternate between the two halves of the coordinates.

    Example:
        >>> import torch, pyro_flowguides as fg
        >>> fg.flows.realnvp(4, context_dim=2).condition(torch.randn(5, 2))(torch.randn(5, 4)).shape
        torch.Size([5, 4])
    """
    family, options = T.ConditionalAffineCoupling, {"hidden_dims": hidden_dims, "activation": activation}
    return _compose(_layers("realnvp", family, input_dim, context_dim, depth, **options), context_dim)


__all__ += FLOWS
