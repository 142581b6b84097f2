"""Recipes: one builder per kind of flow, all with one signature.

A builder returns the whole composed flow: a :class:`~pyro_flowguides.transforms.Compose`, or with ``context_dim > 0``
a :class:`~pyro_flowguides.transforms.ConditionalCompose`, whose ``condition(context)`` is the flow for a context.
Layers that treat coordinates in an order alternate between the natural and the reversed one. The order is part of the
layer, so every recipe starts at the identity.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias, cast

from torch import Tensor
from torch.nn.functional import silu

from pyro_flowguides import transforms as T
from pyro_flowguides.flow_registry import FLOWS, Builder, Layer, Recipe, check_options, get_flow, layer_class, register
from pyro_flowguides.transforms import Compose, ConditionalCompose, Flow

__all__ = ["FLOWS", "Builder", "Layer", "Recipe", "check_options", "get_flow", "layer_class", "register"]

Activation: TypeAlias = Callable[[Tensor], Tensor]

#: Hidden widths of the conditioners of autoregressive and coupling layers.
HIDDEN_DIMS = (64, 64)


def _layers(
    recipe: str,
    family: type[T.AmortizedFlow | T.ContextFlow],
    input_dim: int,
    context_dim: int,
    depth: int,
    hidden_dims: Sequence[int] | None,
    **options: object,
) -> list[Layer]:
    """Build ``depth`` layers of a conditional family, or without a context of the family behind it.

    ``hidden_dims`` are the widths of the conditioners, or of the hypernetworks where the context amortizes all
    parameters. Layers that take an ``order`` alternate between the natural and the reversed one.
    """
    if depth < 1:
        raise ValueError(f"{recipe}: depth must be at least 1, got {depth}")
    if issubclass(family, T.ContextFlow):
        options["hidden_dims"] = HIDDEN_DIMS if hidden_dims is None else hidden_dims
    elif context_dim:
        options["hidden_dims"] = hidden_dims or ()
    build = cast("Builder", family if context_dim else family.family)
    sizes = (input_dim, context_dim) if context_dim else (input_dim,)
    if "order" not in inspect.signature(family.family).parameters:
        return [build(*sizes, **options) for _ in range(depth)]
    orders = [range(input_dim), range(input_dim)[::-1]]
    return [build(*sizes, order=orders[place % 2], **options) for place in range(depth)]


def _compose(layers: Iterable[Layer], context_dim: int) -> Layer:
    return ConditionalCompose(layers) if context_dim else Compose(cast("Iterable[Flow]", layers))


# -- recipes -----------------------------------------------------------------------------------------------------------


@register("Planar")
def planar(input_dim: int, context_dim: int = 0, *, depth: int = 8, hidden_dims: Sequence[int] | None = None) -> Layer:
    """Build a flow of planar layers (Rezende & Mohamed 2015).

    Args:
        input_dim: number of coordinates, D.
        context_dim: width of the context, 0 for none.
        depth: number of layers.
        hidden_dims: hidden widths of the hypernetworks that read a context (default: none); unused without one.

    Raises:
        ValueError: if ``depth < 1`` or ``input_dim < 1``.

    Example:
        >>> import torch, pyro_flowguides as fg
        >>> fg.flows.planar(3, depth=4)(torch.randn(5, 3)).shape
        torch.Size([5, 3])
    """
    return _compose(_layers("planar", T.ConditionalPlanar, input_dim, context_dim, depth, hidden_dims), context_dim)


@register("Radial")
def radial(input_dim: int, context_dim: int = 0, *, depth: int = 8, hidden_dims: Sequence[int] | None = None) -> Layer:
    """Build a flow of radial layers (Rezende & Mohamed 2015).

    Args:
        input_dim: number of coordinates, D.
        context_dim: width of the context, 0 for none.
        depth: number of layers.
        hidden_dims: hidden widths of the hypernetworks that read a context (default: none); unused without one.

    Raises:
        ValueError: if ``depth < 1`` or ``input_dim < 1``.

    Example:
        >>> import torch, pyro_flowguides as fg
        >>> fg.flows.radial(3, context_dim=2).condition(torch.randn(5, 2))(torch.randn(5, 3)).shape
        torch.Size([5, 3])
    """
    return _compose(_layers("radial", T.ConditionalRadial, input_dim, context_dim, depth, hidden_dims), context_dim)


SYLVESTER_VARIANTS: dict[str, type[T.AmortizedFlow]] = {
    "orthogonal": T.ConditionalOrthogonalSylvester,
    "householder": T.ConditionalHouseholderSylvester,
    "triangular": T.ConditionalTriangularSylvester,
}


@register("Sylvester")
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
        input_dim: number of coordinates, D.
        context_dim: width of the context, 0 for none.
        depth: number of layers.
        hidden_dims: hidden widths of the hypernetworks that read a context (default: none); unused without one.
        variant: where Q comes from: "orthogonal", "householder" or "triangular".
        bottleneck: M ≤ D (default: the smaller of D and 32).
        reflections: number of Householder reflections, even (default 4); only for the variant "householder".

    Raises:
        ValueError: for an unknown variant, a bottleneck outside 1..D, reflections that are odd or of another variant,
            ``depth < 1`` or ``input_dim < 1``.

    Example:
        >>> import torch, pyro_flowguides as fg
        >>> fg.flows.sylvester(3, variant="householder", bottleneck=2)(torch.randn(5, 3)).shape
        torch.Size([5, 3])
    """
    if variant not in SYLVESTER_VARIANTS:
        raise ValueError(f"sylvester: variant must be one of {tuple(SYLVESTER_VARIANTS)}, got {variant!r}")
    options = {"bottleneck": min(input_dim, 32) if bottleneck is None else bottleneck}
    if reflections is not None:
        if variant != "householder":
            raise ValueError(f"sylvester: the variant {variant!r} has no reflections, only 'householder' does")
        options["reflections"] = reflections
    family = SYLVESTER_VARIANTS[variant]
    return _compose(_layers("sylvester", family, input_dim, context_dim, depth, hidden_dims, **options), context_dim)


