"""Competitors of speed.py in plain torch: a loop written by hand, and a floor for every step.

The target is written by hand too: a hierarchical normal model with D latent variables,

    loc ~ N(0, 1),  mean_i ~ N(loc, 1),  y_i ~ N(mean_i, 1/2),  i = 1 ... D - 1
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
from collections.abc import Callable, Iterable
from typing import Any

import torch
from speed_workers import Job
from torch import Tensor, nn
from torch.nn import functional as F

#: Maps points to their images and the log-determinants there.
Map = Callable[[Tensor], tuple[Tensor, Tensor]]
FLOWS = 3
LR = 1e-3
DEVICE = os.environ.get("SPEED_DEVICE", "cpu")
torch.set_num_threads(1)


def observations(dim: int) -> Tensor:
    return torch.linspace(-1.0, 1.0, dim - 1, device=DEVICE)


def log_normal(x: Tensor, loc: Tensor | float, scale: float) -> Tensor:
    return -0.5 * ((x - loc) / scale).square() - math.log(scale) - 0.5 * math.log(2 * math.pi)


def log_joint(z: Tensor, data: Tensor) -> Tensor:
    """``z (S, D) -> (S,)``."""
    loc, mean = z[:, :1], z[:, 1:]
    return log_normal(loc[:, 0], 0.0, 1.0) + (log_normal(mean, loc, 1.0) + log_normal(data, mean, 0.5)).sum(-1)


# -- by hand -----------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """An inverse autoregressive layer: a masked network with two outputs per coordinate."""

    def __init__(self, dim: int, hidden: int, backwards: bool) -> None:
        super().__init__()
        rank = torch.arange(1, dim + 1, device=DEVICE)
        rank = rank.flip(0) if backwards else rank
        inner = 1 + torch.arange(hidden, device=DEVICE) * (dim - 1) // hidden
        masks = [inner[:, None] >= rank, inner[:, None] >= inner, (rank[:, None] > inner).repeat(2, 1)]
        self.weights = nn.ParameterList(torch.randn(mask.shape, device=DEVICE) / mask.shape[1] ** 0.5 for mask in masks)
        self.biases = nn.ParameterList(torch.zeros(len(mask), device=DEVICE) for mask in masks)
        self.weights[-1].data.zero_()
        self.masks = [mask.float() for mask in masks]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = x
        for place, mask in enumerate(self.masks):
            hidden = F.linear(F.silu(hidden) if place else hidden, self.weights[place] * mask, self.biases[place])
        raw, shift = hidden.chunk(2, -1)
        log_scale = 2 * torch.tanh(raw / 2)
        return x * log_scale.exp() + shift, log_scale.sum(-1)


def train(parameters: Any, flow: Map, dim: int, particles: int) -> Callable[[], None]:
    """Return a step of Adam on the ELBO of a flow that maps noise to draws and their log-determinants."""
    optimizer, data = torch.optim.Adam(parameters, lr=LR, fused=True), observations(dim)

    def step() -> None:
        z, ladj = flow(torch.randn(particles, dim, device=DEVICE))
        loss = -(log_joint(z, data) + ladj).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def stack(layers: Iterable[Map], z: Tensor) -> tuple[Tensor, Tensor]:
    """Apply all maps, and return the last image and the log-determinant of the composition."""
    total = z.new_zeros(len(z))
    for layer in layers:
        z, ladj = layer(z)
        total = total + ladj
    return z, total


def by_hand(dim: int, particles: int, hidden: int) -> Job:
    """Train the same flow without guide, traces or recording."""
    layers = nn.ModuleList(Layer(dim, hidden, place % 2 == 1) for place in range(FLOWS))
    return Job(train(layers.parameters(), lambda noise: stack(layers, noise), dim, particles))


# -- the floor ---------------------------------------------------------------------------------------------------------


def floor(dim: int, particles: int, hidden: int, products: bool = True, memory: bool = True) -> Job:
    """Do only what every step of this flow must do.

    That is the matrix products of its layers, one forward and two backward each; and for every parameter, reading it
    with its gradient and Adam's two averages, and writing all but the gradient.
    """
    sizes = list(itertools.pairwise([dim, hidden, hidden, 2 * dim])) * FLOWS
    calls: list[Callable[[], Any]] = []
    if products:
        calls += [product for before, after in sizes for product in _products(particles, before, after)]
    if memory:
        calls += _traffic(sum((before + 1) * after for before, after in sizes))

    def step() -> None:
        for call in calls:
            call()

    return Job(step)


def _products(particles: int, before: int, after: int) -> list[Callable[[], Any]]:
    x, y, w = (
        torch.randn(shape, device=DEVICE) for shape in ((particles, before), (particles, after), (after, before))
    )
    by_x, by_y, by_w = x.clone(), y.clone(), w.clone()
    return [
        lambda: torch.mm(x, w.mT, out=y),
        lambda: torch.mm(by_y, w, out=by_x),
        lambda: torch.mm(by_y.mT, x, out=by_w),
    ]


def _traffic(parameters: int) -> list[Callable[[], Any]]:
    target, source, gradient = (torch.randn(3, parameters, device=DEVICE) for _ in range(3))
    return [lambda: target.copy_(source), gradient[0].sum]


# -- inverses ----------------------------------------------------------------------------------------------------------

#: Standard deviation of the products of a matrix with independent standard normal inputs.
GAIN = 1.5
#: Number of draws of the weights.
NUM_WEIGHT_DRAWS = 5


@torch.no_grad()
def draw_weights(flow: nn.Module, seed: int) -> None:
    """Draw the weights: matrices N(0, GAIN² / inputs), vectors N(0, 0.1²)."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in flow.parameters():
        scale = GAIN / parameter.shape[1] ** 0.5 if parameter.ndim == 2 else 0.1
        parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def round_trip(
    flow: nn.Module, forward: Callable[[Tensor], Tensor], inverse: Callable[[Tensor], Tensor], dim: int, batch: int
) -> Job:
    """Return a job that inverts images of normal draws in float32, and the errors in float32 and float64.

    They are the root mean square error and the largest error, each the median over several draws of the weights.
    """
    x = torch.randn(batch, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    flow.to(DEVICE)

    @torch.no_grad()
    def errors(dtype: torch.dtype, bits: int) -> dict[str, float]:
        flow.to(dtype)
        error = inverse(forward(x.to(dtype))) - x.to(dtype)
        return {f"error{bits}": float(error.square().mean().sqrt()), f"largest{bits}": float(error.abs().max())}

    by_draw = []
    for seed in range(NUM_WEIGHT_DRAWS):
        draw_weights(flow, seed)
        by_draw.append(errors(torch.float64, 64) | errors(torch.float32, 32))
    medians = {name: statistics.median(each[name] for each in by_draw) for name in by_draw[0]}
    with torch.no_grad():
        y = forward(x.float())

    @torch.no_grad()
    def call() -> None:
        inverse(y)

    return Job(call, warm_up=1, facts=lambda: medians)
