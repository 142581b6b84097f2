"""The joint distribution of the latents of all layers of the hierarchical VAE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_flowguides.vae.models.ladder import DownLayer, DownState, Evidence, TopDown
from pyro_flowguides.vae.models.priors import PosteriorAt, Prior

__all__ = ["LadderDistribution", "LadderPosterior", "LadderPrior"]


class LayerPriors:
    """The prior of the latents of each layer, given those above it."""

    def expand_flat(self, batch_shape: torch.Size) -> LayerPriors:
        """Expand the batch dimensions, and flatten them into one."""
        return self

    def draw(self, index: int, layer: DownLayer, state: DownState) -> tuple[Tensor, Tensor]:
        """Draw the latents of a layer; return them and their elementwise log density."""
        z = state.prior.draw(torch.randn_like(state.prior.loc))
        return z, state.prior.log_prob(z)

    def log_prob(self, index: int, layer: DownLayer, state: DownState, z: Tensor) -> Tensor:
        """Return the elementwise log density of the latents of a layer."""
        return state.prior.log_prob(z)


class LayerPosteriors(LayerPriors):
    """The posterior of the latents of each layer, given those above it and the evidence, the topmost layer first."""

    def __init__(self, evidence: Sequence[Evidence]) -> None:
        self.evidence = evidence

    def expand_flat(self, batch_shape: torch.Size) -> LayerPosteriors:
        return LayerPosteriors([part.expand_flat(batch_shape) for part in self.evidence])

    def draw(self, index: int, layer: DownLayer, state: DownState) -> tuple[Tensor, Tensor]:
        return layer.draw(state, self.evidence[index])

    def log_prob(self, index: int, layer: DownLayer, state: DownState, z: Tensor) -> Tensor:
        return layer.log_prob(state, self.evidence[index], z)


class LadderDistribution(TorchDistribution):
    """The joint distribution of the latents of all layers, flattened and concatenated, the topmost layer first.

    Args:
        ladder: the pass downwards.
        layers: the distribution of each layer.
        batch_shape: batch shape of the distribution; that of ``layers`` broadcasts to it.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, ladder: TopDown, layers: LayerPriors, batch_shape: Sequence[int] = ()) -> None:
        self.ladder, self.layers = ladder, layers
        self._last_draw: tuple[Tensor, Tensor] | None = None
        super().__init__(torch.Size(batch_shape), torch.Size((sum(ladder.latent_dims),)), validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> LadderDistribution:
        return LadderDistribution(self.ladder, self.layers, batch_shape)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape
        layers = self.layers.expand_flat(shape)
        draws: list[Tensor] = []
        log_probs: list[Tensor] = []

        def choose(index: int, layer: DownLayer, state: DownState) -> Tensor:
            z, log_prob = layers.draw(index, layer, state)
            draws.append(z.flatten(1))
            log_probs.append(log_prob.flatten(1).sum(-1))
            return z

        self.ladder.descend(shape.numel(), choose)
        z = torch.cat(draws, -1).reshape(shape + self.event_shape)
        self._last_draw = z, torch.stack(log_probs).sum(0).reshape(shape)
        return z

    def log_prob(self, value: Tensor) -> Tensor:
        if self._last_draw is not None and self._last_draw[0] is value:
            return self._last_draw[1]
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        maps = self.ladder.split(value.expand(*shape, value.shape[-1]).reshape(-1, value.shape[-1]))
        layers = self.layers.expand_flat(shape)
        log_probs: list[Tensor] = []

        def choose(index: int, layer: DownLayer, state: DownState) -> Tensor:
            log_probs.append(layers.log_prob(index, layer, state, maps[index]).flatten(1).sum(-1))
            return maps[index]

        self.ladder.descend(shape.numel(), choose)
        return torch.stack(log_probs).sum(0).reshape(shape)


class LadderPrior(Prior):
    """The prior of a ladder, whose parameters are those of the ladder."""

    def __init__(self, ladder: TopDown) -> None:
        super().__init__(sum(ladder.latent_dims))
        self._ladder = (ladder,)  # hidden from torch: the ladder is registered as the decoder

    def forward(self, posterior_at: PosteriorAt) -> LadderDistribution:
        return LadderDistribution(self._ladder[0], LayerPriors())


class LadderPosterior(nn.Module):
    """The posterior of a ladder, whose parameters are those of the ladder."""

    def __init__(self, ladder: TopDown) -> None:
        super().__init__()
        self._ladder = (ladder,)  # hidden from torch, as in the prior

    def forward(self, evidence: Sequence[Evidence]) -> LadderDistribution:
        """Return the posterior given the evidence of a batch of data, the topmost layer first."""
        return LadderDistribution(self._ladder[0], LayerPosteriors(evidence), evidence[0].statistics.shape[:-3])
