"""Recipes: one builder per kind of flow, all with one signature, and their registry.

A builder returns the whole composed flow: a :class:`~pyro_flowguides.transforms.Compose`, or with ``context_dim > 0``
a :class:`~pyro_flowguides.transforms.ConditionalCompose` to be conditioned on a context. Layers that see coordinates in
an order alternate between the natural and the reversed one, inside the layer, so that every recipe starts at the
identity.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

from torch.nn.functional import silu

from pyro_flowguides import transforms as T
from pyro_flowguides.transforms import Compose, ConditionalCompose, ConditionalFlow, Flow

__all__ = ["FLOWS", "get_flow", "iaf", "maf", "nice", "planar", "radial", "realnvp", "sylvester"]

Builder: TypeAlias = Callable[..., Flow | ConditionalFlow]

#: Hidden widths of the conditioners of autoregressive and coupling layers.
HIDDEN_DIMS = (64, 64)


def _compose(parts: Iterable[Flow | ConditionalFlow], context_dim: int) -> Flow | ConditionalFlow:
    return ConditionalCompose(parts) if context_dim else Compose(parts)  # type: ignore[arg-type]


def _layers(kind: str, depth: int) -> range:
    if depth < 1:
        raise ValueError(f"{kind}: depth must be at least 1, got {depth}")
    return range(depth)


def _order(input_dim: int, layer: int) -> range:
    """The natural order for even layers, the reversed for odd ones."""
    return range(input_dim) if layer % 2 == 0 else range(input_dim)[::-1]


def _amortized(
    family: type[T.AmortizedFlow],
    input_dim: int,
    context_dim: int,
    hidden_dims: Sequence[int] | None = None,
    **options: Any,
) -> Flow | ConditionalFlow:
    """A layer whose parameters a context, if there is one, amortizes; ``hidden_dims`` are the hypernetwork's."""
    if context_dim:
        return family(input_dim, context_dim, hidden_dims or (), **options)
    return family.family(input_dim, **options)


def _alternating(
    kind: str,
    family: type[T.ContextFlow],
    input_dim: int,
    context_dim: int,
    depth: int,
    hidden_dims: Sequence[int] | None,
    options: dict[str, Any],
) -> list[Flow | ConditionalFlow]:
    """Layers with conditioner networks of width ``hidden_dims``, the order of the coordinates alternating."""
    shared = {"hidden_dims": HIDDEN_DIMS if hidden_dims is None else hidden_dims, "activation": silu, **options}
    layers: list[Flow | ConditionalFlow] = []
    for layer in _layers(kind, depth):
        arguments = {"order": _order(input_dim, layer), **shared}
        layers.append(
            family(input_dim, context_dim, **arguments) if context_dim else family.family(input_dim, **arguments)
        )
    return layers


def planar(
    input_dim: int, context_dim: int = 0, *, depth: int = 8, hidden_dims: Sequence[int] | None = None
) -> Flow | ConditionalFlow:
    """Planar layers (Rezende & Mohamed 2015).

    Args:
        input_dim: D.
        context_dim: width of the context, 0 for none.
        depth: number of layers.
        hidden_dims: hidden layers of the hypernetworks (none: linear amortization); unused without a context.

    Raises:
        ValueError: if ``depth < 1`` or ``input_dim < 1``.

    Example:
        >>> import torch, pyro_flowguides as fg
        >>> fg.flows.planar(3, depth=4)(torch.randn(5, 3)).shape
        torch.Size([5, 3])
    """
    layers = [_amortized(T.ConditionalPlanar, input_dim, context_dim, hidden_dims) for _ in _layers("planar", depth)]
    return _compose(layers, context_dim)


def radial(
    input_dim: int, context_dim: int = 0, *, depth: int = 8, hidden_dims: Sequence[int] | None = None
) -> Flow | ConditionalFlow:
    """Radial layers (Rezende & Mohamed 2015); arguments as for :func:`planar`.

    Example:
        >>> import torch, pyro_flowguides as fg
        >>> fg.flows.radial(3, context_dim=2).condition(torch.randn(5, 2))(torch.randn(5, 3)).shape
        torch.Size([5, 3])
    """
    layers = [_amortized(T.ConditionalRadial, input_dim, context_dim, hidden_dims) for _ in _layers("radial", depth)]
    return _compose(layers, context_dim)


SYLVESTER_VARIANTS = ("orthogonal", "householder", "triangular")


def sylvester(
    input_dim: int,
    context_dim: int = 0,
    *,
    depth: int = 4,
    hidden_dims: Sequence[int] | None = None,
    variant: str = "orthogonal",
    bottleneck: int | None = None,
    **options: Any,
) -> Flow | ConditionalFlow:
    """Sylvester layers (van den Berg et al. 2018).

    Args:
        input_dim: D.
        context_dim: width of the context, 0 for none.
        depth: number of layers.
        hidden_dims: hidden layers of the hypernetworks (none: linear amortization); unused without a context.
        variant: "orthogonal", "householder" or "triangular".
        bottleneck: M ≤ D; by default the smaller of D and 32.
        **options: ``reflections`` for the Householder variant.

    Raises:
        ValueError: for an unknown variant, a bottleneck outside 1..D, ``depth < 1`` or ``input_dim < 1``.

    Example:
        >>> import torch, pyro_flowguides as fg
        >>> fg.flows.sylvester(3, variant="householder", bottleneck=2)(torch.randn(5, 3)).shape
        torch.Size([5, 3])
    """
    if variant not in SYLVESTER_VARIANTS:
        raise ValueError(f"sylvester: variant must be one of {SYLVESTER_VARIANTS}, got {variant!r}")
    family = getattr(T, f"Conditional{variant.capitalize()}Sylvester")
    options["bottleneck"] = min(input_dim, 32) if bottleneck is None else bottleneck
    layers = []
    for layer in _layers("sylvester", depth):
        if variant == "triangular":
            options["order"] = _order(input_dim, layer)
        layers.append(_amortized(family, input_dim, context_dim, hidden_dims, **options))
    return _compose(layers, context_dim)


