"""Adam on all parameters at once."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.adam import adam

__all__ = ["BETAS", "EPSILON", "MAX_GRADIENT_NORM", "FlatAdam", "flatten", "group_parameters", "unflatten"]

#: Gradients with a larger norm are scaled down to this one.
MAX_GRADIENT_NORM = 10.0
#: Adam's decay rates, and the constant that keeps its divisor away from zero.
BETAS, EPSILON = (0.9, 0.99), 1e-8


def group_parameters(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """Group parameters by device and dtype: those of one group can share a vector."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in parameters:
        groups.setdefault((parameter.device, parameter.dtype), []).append(parameter)
    return list(groups.values())


def flatten(values: Sequence[Tensor]) -> Tensor:
    """Concatenate the entries of several tensors into one vector."""
    return torch.cat([value.reshape(-1) for value in values])


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Split a vector into views with the shapes of the given tensors: the inverse of :func:`flatten`."""
    parts = vector.split([value.numel() for value in like])
    return [part.view(value.shape) for part, value in zip(parts, like, strict=True)]


class FlatAdam:
    r"""Adam with clipped gradients on parameters that are views of one vector per device and dtype.

    A step is one kernel, however many parameters there are, and a recorded gradient arrives as one tensor. The
    parameters remain the same objects; :meth:`release` gives them their own memory again.

    Every entry of a parameter has a scale u, 1 unless :meth:`set_scale` changes it. Steps are those of Adam on the
    scaled parameters :math:`\phi'`:

    .. math:: \phi = u \odot \phi', \qquad \frac{\partial}{\partial \phi'} = u \odot \frac{\partial}{\partial \phi}

    Args:
        parameters: leaf tensors that require gradients.

    Attributes:
        groups: the parameters, grouped by device and dtype.
        vectors: the vector of each group.
        scales: u, one vector for each group.
        first_moments, second_moments: running averages of the gradient and of its square, for each group.
        step_counts: number of steps taken, for each group.

    References:
        D. Kingma, J. Ba (2015). Adam: a method for stochastic optimization. arXiv:1412.6980.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.groups = group_parameters(parameters)
        self.vectors = [flatten([value.detach() for value in group]).requires_grad_() for group in self.groups]
        self._gradients = [torch.zeros_like(vector) for vector in self.vectors]
        vectors = [vector.detach() for vector in self.vectors]
        for (parameter, value), (_, slot) in zip(self._parts(vectors), self._parts(self._gradients), strict=True):
            parameter.data, parameter.grad = value, slot
        self.scales = [torch.ones_like(vector) for vector in vectors]
        self._scaled: list[tuple[int, slice]] = []
        #: The scaled parts and their old values during an update.
        self._interrupted: list[tuple[Tensor, Tensor]] = []
        self.first_moments, self.second_moments = ([torch.zeros_like(vector) for vector in vectors] for _ in range(2))
        self.step_counts = [vector.new_zeros((), dtype=torch.float32) for vector in vectors]

    def _parts(self, vectors: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each parameter with its part, a view, of the vectors of all groups."""
        for group, vector in zip(self.groups, vectors, strict=True):
            yield from zip(group, unflatten(vector, group), strict=True)

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return self.vectors[0].device

    def set_scale(self, parameter: Tensor, scale: Tensor) -> None:
        """Set the scale of one parameter: positive numbers in the shape of the parameter."""
        for other, part in self._parts(self.scales):
            if other is parameter:
                part.copy_(scale)
        self.set_scales(self.scales)

    def set_scales(self, scales: Sequence[Tensor]) -> None:
        """Set the scales of all parameters, one vector for each group."""
        self._scaled = []
        for index, (vector, scale) in enumerate(zip(self.scales, scales, strict=True)):
            vector.copy_(scale)
            bounds = itertools.accumulate((parameter.numel() for parameter in self.groups[index]), initial=0)
            parts = (slice(*pair) for pair in itertools.pairwise(bounds))
            self._scaled += [(index, part) for part in parts if not bool((vector[part] == 1).all())]

    def step(self, loss_or_gradient: Tensor | Sequence[Tensor], lr: float) -> bool:
        """Take a step, unless the gradient is not finite.

        Args:
            loss_or_gradient: a loss to differentiate, or its gradient as one vector for each group of parameters.
            lr: step size.

        Returns:
            whether the step was taken.
        """
        gradients = self._backward(loss_or_gradient) if isinstance(loss_or_gradient, Tensor) else loss_or_gradient
        for index, part in self._scaled:
            gradients[index][part].mul_(self.scales[index][part])
        norm = math.hypot(*(float(gradient.norm()) for gradient in gradients))
        if not math.isfinite(norm):
            return False
        if norm > MAX_GRADIENT_NORM:
            gradients = [gradient.mul_(MAX_GRADIENT_NORM / norm) for gradient in gradients]
        self._update(gradients, lr)
        return True

    def _backward(self, loss: Tensor) -> list[Tensor]:
        for gradient in self._gradients:
            gradient.zero_()
        loss.backward()
        return self._gradients

    @torch.no_grad()
    def _update(self, gradients: Sequence[Tensor], lr: float) -> None:
        """Apply Adam's update.

        A scaled part is set to zero first, so that Adam's update leaves just the step there; the step is then scaled
        and added to the old value.
        """
        scaled = [(self.vectors[index][part], self.scales[index][part]) for index, part in self._scaled]
        self._interrupted = [(value, value.clone()) for value, _ in scaled]
        for value, _ in scaled:
            value.zero_()
        adam(  # the function, because the class imports torch's compiler at its first use, which takes a second
            self.vectors,
            list(gradients),
            *(self.first_moments, self.second_moments, [], self.step_counts),
            fused=True,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=lr,
            weight_decay=0.0,
            eps=EPSILON,
            maximize=False,
        )
        for (step, scale), (_, old) in zip(scaled, self._interrupted, strict=True):
            step.mul_(scale).add_(old)
        self._interrupted = []
        self.mark_modified()

    def mark_modified(self) -> None:
        """Mark every parameter as modified, so that caches of what was computed from it are dropped."""
        for parameter in itertools.chain(*self.groups):
            increment_version(parameter)

    def state(self) -> list[list[Tensor]]:
        """Return everything that a step changes, for each group: vector, first and second moments, step count."""
        groups = zip(self.vectors, self.first_moments, self.second_moments, self.step_counts, strict=True)
        return [[vector.detach(), *moments] for vector, *moments in groups]

    @torch.no_grad()
    def snapshot(self) -> list[Tensor]:
        """Copy the vectors of all parameters."""
        return [vector.detach().clone() for vector in self.vectors]

    @torch.no_grad()
    def restore(self, vectors: Sequence[Tensor]) -> None:
        """Set all parameters to the values of a :meth:`snapshot`."""
        for parameter, value in self._parts(vectors):
            parameter.copy_(value)

    @torch.no_grad()
    def release(self) -> None:
        """Give every parameter its own memory, without a gradient. The optimizer cannot be used afterwards.

        Scaled parts of an update that was interrupted (Ctrl-C) get their old values back.
        """
        for value, old in self._interrupted:
            value.copy_(old)
        for parameter in itertools.chain(*self.groups):
            parameter.data, parameter.grad = parameter.data.clone(), None
