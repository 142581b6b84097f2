"""Steps of Adam on all parameters at once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_flowguides.inference.record import assert_same

__all__ = ["CompiledStep", "Descent", "flatten", "grouped"]

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


def _pieces(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
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
            pieces = zip(group, _pieces(vector.detach(), group), _pieces(gradient, group), strict=True)
            for parameter, value, slot in pieces:
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
            for parameter, piece in zip(group, _pieces(value, group), strict=True):
                parameter.copy_(piece)

    def release(self) -> None:
        """Give the parameters memory of their own, without gradients."""
        for group in self.groups:
            for parameter in group:
                parameter.data, parameter.grad = parameter.data.clone(), None


class CompiledStep:
    r"""A recorded gradient, its clipping and the step of Adam as one compiled function.

    .. math::
        m \leftarrow m + (1 - \beta_1)(g - m), \quad v \leftarrow v + (1 - \beta_2)(g^2 - v), \quad
        \phi \leftarrow \phi - \frac{\eta}{1 - \beta_1^t} \, \frac{m}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    It works on the vector and on the optimiser's state of a :class:`Descent`, which can take over at any step. Where
    the bound or its gradient is not finite, nothing changes, and the moments are NaN.

    Args:
        recording: from inputs and the parameters to moments, the first of them the bound, and the flat gradient.
        descent: of all parameters, in one group.
        inputs: of the recording.

    Raises:
        ValueError: if there are several groups, or the compiled result differs from that of the recording.
        Exception: whatever else a compiler or its tools may raise.
    """

    def __init__(self, recording: fx.GraphModule, descent: Descent, *inputs: Tensor) -> None:
        self.recording, self.descent = recording, descent
        if len(descent.groups) > 1:
            raise ValueError("the parameters have several dtypes or devices")
        (self.group,) = descent.groups
        rate = inputs[0].new_tensor(1e-3)
        traced, first, second = ([*inputs, rate, *(value.clone() for value in descent.state())] for _ in range(3))
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # compilers warn of themselves
            self.run = _compiled(make_fx(self._whole)(*traced), traced)
            assert_same([self._moments(*first), *first], [self._whole(*second), *second])

    @torch.no_grad()
    def __call__(self, *inputs: Tensor, rate: float) -> Tensor:
        """Take a step; what the recording gives besides the gradient."""
        return self._moments(*inputs, inputs[0].new_tensor(rate), *self.descent.state())

    def _moments(self, *inputs: Tensor) -> Tensor:
        found = self.run(*inputs)
        return found if isinstance(found, Tensor) else found[0]

    def _whole(self, *inputs: Tensor) -> Tensor:
        *given, rate, vector, first, second, count = inputs
        moments, gradient = self.recording(*given, *_pieces(vector, self.group))
        norm = gradient.norm()
        finite = (moments[0] + norm).isfinite()
        gradient = torch.where(finite, gradient * (GRADIENT_NORM / norm).clamp(max=1.0), 0.0)
        count.add_(finite)
        first.lerp_(gradient, (1 - BETAS[0]) * finite.to(first))
        second.lerp_(gradient.square(), (1 - BETAS[1]) * finite.to(first))
        first_share, second_share = (1 - beta ** count.double() for beta in BETAS)
        divisor = (second / second_share).sqrt() + EPSILON
        vector.sub_(torch.where(finite, rate / first_share * first / divisor, 0.0))
        return torch.where(finite, moments, torch.nan)


def _compiled(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """A graph as one function of inductor's, without the guards that are for code which may change."""
    import torch._inductor

    for node in graph.graph.nodes:
        node.meta.clear()  # what tracing noted about values is no use to the C++ wrapper
    on_gpu = any(value.is_cuda for value in inputs)
    options = {"triton.cudagraphs": True} if on_gpu else {"cpp_wrapper": True}
    run: Callable[..., Any] = torch._inductor.compile(graph, list(inputs), options=options)
    return run