def iaf(
    input_dim: int,
    context_dim: int = 0,
    *,
    depth: int = 3,
    hidden_dims: Sequence[int] | None = None,
    **options: Any,
) -> Flow | ConditionalFlow:
    """Inverse autoregressive layers (Kingma et al. 2016), the order reversed between them.

    Args:
        input_dim: D.
        context_dim: width of the context, 0 for none.
        depth: number of layers.
        hidden_dims: widths of each layer's MADE (default 64, 64).
        **options: ``update`` ("affine", "gated" or "shift") and ``activation``, see
            :class:`~pyro_flowguides.transforms.InverseAutoregressive`.

    Raises:
        ValueError: if ``depth < 1`` or ``input_dim < 1``.

    Example:
        >>> import torch, pyro_flowguides as fg
        >>> fg.flows.iaf(3, depth=2, hidden_dims=[16], update="gated")(torch.randn(5, 3)).shape
        torch.Size([5, 3])
    """
    layers = _alternating(
        "iaf", T.ConditionalInverseAutoregressive, input_dim, context_dim, depth, hidden_dims, options
    )
    return _compose(layers, context_dim)


def maf(
    input_dim: int,
    context_dim: int = 0,
    *,
    depth: int = 3,
    hidden_dims: Sequence[int] | None = None,
    **options: Any,
) -> Flow | ConditionalFlow:
    """Masked autoregressive layers (Papamakarios et al. 2017), the order reversed between them.

    Arguments as for :func:`iaf`. Drawing from it is the slow direction: as a posterior prefer :func:`iaf`.

    Example:
        >>> import torch, pyro_flowguides as fg
        >>> fg.flows.maf(3).inv(torch.randn(5, 3)).shape
        torch.Size([5, 3])
    """
    layers = _alternating("maf", T.ConditionalMaskedAutoregressive, input_dim, context_dim, depth, hidden_dims, options)
    return _compose(layers, context_dim)


def nice(
    input_dim: int,
    context_dim: int = 0,
    *,
    depth: int = 6,
    hidden_dims: Sequence[int] | None = None,
    **options: Any,
) -> Flow | ConditionalFlow:
    """Additive couplings of alternating halves and a final elementwise scale (Dinh et al. 2015).

    Args:
        input_dim: D.
        context_dim: width of the context, 0 for none.
        depth: number of couplings.
        hidden_dims: widths of each coupling's network (default 64, 64).
        **options: ``activation`` (default SiLU).

    Raises:
        ValueError: if ``depth < 1`` or ``input_dim < 1``.

    Example:
        >>> import torch, pyro_flowguides as fg
        >>> fg.flows.nice(4, depth=2)(torch.randn(5, 4)).shape
        torch.Size([5, 4])
    """
    layers = _alternating("nice", T.ConditionalAdditiveCoupling, input_dim, context_dim, depth, hidden_dims, options)
    scale = _amortized(T.ConditionalElementwiseAffine, input_dim, context_dim)
    return _compose([*layers, scale], context_dim)


def realnvp(
    input_dim: int,
    context_dim: int = 0,
    *,
    depth: int = 6,
    hidden_dims: Sequence[int] | None = None,
    **options: Any,
) -> Flow | ConditionalFlow:
    """Affine couplings of alternating halves (Dinh et al. 2017); arguments as for :func:`nice`.

    Example:
        >>> import torch, pyro_flowguides as fg
        >>> fg.flows.realnvp(4, context_dim=2).condition(torch.randn(5, 2))(torch.randn(5, 4)).shape
        torch.Size([5, 4])
    """
    layers = _alternating("realnvp", T.ConditionalAffineCoupling, input_dim, context_dim, depth, hidden_dims, options)
    return _compose(layers, context_dim)


#: Every kind of flow by name: what autoguides, comparisons, tests and benchmarks iterate over.
FLOWS: dict[str, Builder] = {
    "planar": planar,
    "radial": radial,
    "sylvester": sylvester,
    "iaf": iaf,
    "maf": maf,
    "nice": nice,
    "realnvp": realnvp,
}


def get_flow(flow: str | Builder) -> Builder:
    """The builder of a registered name; a builder is returned as it is.

    Raises:
        ValueError: for an unknown name, with the nearest known one.

    Example:
        >>> from pyro_flowguides.flows import get_flow, iaf
        >>> get_flow("iaf") is iaf
        True
    """
    if callable(flow):
        return flow
    if flow in FLOWS:
        return FLOWS[flow]
    near = difflib.get_close_matches(str(flow).lower(), FLOWS, n=1, cutoff=0.0)
    raise ValueError(f"unknown flow {flow!r}: did you mean {near[0]!r}? Known flows: {', '.join(FLOWS)}")
