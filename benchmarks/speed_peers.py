"""Competitors of speed.py that need zuko or normflows: the training step of a flow, and its inverse.

Their masked autoregressive layers have the same sizes and the same direction as ours: one pass from noise to draws.
normflows has no activation between its first two matrices.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from speed_torch import FLOWS, round_trip, stack, train
from speed_workers import WIDE_LIMIT, Job, LeftOut
from torch import Tensor, nn


class Zuko(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        from zuko.flows import MaskedAutoregressiveTransform

        super().__init__()
        orders = [torch.arange(dim) if place % 2 == 0 else torch.arange(dim).flip(0) for place in range(FLOWS)]
        self.layers = nn.ModuleList(
            MaskedAutoregressiveTransform(dim, order=order, hidden_features=(hidden, hidden), activation=nn.SiLU)
            for order in orders
        )

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return stack([layer().call_and_ladj for layer in self.layers], z)

    def inverse(self, y: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            y = layer().inv(y)
        return y


class Normflows(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        from normflows.flows import MaskedAffineAutoregressive

        super().__init__()
        options: dict[str, Any] = {"num_blocks": 1, "use_residual_blocks": False, "activation": nn.functional.silu}
        self.layers = nn.ModuleList(MaskedAffineAutoregressive(dim, hidden, **options) for _ in range(FLOWS))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        first, *others = self.layers
        return stack([first, *(partial(_flipped, layer) for layer in others)], z)

    def inverse(self, y: Tensor) -> Tensor:
        for place, layer in reversed(list(enumerate(self.layers))):
            y = layer.inverse(y)[0]
            y = y.flip(-1) if place else y
        return y


def _flipped(layer: nn.Module, z: Tensor) -> tuple[Tensor, Tensor]:
    image: tuple[Tensor, Tensor] = layer(z.flip(-1))
    return image


def _steps(flow: nn.Module, dim: int, particles: int) -> Job:
    return Job(train(flow.parameters(), flow, dim, particles))


def zuko_steps(dim: int, particles: int, hidden: int) -> Job:
    if dim > WIDE_LIMIT:
        raise LeftOut("its masks come from a D × D matrix, which takes minutes")
    return _steps(Zuko(dim, hidden), dim, particles)


def normflows_steps(dim: int, particles: int, hidden: int) -> Job:
    return _steps(Normflows(dim, hidden), dim, particles)


def _inverse(flow: Any, dim: int, batch: int) -> Job:
    return round_trip(flow, lambda z: flow(z)[0], flow.inverse, dim, batch)


def zuko_inverse(dim: int, batch: int, hidden: int) -> Job:
    return _inverse(Zuko(dim, hidden), dim, batch)


def normflows_inverse(dim: int, batch: int, hidden: int) -> Job:
    return _inverse(Normflows(dim, hidden), dim, batch)
