"""Steps of Adam on all parameters at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["BETAS", "EPSILON", "GRADIENT_NORM", "Descent", "flatten", "grouped", "pieces"]

#: Largest norm of a gradient that is followed as it is.
GRADIENT_NORM = 10.0
#: Adam's rates of forgetting, and what keeps its divisor from zero.
BETAS, EPSILON = (0.9, 0.99), 1e-8


def grouped(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """The parameters that can share a vector: those of one device and dtype."""
    groups: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        groups.setdefault((parameter.device, parameter.dtype), []).append(parameter)
    return list(groups.values())


def flatten(values: Sequence[Tensor]) -> Tensor:
    """All numbers of some tensors, one after the other."""
    return torch.cat([value.reshape(-1) for value in values])


def pieces(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The parts of a vector in the shapes of some tensors: the inverse of :func:`flatten`."""
    parts = vector.split([value.numel() for value in like])
    return [part.view(value.shape) for part, value in zip(parts, like, strict=True)]


class Descent:
    """Adam with clipped gradients on parameters that are views of one vector (one for each device and dtype).

    A step is then one kernel, however many parameters there are, and a recorded gradient comes as one tensor. The
    parameters are the same objects as before; :meth:`release` gives them memory of their own again.

    Args:
        parameters: leaves that require gradients.

    References:
        D. Kingma, J. Ba (2015). Adam: a method for stochastic optimization. arXiv:1412.6980.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.groups = grouped(parameters)
        self.vectors = [flatten([value.detach() for value in group]).requires_grad_() for group in self.groups]
        self._gradients = [torch.zeros_like(vector) for vector in self.vectors]
        for group, vector, gradient in zip(self.groups, self.vectors, self._gradients, strict=True):
            parts = zip(group, pieces(vector.detach(), group), pieces(gradient, group), strict=True)
            for parameter, value, slot in parts:
                parameter.data, parameter.grad = value, slot
        self.optimiser = torch.optim.Adam(self.vectors, betas=BETAS, eps=EPSILON, fused=True)
        for vector in self.vectors:
            zeros = {name: torch.zeros_like(vector) for name in ("exp_avg", "exp_avg_sq")}
            self.optimiser.state[vector] = {"step": vector.new_zeros((), dtype=torch.float32), **zeros}

    def follow(self, gradients: Tensor | Sequence[Tensor], rate: float) -> bool:
        """Step down; stay, and say so, where the gradient is not finite.

        Args:
            gradients: a loss to be differentiated, or its gradients, one vector for each group of parameters.
            rate: step size.
        """
        if isinstance(gradients, Tensor):
            for slots in self._gradients:
                slots.zero_()
            gradients.backward()
            gradients = self._gradients
        norm = math.hypot(*(float(gradient.norm()) for gradient in gradients))
        if not math.isfinite(norm):
            return False
        for vector, gradient in zip(self.vectors, gradients, strict=True):
            vector.grad = gradient.mul_(GRADIENT_NORM / norm) if norm > GRADIENT_NORM else gradient
        for settings in self.optimiser.param_groups:
            settings["lr"] = rate
        self.optimiser.step()
        return True

    def state(self) -> list[Tensor]:
        """All that a step changes: the vector, its gradient's moments, the count of steps; for a single group."""
        (vector,) = self.vectors
        state = self.optimiser.state[vector]
        return [vector.detach(), state["exp_avg"], state["exp_avg_sq"], state["step"]]

    @torch.no_grad()
    def values(self) -> list[Tensor]:
        """A copy of all parameters."""
        return [vector.detach().clone() for vector in self.vectors]

    @torch.no_grad()
    def assign(self, values: Sequence[Tensor]) -> None:
        """Set all parameters, through each of them, so that what was computed from it is known to be out of date."""
        for group, value in zip(self.groups, values, strict=True):
            for parameter, piece in zip(group, pieces(value, group), strict=True):
                parameter.copy_(piece)

    def release(self) -> None:
        """Give the parameters memory of their own, without gradients."""
        for group in self.groups:
            for parameter in group:
                parameter.data, parameter.grad = parameter.data.clone(), None
