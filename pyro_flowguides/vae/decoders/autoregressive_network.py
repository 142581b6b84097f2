"""The base class of autoregressive decoders: context, parallel evaluation, and ancestral generation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from pyro_flowguides.vae.decoders.context_projection import ContextProjection
from pyro_flowguides.vae.decoders.generation import DrawChannels, GeneratedBatch, GenerationStep

__all__ = ["AutoregressiveNetwork"]


class AutoregressiveNetwork(nn.Module):
    r"""A network that computes the parameters of :math:`p(x_i \mid x_{<i}, c)` for all positions i in one pass.

    .. math:: p(x \mid c) = \prod_i p(x_i \mid \theta_i(x_{<i}, c))

    Positions are in raster order unless a network documents another order. With ``groups=1`` all channels of a position
    are drawn from the same parameters (whole-pixel conditioning). With ``groups=channels`` they are drawn one after the
    other: the parameters of a channel also depend on the earlier channels, and output k belongs to channel
    ``k % channels``.

    The network is independent of the likelihood: it maps standardized data to ``outputs`` parameters per position.
    :class:`~pyro_flowguides.vae.AutoregressiveDistribution` turns it into a distribution.

    Args:
        shape: ``(channels, height, width)`` or ``(channels, length)``.
        outputs: number of parameters per position.
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

    def fill(self, batch: GeneratedBatch, draw: DrawChannels, contexts: dict[nn.Module, Tensor]) -> None:
        """Generate all values of a batch, with caches."""
        raise NotImplementedError

    def forward(self, x: Tensor, features: Tensor | None = None, maps: Tensor | None = None) -> Tensor:
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"{type(self).__name__}: x must have shape (B, {self.shape}), got {tuple(x.shape)}")
        return self.evaluate(x, self.contexts(len(x), features, maps))

    def generate(
        self,
        draw: DrawChannels,
        size: int,
        features: Tensor | None = None,
        maps: Tensor | None = None,
        standardize: Callable[[Tensor], Tensor] = torch.clone,
    ) -> Tensor:
        """Draw ``size`` data, one position after the other, in evaluation mode and with caches.

        Args:
            draw: from the parameters at one position ``(B, outputs)`` to a draw of its channels ``(B, channels)``.
            size: B.
            features: ``(B, features)``.
            maps: ``(B, maps, *space)``.
            standardize: from drawn values to network inputs.

        Returns:
            ``(B, *shape)``.
        """
        with self._generating(size, features, maps, standardize) as (batch, contexts):
            self.fill(batch, draw, contexts)
        return batch.values

    def generate_by_full_passes(
        self,
        draw: DrawChannels,
        size: int,
        features: Tensor | None = None,
        maps: Tensor | None = None,
        standardize: Callable[[Tensor], Tensor] = torch.clone,
    ) -> Tensor:
        """Draw the same data as :meth:`generate` by one full pass per step: a slow reference implementation."""
        with self._generating(size, features, maps, standardize) as (batch, contexts):
            for step in self.steps():
                here: tuple[slice | int, ...] = (slice(None), slice(None), *step.position)
                batch.write(step, draw(self.evaluate(batch.inputs, contexts)[here]))
        return batch.values

    def members(self) -> Sequence[AutoregressiveNetwork]:
        """Return the members of the ensemble whose densities are averaged: by default only this network."""
        return [self]

    def steps(self) -> Iterator[GenerationStep]:
        """Iterate over the steps of generation, in order."""
        for position in itertools.product(*map(range, self.shape[1:])):
            yield from self.steps_at(position)

    def steps_at(self, position: tuple[int, ...]) -> list[GenerationStep]:
        """Return the steps of one position: one for each group of channels."""
        return [GenerationStep(slice(group, None, self.groups), position) for group in range(self.groups)]

    def contexts(self, size: int, features: Tensor | None, maps: Tensor | None) -> dict[nn.Module, Tensor]:
        """Project the context for every layer."""
        self._check_context("features", features, (size, self.features) if self.features else None)
        self._check_context("maps", maps, (size, self.maps, *self.shape[1:]) if self.maps else None)
        return {part: part(features, maps) for part in self.modules() if isinstance(part, ContextProjection)}

    def _check_context(self, name: str, context: Tensor | None, expected: tuple[int, ...] | None) -> None:
        shape = None if context is None else tuple(context.shape)
        if shape != expected:
            raise ValueError(f"{type(self).__name__}: {name} must have shape {expected}, got {shape}")

    @contextmanager
    def _generating(
        self,
        size: int,
        features: Tensor | None,
        maps: Tensor | None,
        standardize: Callable[[Tensor], Tensor],
    ) -> Iterator[tuple[GeneratedBatch, dict[nn.Module, Tensor]]]:
        """Provide an empty batch and the contexts, in evaluation mode and without gradients."""
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                blank = next(self.parameters()).new_zeros(size, *self.shape)
                yield GeneratedBatch(blank, standardize), self.contexts(size, features, maps)
        finally:
            self.train(training)

    def extra_repr(self) -> str:
        return f"{self.shape} -> {self.outputs}, features={self.features}, maps={self.maps}, groups={self.groups}"
