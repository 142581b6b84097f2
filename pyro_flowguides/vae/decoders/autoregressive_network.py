"""The base class of autoregressive decoders: context, parallel evaluation, and ancestral generation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["AutoregressiveNetwork", "ContextProjection", "GenerationStep"]


class GenerationStep(NamedTuple):
    """The channels that are drawn together, and their position."""

    channels: slice
    position: tuple[int, ...]


class AutoregressiveNetwork(nn.Module):
    r"""A network that computes the parameters of :math:`p(x_i \mid x_{<i}, c)` for all positions i in one pass.

    .. math:: p(x \mid c) = \prod_i p(x_i \mid \theta_i(x_{<i}, c))

    Positions are in raster order unless a network documents another order. With ``groups=1`` all channels of a position
    are drawn from the same parameters (whole-pixel conditioning). With ``groups=channels`` they are drawn one after the
    other: the parameters of a channel also depend on the earlier channels, and output k belongs to channel
    ``k % channels``.

    The network is independent of the likelihood: it maps standardized data to ``outputs`` parameters per position.
    :class:`~pyro_flowguides.vae.AutoregressiveDistribution` turns it into a distribution.

    Cost: one pass for the density. :meth:`generate` computes every unit once per position (once per channel with
    ``groups``) from cached values: unless a network says otherwise, about the arithmetic of one pass for a whole draw.

    Args:
        shape: ``(channels, height, width)`` for images, ``(channels, length)`` for sequences.
        outputs: number of parameters per position, a multiple of ``groups``.
        features: number of global features in the context.
        maps: number of maps, of the size of the data, in the context.
        groups: 1 or the number of channels.

    Shapes:
        x ``(B, *shape)``, features ``(B, features)``, maps ``(B, maps, *space)``; result ``(B, outputs, *space)``.

    Raises:
        ValueError: if a size is out of range, or an input has the wrong shape.
    """

    #: Numbers of spatial dimensions that the network supports.
    supported_spatial_dims: ClassVar[Collection[int]] = (2,)

    def __init__(self, shape: Sequence[int], outputs: int, features: int, maps: int, groups: int) -> None:
        super().__init__()
        name = type(self).__name__
        if len(shape) - 1 not in self.supported_spatial_dims or min(shape) < 1:
            shapes = {1: "(channels, length)", 2: "(channels, height, width)"}
            expected = " or ".join(shapes[dims] for dims in self.supported_spatial_dims)
            raise ValueError(f"{name}: shape must be {expected}, got {tuple(shape)}")
        if outputs < 1 or features < 0 or maps < 0:
            raise ValueError(f"{name}: need outputs >= 1 and features, maps >= 0, got {outputs}, {features}, {maps}")
        if groups not in (1, shape[0]) or outputs % groups:
            raise ValueError(
                f"{name}: groups must be 1 or the number of channels {shape[0]}, and outputs a multiple of groups, "
                f"got groups {groups}, outputs {outputs}"
            )
        self.shape, self.outputs, self.groups = tuple(shape), outputs, groups
        self.features, self.maps = features, maps

    def _check_width(self, name: str, width: int) -> None:
        """Check that a gated layer of this width pairs channels of the same group."""
        if width < 1 or width % self.groups:
            raise ValueError(
                f"{type(self).__name__}: {name} must be a positive multiple of groups {self.groups}, got {width}"
            )

    def evaluate(self, x: Tensor, contexts: dict[nn.Module, Tensor]) -> Tensor:
        """Return all outputs, given the projected context of every layer."""
        raise NotImplementedError

    def outputs_by_step(self, x: Tensor, contexts: dict[nn.Module, Tensor]) -> Iterator[tuple[GenerationStep, Tensor]]:
        """Iterate over the steps of generation and the outputs ``(B, outputs)`` at their positions, with caches.

        Between two steps the caller writes what it draws into x.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, features: Tensor | None = None, maps: Tensor | None = None) -> Tensor:
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"{type(self).__name__}: x must have shape (B, {self.shape}), got {tuple(x.shape)}")
        return self.evaluate(x, self.project_context(len(x), features, maps))

    def generate(
        self,
        draw: Callable[[Tensor], Tensor],
        size: int,
        features: Tensor | None = None,
        maps: Tensor | None = None,
        standardize: Callable[[Tensor], Tensor] = torch.clone,
    ) -> Tensor:
        """Draw data ``(size, *shape)``, one position after the other, in evaluation mode and with caches.

        Args:
            draw: from the parameters at one position ``(B, outputs)`` to a draw of its channels ``(B, channels)``.
            size: number of data B.
            features, maps: the context.
            standardize: from drawn values to network inputs, elementwise.
        """
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                values = next(self.parameters()).new_zeros(size, *self.shape)
                inputs = standardize(values).clone()
                for step, outputs in self.outputs_by_step(inputs, self.project_context(size, features, maps)):
                    drawn: tuple[slice | int, ...] = (slice(None), step.channels, *step.position)
                    values[drawn] = draw(outputs)[:, step.channels]
                    inputs[drawn] = standardize(values[drawn])
        finally:
            self.train(training)
        return values

    def members(self) -> Sequence[AutoregressiveNetwork]:
        """Return the members of the ensemble whose densities are averaged: by default only this network."""
        return [self]

    def steps(self) -> Iterator[GenerationStep]:
        """Iterate over the steps of generation, in order: one for each group of channels at every position."""
        for position in itertools.product(*map(range, self.shape[1:])):
            for group in range(self.groups):
                yield GenerationStep(slice(group, None, self.groups), position)

    def project_context(self, size: int, features: Tensor | None, maps: Tensor | None) -> dict[nn.Module, Tensor]:
        """Project the context for every layer."""
        for name, context, expected in (
            ("features", features, (size, self.features) if self.features else None),
            ("maps", maps, (size, self.maps, *self.shape[1:]) if self.maps else None),
        ):
            shape = None if context is None else tuple(context.shape)
            if shape != expected:
                raise ValueError(f"{type(self).__name__}: {name} must have shape {expected}, got {shape}")
        return {part: part(features, maps) for part in self.modules() if isinstance(part, ContextProjection)}

    def extra_repr(self) -> str:
        return f"{self.shape} -> {self.outputs}, features={self.features}, maps={self.maps}, groups={self.groups}"


