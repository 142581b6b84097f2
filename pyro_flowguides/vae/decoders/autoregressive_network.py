"""What autoregressive decoders share: context, causal evaluation everywhere or at one place, ancestral generation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["AutoregressiveNetwork", "Canvas", "ContextProjection"]

#: From the numbers at one position, ``(B, outputs)``, to a draw of its channels, ``(B, channels)``.
Draw: TypeAlias = Callable[[Tensor], Tensor]
#: The channels drawn in one step, and the position.
Step: TypeAlias = tuple[slice, tuple[int, ...]]


class ContextProjection(nn.Module):
    """What a layer adds to its pre-activation: a linear function of global features and a convolution of maps.

    Args:
        features: number of global features, 0 for none.
        maps: number of maps as large as the data, 0 for none.
        width: channels of the result.
        space: 2 for images, 1 for sequences.
        reach: how far the convolution of the maps sees in every direction; 0 for a 1×1 convolution.
        pool: factor by which maps are averaged before, for layers at a lower resolution.

    Shapes:
        features ``(B, features)``, maps ``(B, maps, *space)``; result ``(B, width, *space)`` or, without maps, a tensor
        that broadcasts to it.
    """

    def __init__(self, features: int, maps: int, width: int, space: int = 2, *, reach: int = 0, pool: int = 1) -> None:
        super().__init__()
        convolution: Callable[..., nn.Module] = (nn.Conv1d, nn.Conv2d)[space - 1]
        self.space, self.pool = space, pool
        self.features = nn.Linear(features, width) if features else None
        self.maps = convolution(maps, width, 2 * reach + 1, padding=reach) if maps else None
        self.register_buffer("nothing", torch.zeros((1, 1) + (1,) * space), persistent=False)

    def forward(self, features: Tensor | None, maps: Tensor | None) -> Tensor:
        total = self.get_buffer("nothing")
        if self.features is not None:
            projected = self.features(features)
            total = total + projected.reshape(*projected.shape, *(1,) * self.space)
        if self.maps is not None:
            assert maps is not None
            total = total + self.maps(F.avg_pool2d(maps, self.pool) if self.pool > 1 else maps)
        return total


class Canvas:
    """A batch being generated: the values drawn so far, and the same as the network wants to see them.

    Args:
        values: zeros, ``(B, channels, *space)``.
        standardize: from values to network inputs, elementwise.
    """

    def __init__(self, values: Tensor, standardize: Callable[[Tensor], Tensor]) -> None:
        self.values, self.standardize = values, standardize
        self.inputs = standardize(values).clone()

    def put(self, step: Step, drawn: Tensor) -> None:
        """Keep the channels of this step from a draw of all channels ``(B, channels)``."""
        channels, position = step
        at: Any = (slice(None), channels, *position)
        self.values[at] = drawn[:, channels]
        self.inputs[at] = self.standardize(self.values[at])


class AutoregressiveNetwork(nn.Module):
    r"""The numbers that parametrize :math:`p(x_i \mid x_{<i}, c)`, for all positions i in one pass.

    .. math:: p(x \mid c) = \prod_i p(x_i \mid \theta_i(x_{<i}, c))

    Positions come in raster order unless a network says otherwise. The channels of one position are drawn together
    from the numbers there (``groups=1``, whole-pixel conditioning), or one after the other (``groups=channels``): then
    the numbers of a channel depend on the earlier channels too, and output k belongs to channel ``k % channels``.

    The network knows nothing of likelihoods: it takes standardized data and returns ``outputs`` numbers per position;
    :class:`~pyro_flowguides.vae.Autoregressive` makes a distribution of it.

    Args:
        shape: ``(channels, height, width)`` or ``(channels, length)``.
        outputs: numbers per position.
        features: number of global features it is conditioned on.
        maps: number of maps, as large as the data, it is conditioned on.
        groups: 1 or the number of channels.

    Shapes:
        x ``(B, *shape)``, features ``(B, features)``, maps ``(B, maps, *space)``; result ``(B, outputs, *space)``.

    Raises:
        ValueError: for other shapes, with what was expected.
    """

    #: The numbers of dimensions that space may have.
    spaces: ClassVar[Collection[int]] = (2,)

    def __init__(self, shape: Sequence[int], outputs: int, features: int, maps: int, groups: int) -> None:
        super().__init__()
        name = type(self).__name__
        if len(shape) - 1 not in self.spaces or min(shape) < 1:
            wanted = " or ".join(
                ("(channels, length)", "(channels, height, width)")[space - 1] for space in self.spaces
            )
            raise ValueError(f"{name}: shape must be {wanted}, got {tuple(shape)}")
        if outputs < 1 or features < 0 or maps < 0:
            raise ValueError(f"{name}: need outputs >= 1 and features, maps >= 0, got {outputs}, {features}, {maps}")
        if groups not in (1, shape[0]) or outputs % groups:
            raise ValueError(
                f"{name}: groups must be 1 or the number of channels {shape[0]}, and outputs a multiple of it, "
                f"got groups {groups}, outputs {outputs}"
            )
        self.shape, self.outputs, self.groups = tuple(shape), outputs, groups
        self.features, self.maps = features, maps

    def _check_width(self, name: str, width: int) -> None:
        """Gated layers pair channels of one group."""
        if width < 1 or width % self.groups:
            raise ValueError(
                f"{type(self).__name__}: {name} must be a positive multiple of groups {self.groups}, got {width}"
            )

    def evaluate(self, x: Tensor, contexts: dict[nn.Module, Tensor]) -> Tensor:
        """All outputs for one batch of data and prepared contexts."""
        raise NotImplementedError

    def _fill(self, canvas: Canvas, draw: Draw, contexts: dict[nn.Module, Tensor]) -> None:
        """Generate with caches."""
        raise NotImplementedError

    def forward(self, x: Tensor, features: Tensor | None = None, maps: Tensor | None = None) -> Tensor:
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"{type(self).__name__}: x must have shape (B, {self.shape}), got {tuple(x.shape)}")
        return self.evaluate(x, self.contexts(len(x), features, maps))

    def generate(
        self,
        draw: Draw,
        size: int,
        features: Tensor | None = None,
        maps: Tensor | None = None,
        standardize: Callable[[Tensor], Tensor] = torch.clone,
    ) -> Tensor:
        """Draw ``size`` data, one position after the other, in evaluation mode and with caches.

        Args:
            draw: from the numbers at one position ``(B, outputs)`` to a draw of its channels ``(B, channels)``.
            size: B.
            features: ``(B, features)``.
            maps: ``(B, maps, *space)``.
            standardize: from drawn values to network inputs.
        """
        with self._generating(size, features, maps, standardize) as (canvas, contexts):
            self._fill(canvas, draw, contexts)
        return canvas.values

    def generate_by_full_passes(
        self,
        draw: Draw,
        size: int,
        features: Tensor | None = None,
        maps: Tensor | None = None,
        standardize: Callable[[Tensor], Tensor] = torch.clone,
    ) -> Tensor:
        """The same draws as :meth:`generate` by one pass of the whole network per step: the definition, and slow."""
        with self._generating(size, features, maps, standardize) as (canvas, contexts):
            for step in self.steps():
                at: Any = (..., *step[1])
                canvas.put(step, draw(self.evaluate(canvas.inputs, contexts)[at]))
        return canvas.values

    def members(self) -> Sequence[AutoregressiveNetwork]:
        """The networks whose densities are averaged: only this one, unless a network is an ensemble."""
        return [self]

    def steps(self) -> Iterator[Step]:
        """What is drawn, in order."""
        for position in itertools.product(*map(range, self.shape[1:])):
            yield from self.steps_at(position)

    def steps_at(self, position: tuple[int, ...]) -> list[Step]:
        """The steps of one position: one for each group of channels."""
        return [(slice(group, None, self.groups), position) for group in range(self.groups)]

    def contexts(self, size: int, features: Tensor | None, maps: Tensor | None) -> dict[nn.Module, Tensor]:
        """The projection of the context in every layer, computed once."""
        self._check_context("features", features, (size, self.features), self.features)
        self._check_context("maps", maps, (size, self.maps, *self.shape[1:]), self.maps)
        return {part: part(features, maps) for part in self.modules() if isinstance(part, ContextProjection)}

    def _check_context(self, name: str, given: Tensor | None, shape: tuple[int, ...], wanted: int) -> None:
        found = None if given is None else tuple(given.shape)
        expected = shape if wanted else None
        if found != expected:
            raise ValueError(f"{type(self).__name__}: {name} must have shape {expected}, got {found}")

    @contextmanager
    def _generating(
        self,
        size: int,
        features: Tensor | None,
        maps: Tensor | None,
        standardize: Callable[[Tensor], Tensor],
    ) -> Iterator[tuple[Canvas, dict[nn.Module, Tensor]]]:
        """An empty canvas and the contexts, without gradient and with dropout off."""
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                blank = next(self.parameters()).new_zeros(size, *self.shape)
                yield Canvas(blank, standardize), self.contexts(size, features, maps)
        finally:
            self.train(training)

    def extra_repr(self) -> str:
        return f"{self.shape} -> {self.outputs}, features={self.features}, maps={self.maps}, groups={self.groups}"