@register("IAF")
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

    Args:
        input_dim: number of coordinates, D.
        context_dim: width of the context, 0 for none.
        depth: number of layers.
        hidden_dims: hidden widths of each layer's MADE (default 64, 64).
        update: the map of one coordinate, "affine", "gated" or "shift".
        activation: elementwise nonlinearity of the MADEs (default SiLU).
        lowest_degree: lowest degree of a hidden unit. 0 includes units that read no coordinate, only the context
            (default: 1, with a context 0).

    Raises:
        ValueError: for an unknown update, ``depth < 1`` or ``input_dim < 1``.

    Example:
        >>> import torch, pyro_flowguides as fg
        >>> fg.flows.iaf(3, depth=2, hidden_dims=[16], update="gated")(torch.randn(5, 3)).shape
        torch.Size([5, 3])
    """
    options = _made_options(update, activation, lowest_degree)
    family = T.ConditionalInverseAutoregressive
    return _compose(_layers("iaf", family, input_dim, context_dim, depth, hidden_dims, **options), context_dim)


@register("MAF")
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

    Args:
        input_dim: number of coordinates, D.
        context_dim: width of the context, 0 for none.
        depth: number of layers.
        hidden_dims: hidden widths of each layer's MADE (default 64, 64).
        update: the map of one coordinate, "affine", "gated" or "shift".
        activation: elementwise nonlinearity of the MADEs (default SiLU).
        lowest_degree: lowest degree of a hidden unit. 0 includes units that read no coordinate, only the context
            (default: 1, with a context 0).

    Raises:
        ValueError: for an unknown update, ``depth < 1`` or ``input_dim < 1``.

    Example:
        >>> import torch, pyro_flowguides as fg
        >>> fg.flows.maf(3).inv(torch.randn(5, 3)).shape
        torch.Size([5, 3])
    """
    options = _made_options(update, activation, lowest_degree)
    family = T.ConditionalMaskedAutoregressive
    return _compose(_layers("maf", family, input_dim, context_dim, depth, hidden_dims, **options), context_dim)


def _made_options(update: str, activation: Activation | None, lowest_degree: int | None) -> dict[str, object]:
    options: dict[str, object] = {"update": update, "activation": activation or silu}
    return options if lowest_degree is None else {**options, "lowest_degree": lowest_degree}


@register("NICE")
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

    Args:
        input_dim: number of coordinates, D.
        context_dim: width of the context, 0 for none.
        depth: number of couplings.
        hidden_dims: hidden widths of each coupling's network (default 64, 64).
        activation: elementwise nonlinearity of the networks (default SiLU).

    Raises:
        ValueError: if ``depth < 1`` or ``input_dim < 1``.

    Example:
        >>> import torch, pyro_flowguides as fg
        >>> fg.flows.nice(4, depth=2)(torch.randn(5, 4)).shape
        torch.Size([5, 4])
    """
    family, options = T.ConditionalAdditiveCoupling, {"activation": activation or silu}
    couplings = _layers("nice", family, input_dim, context_dim, depth, hidden_dims, **options)
    scale = _layers("nice", T.ConditionalElementwiseAffine, input_dim, context_dim, 1, None)
    return _compose([*couplings, *scale], context_dim)


@register("RealNVP")
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

    Args:
        input_dim: number of coordinates, D.
        context_dim: width of the context, 0 for none.
        depth: number of couplings.
        hidden_dims: hidden widths of each coupling's network (default 64, 64).
        activation: elementwise nonlinearity of the networks (default SiLU).

    Raises:
        ValueError: if ``depth < 1`` or ``input_dim < 1``.

    Example:
        >>> import torch, pyro_flowguides as fg
        >>> fg.flows.realnvp(4, context_dim=2).condition(torch.randn(5, 2))(torch.randn(5, 4)).shape
        torch.Size([5, 4])
    """
    family, options = T.ConditionalAffineCoupling, {"activation": activation or silu}
    return _compose(_layers("realnvp", family, input_dim, context_dim, depth, hidden_dims, **options), context_dim)


__all__ += FLOWS
