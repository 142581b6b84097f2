"""Steps of Adam on all parameters at once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.adam import adam

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
    r"""Adam with clipped gradients on parameters that are views of one vector (one for each device and dtype).

    A step is then one kernel, however many parameters there are, and a recorded gradient comes as one tensor. The
    parameters are the same objects as before; :meth:`release` gives them memory of their own again. Steps are those of
    Adam on the parameters in units of their own, which are one unless :meth:`measure` is told better:

    .. math:: \phi = u \odot \phi', \qquad \frac{\partial}{\partial \phi'} = u \odot \frac{\partial}{\partial \phi}

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
        vectors = [vector.detach() for vector in self.vectors]
        self.units = [torch.ones_like(vector) for vector in vectors]
        self._measured: list[tuple[int, slice]] = []
        #: Averages of the gradients and of their squares, and the numbers of steps.
        self.first, self.second = ([torch.zeros_like(vector) for vector in vectors] for _ in range(2))
        self.counts = [vector.new_zeros((), dtype=torch.float32) for vector in vectors]

    def measure(self, parameter: Tensor, units: Tensor) -> None:
        """Measure the numbers of one parameter in these units, positive and in its shape."""
        for group, vector in zip(self.groups, self.units, strict=True):
            for other, piece in zip(group, pieces(vector, group), strict=True):
                if other is parameter:
                    piece.copy_(units)
        self.set_units(self.units)

    def set_units(self, units: Sequence[Tensor]) -> None:
        """Those of all parameters, one vector for each group."""
        self._measured = []
        for place, (vector, given) in enumerate(zip(self.units, units, strict=True)):
            vector.copy_(given)
            ends = itertools.accumulate((parameter.numel() for parameter in self.groups[place]), initial=0)
            parts = (slice(*ends) for ends in itertools.pairwise(ends))
            self._measured += [(place, part) for part in parts if not bool((vector[part] == 1).all())]

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
        for place, part in self._measured:
            gradients[place][part].mul_(self.units[place][part])
        norm = math.hypot(*(float(gradient.norm()) for gradient in gradients))
        if not math.isfinite(norm):
            return False
        if norm > GRADIENT_NORM:
            gradients = [gradient.mul_(GRADIENT_NORM / norm) for gradient in gradients]
        self._step(gradients, rate)
        return True

    @torch.no_grad()
    def _step(self, gradients: Sequence[Tensor], rate: float) -> None:
        """As a function: the class would load a compiler at its first use, which takes a second.

        What has units is moved from zero, so that its step is seen, and then put where it was.
        """
        measured = [(self.vectors[place][part], self.units[place][part]) for place, part in self._measured]
        before = [value.clone() for value, _ in measured]
        for value, _ in measured:
            value.zero_()
        adam(
            self.vectors,
            list(gradients),
            *(self.first, self.second, [], self.counts),
            fused=True,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=rate,
            weight_decay=0.0,
            eps=EPSILON,
            maximize=False,
        )
        for (step, units), old in zip(measured, before, strict=True):
            step.mul_(units).add_(old)
        self.moved()

    def moved(self) -> None:
        """Tell whoever remembers what was computed from a parameter that its vector has changed."""
        for group in self.groups:
            for parameter in group:
                increment_version(parameter)

    def state(self) -> list[list[Tensor]]:
        """All that a step changes, for each group: the vector, its gradient's averages, the count of steps."""
        groups = zip(self.vectors, self.first, self.second, self.counts, strict=True)
        return [[vector.detach(), *moments] for vector, *moments in groups]

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
