"""Autoregressive decoders: the networks' base class, and the distribution that a network and a likelihood define."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import ClassVar, NamedTuple

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn import functional as F

from pyro_flowguides.nn.arguments import check_count, check_widths
from pyro_flowguides.nn.precision import at_least_float32
from pyro_flowguides.vae.decoders.pixel_likelihoods import PixelLikelihood

__all__ = ["AutoregressiveDistribution", "AutoregressiveNetwork", "ContextProjection", "GenerationStep"]


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

    def __init__(self, shape: Sequence[int], outputs: int, features: int = 0, maps: int = 0, groups: int = 1) -> None:
        super().__init__()
        name = type(self).__name__
        shape = check_widths(name, "shape", shape)
        for argument, value in (("outputs", outputs), ("features", features), ("maps", maps)):
            check_count(name, argument, value, 1 if argument == "outputs" else 0)
        if len(shape) - 1 not in self.supported_spatial_dims or min(shape) < 1:
            shapes = {1: "(channels, length)", 2: "(channels, height, width)"}
            expected = " or ".join(shapes[dims] for dims in self.supported_spatial_dims)
            raise ValueError(f"{name}: shape must be {expected}, got {tuple(shape)}")
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


class AutoregressiveDistribution(TorchDistribution):
    r"""The distribution over images or sequences that an autoregressive network and a likelihood define.

    .. math:: \log p(x \mid c) = \sum_i \log p(x_i \mid \theta_i(x_{<i}, c))

    An ensemble (:class:`~pyro_flowguides.vae.AgnosticMADE` in evaluation mode) defines the mixture of its members.

    Cost: ``log_prob`` takes one parallel pass (per member); for ``sample`` see ``generate`` of the network.

    Args:
        network: a network with ``likelihood.outputs`` outputs.
        likelihood: the distribution of the channels of one position.
        features: ``(*batch, network.features)``, if the network reads any.
        maps: ``(*batch, network.maps, *space)``, if the network reads any.
        batch_shape: broadcast with the batch shapes of the context; the event shape is ``network.shape``.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import AutoregressiveDistribution, IndependentChannels, PixelCNN
        >>> pixels = IndependentChannels("bernoulli", channels=1)
        >>> network = PixelCNN((1, 6, 6), pixels.outputs, reach=2, depth=2, maps=4)
        >>> p = AutoregressiveDistribution(network, pixels, maps=torch.randn(5, 4, 6, 6))
        >>> x = p.sample((2,))
        >>> x.shape, p.log_prob(x).shape
        (torch.Size([2, 5, 1, 6, 6]), torch.Size([2, 5]))
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(
        self,
        network: AutoregressiveNetwork,
        likelihood: PixelLikelihood,
        features: Tensor | None = None,
        maps: Tensor | None = None,
        *,
        batch_shape: Sequence[int] = (),
        validate_args: bool | None = None,
    ) -> None:
        if (network.outputs, network.shape[0]) != (likelihood.outputs, likelihood.channels):
            raise ValueError(
                f"AutoregressiveDistribution: the network has {network.outputs} outputs for {network.shape[0]} "
                f"channels, the likelihood needs {likelihood.outputs} for {likelihood.channels}"
            )
        self.network, self.likelihood, self.features, self.maps = network, likelihood, features, maps
        contexts = ("features", features, 1), ("maps", maps, len(network.shape))
        #: The context by name: values, and their number of dimensions for one datum.
        self._contexts = {name: (values, dims) for name, values, dims in contexts if values is not None}
        shapes = [values.shape[:-dims] for values, dims in self._contexts.values()]
        batch = torch.broadcast_shapes(tuple(batch_shape), *shapes)
        super().__init__(batch, torch.Size(network.shape), validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(self.likelihood.values.support, len(self.event_shape))

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> AutoregressiveDistribution:
        return AutoregressiveDistribution(
            self.network,
            self.likelihood,
            self.features,
            self.maps,
            batch_shape=batch_shape,
            validate_args=self._validate_args,
        )

    def _flat_context(self, batch: torch.Size) -> dict[str, Tensor]:
        """Return the context by name, expanded to a batch shape and flattened to one batch dimension."""
        return {
            name: values.expand(*batch, *values.shape[-dims:]).reshape(-1, *values.shape[-dims:])
            for name, (values, dims) in self._contexts.items()
        }

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        batch = torch.broadcast_shapes(self.batch_shape, value.shape[: -len(self.event_shape)])
        x = value.expand(*batch, *self.event_shape).reshape(-1, *self.event_shape)
        context = self._flat_context(batch)
        inputs = self.likelihood.values.standardize(x.to(next(self.network.parameters()).dtype))
        members = self.network.members()
        log_probs = [
            self.likelihood.log_prob(at_least_float32(member(inputs, **context)), x).flatten(1).sum(-1)
            for member in members
        ]
        return (torch.stack(log_probs).logsumexp(0) - math.log(len(members))).reshape(batch)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        batch = torch.Size((*sample_shape, *self.batch_shape))
        context = self._flat_context(batch)
        members, size, standardize = self.network.members(), math.prod(batch), self.likelihood.values.standardize
        member_of_row = torch.randint(len(members), (size,))
        x = next(self.network.parameters()).new_zeros(size, *self.event_shape)
        for number in member_of_row.unique().tolist():
            rows = (member_of_row == number).nonzero()[:, 0].to(x.device)
            here = {name: values[rows] for name, values in context.items()}
            x[rows] = members[number].generate(self.likelihood.draw, len(rows), **here, standardize=standardize)
        return x.reshape(*batch, *self.event_shape)