class ContextProjection(nn.Module):
    """The term that the context adds to the pre-activation of a layer: a linear function of global features plus a
    convolution of maps.

    Args:
        features, maps: numbers of global features and of maps of the size of the data; 0 for none.
        width: number of channels of the result.
        spatial_dims: 2 for images, 1 for sequences.
        reach: reach of the convolution of the maps in every direction; 0 for a 1×1 convolution.
        pool: factor by which maps are first averaged, for layers at a lower resolution.

    Shapes:
        features ``(B, features)``, maps ``(B, maps, *space)``; result ``(B, width, *space)`` or, without maps, a tensor
        that broadcasts to this shape.
    """

    def __init__(
        self, features: int, maps: int, width: int, spatial_dims: int = 2, *, reach: int = 0, pool: int = 1
    ) -> None:
        super().__init__()
        convolution: Callable[..., nn.Module] = (nn.Conv1d, nn.Conv2d)[spatial_dims - 1]
        self.spatial_dims, self.pool = spatial_dims, pool
        self.features = nn.Linear(features, width) if features else None
        self.maps = convolution(maps, width, 2 * reach + 1, padding=reach) if maps else None
        self.register_buffer("zero", torch.zeros((1, 1) + (1,) * spatial_dims), persistent=False)

    def forward(self, features: Tensor | None, maps: Tensor | None) -> Tensor:
        total = self.get_buffer("zero")
        if self.features is not None:
            total = total + self.features(features)[(..., *[None] * self.spatial_dims)]
        if self.maps is not None and maps is not None:
            total = total + self.maps(F.avg_pool2d(maps, self.pool) if self.pool > 1 else maps)
        return total
