"""Autoregressive networks as Pyro distributions over images or sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_flowguides.nn.precision import at_least_float32
from pyro_flowguides.vae.decoders.autoregressive_network import AutoregressiveNetwork
from pyro_flowguides.vae.decoders.pixel_likelihoods import PixelLikelihood

__all__ = ["AutoregressiveDistribution"]


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
