"""Steps of Adam down a recorded gradient, compiled."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_flowguides.inference.flat_adam import BETAS, EPSILON, GRADIENT_NORM, Descent, pieces
from pyro_flowguides.inference.replay import assert_same

__all__ = ["CapturedSteps", "CompiledSteps", "attempts"]

#: Steps of one call, where a step is so short that what a call costs besides counts.
TOGETHER = 50
#: Up to that many parameters.
FEW_PARAMETERS = 2**17
#: Numbers in the draws of all steps of one graph.
CAPTURED_NUMBERS = 2**23
#: The parts of a descent's state.
STATE = 4
#: Inductor's, as far as it knows them. What calls the kernels is compiled apart from them and optimized less, which
#: takes a third of the time. Headers compiled beforehand would repay their own time after some compilations only.
CPU_OPTIONS = {"cpp_wrapper": True, "cpp_wrapper_build_separate": True, "cpp_cache_precompile_headers": False}


def attempts(descent: Descent) -> list[Callable[..., CompiledSteps]]:
    """What to make of a recording, the best first: more is asked of a compiler there, which may fail."""
    one = partial(CompiledSteps, together=1)
    if any(vector.is_cuda for vector in descent.vectors):
        return [CapturedSteps, one]
    few = sum(vector.numel() for vector in descent.vectors) <= FEW_PARAMETERS
    return [partial(CompiledSteps, together=TOGETHER), one] if few else [one]


class CompiledSteps:
    r"""A recorded gradient, its clipping and the step of Adam as one compiled function, which loops over some steps.

    .. math::
        m \leftarrow m + (1 - \beta_1)(g - m), \quad v \leftarrow v + (1 - \beta_2)(g^2 - v), \quad
        \phi \leftarrow \phi - \frac{\eta}{1 - \beta_1^t} \, \frac{m}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    It works on the vector and on the optimizer's state of a :class:`Descent`, which can take over at any step. Steps
    end before the first at which the bound or its gradient is not finite.

    Args:
        recording: from a draw, other inputs and the parameters to moments, the first of them the bound, and the flat
            gradient.
        descent: of all parameters, in one group.
        draw: input that differs from step to step.
        *shared: inputs that do not.
        together: most steps of a call.

    Raises:
        ValueError: if there are several groups, or the compiled result differs from that of the recording.
        Exception: whatever else a compiler or its tools may raise.
    """

    def __init__(
        self, recording: fx.GraphModule, descent: Descent, draw: Tensor, *shared: Tensor, together: int
    ) -> None:
        self.recording, self.descent, self.together = recording, descent, together
        if len(descent.groups) > 1:
            raise ValueError("the parameters have several dtypes or devices")
        (self.group,) = descent.groups
        self.names = [name for name, _ in recording.named_buffers()]
        self.width = len(recording(draw, *shared, *(value.detach() for value in self.group))[0])
        few = min(together, 3)
        given = self._given([draw] * few, shared, [1e-3] * few, 0)
        traced, first, second = ([*(value.clone() for value in descent.state()[0]), *given] for _ in range(3))
        whole = self._loop if together > 1 else self._once
        with torch.no_grad(), _in_silence():
            self.compiled: Callable[..., Sequence[Tensor]] = _compiled(make_fx(whole)(*traced), traced)
            found, expected = self.compiled(*first), whole(*second)
            assert_same([*found, *first[:STATE]], [*expected, *second[:STATE]])

    @torch.no_grad()
    def __call__(self, draws: Sequence[Tensor], *shared: Tensor, rates: Sequence[float]) -> Tensor:
        """Take steps; what the recording gives besides the gradient at each, up to one that was not taken: then NaN.

        Args:
            draws: one for every step, at most ``together``.
            *shared: further inputs of the recording.
            rates: step sizes.
        """
        (state,) = self.descent.state()
        found, *_ = self._run(*state, *self._given(draws, shared, rates, int(state[-1])))
        self.descent.moved()
        return found[: len(draws)]

    def _run(self, *inputs: Tensor) -> Sequence[Tensor]:
        return self.compiled(*inputs)

    def _given(
        self, draws: Sequence[Tensor], shared: Sequence[Tensor], rates: Sequence[float], taken: int
    ) -> list[Tensor]:
        """Draws, what Adam multiplies its averages by, both filled up; the number of steps; units; what is shared.

        The averages start at zero, so that those after t steps are divided by their share of what is not the start.
        """
        missing = self.together - len(draws)
        shares = [[1 - beta ** (taken + step) for beta in BETAS] for step in range(1, len(rates) + 1)]
        factors = [[rate / first, 1 / second] for rate, (first, second) in zip(rates, shares, strict=True)]
        return [
            torch.stack([*draws, *[draws[0]] * missing]),
            draws[0].new_tensor(factors + factors[:1] * missing),
            torch.tensor(len(draws), device=draws[0].device),
            *self.descent.units,
            *shared,
            *self.recording.buffers(),
        ]

    def _once(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """One step, if any are left; what it gives, and how many are left if it was taken."""
        state, (draws, factors, left, *constant) = inputs[:STATE], inputs[STATE:]
        found, *after = self._step(left > 0, *state, draws[0], factors[0], *constant)
        _replace(state, after)
        return found[None], torch.where(found[0].isfinite(), left - 1, 0)

    def _loop(self, *inputs: Tensor) -> tuple[Tensor]:
        from torch._higher_order_ops.while_loop import while_loop_op

        state, (draws, factors, number, *constant) = inputs[:STATE], inputs[STATE:]
        places = torch.arange(self.together, device=draws.device)

        def goes_on(place: Tensor, taken: Tensor, *others: Tensor) -> Tensor:
            return taken & (place < others[-1])

        def body(place: Tensor, taken: Tensor, found: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
            state, (draws, factors, places, *constant, _) = others[:STATE], others[STATE:]
            here, *after = self._step(taken, *state, draws[place[None]][0], factors[place[None]][0], *constant)
            found = torch.where((places == place)[:, None], here, found)
            return place + 1, here[0].isfinite(), found, *after

        nothing = draws.new_full((self.together, self.width), torch.nan)
        carried: Any = (places[0].clone(), number > 0, nothing, *(value.clone() for value in state))
        _, _, found, *after = while_loop_op(goes_on, body, carried, (draws, factors, places, *constant, number))
        _replace(state, after)
        return (found,)

    def _step(
        self,
        wanted: Tensor,
        vector: Tensor,
        first: Tensor,
        second: Tensor,
        count: Tensor,
        draw: Tensor,
        factors: Tensor,
        units: Tensor,
        *rest: Tensor,
    ) -> tuple[Tensor, ...]:
        """What the recording gives and the state after a step, the same as before where none is wanted or possible."""
        shared, buffers = rest[: len(rest) - len(self.names)], rest[len(rest) - len(self.names) :]
        inputs = (draw, *shared, *pieces(vector, self.group))
        found, gradient = functional_call(self.recording, dict(zip(self.names, buffers, strict=True)), inputs)
        gradient = gradient * units
        norm = gradient.norm()
        finite = wanted & (found[0] + norm).isfinite()
        gradient = torch.where(finite, gradient * (GRADIENT_NORM / norm).clamp(max=1.0), 0.0)
        weight = finite.to(first)
        first = first.lerp(gradient, (1 - BETAS[0]) * weight)
        second = second.lerp(gradient.square(), (1 - BETAS[1]) * weight)
        step = factors[0] * first / ((second * factors[1]).sqrt() + EPSILON)
        vector = vector - torch.where(finite, step * units, 0.0)
        return torch.where(finite, found, torch.nan), vector, first, second, count + finite


@contextmanager
def _in_silence() -> Iterator[None]:
    """Without what compilers tell about themselves."""
    log = logging.getLogger("torch._inductor")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _replace(state: Sequence[Tensor], after: Sequence[Tensor]) -> None:
    for value, new in zip(state, after, strict=True):
        value.copy_(new)


class CapturedSteps(CompiledSteps):
    """Some compiled steps as one CUDA graph, which starts all of their kernels at once.

    A graph finds what it works on at fixed places: those of the descent's state and of the first inputs, into which
    later ones are copied.

    Args:
        recording, descent, draw, *shared: as for :class:`CompiledSteps`.

    Raises:
        RuntimeError: if something in a step cannot be captured.
        Exception: as there.
    """

    def __init__(self, recording: fx.GraphModule, descent: Descent, draw: Tensor, *shared: Tensor) -> None:
        super().__init__(recording, descent, draw, *shared, together=1)
        self.together = max(1, min(TOGETHER, CAPTURED_NUMBERS // draw.numel()))
        self.places = [*descent.state()[0], *self._given([draw], shared, [1e-3], 0)]
        self.graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(self.graph):
            self.found = self._one_by_one(*self.places)

    def _one_by_one(self, *inputs: Tensor) -> tuple[Tensor]:
        """As many steps as are left, the first of which that cannot be taken leaves none."""
        state, (draws, factors, left, *constant) = inputs[:STATE], inputs[STATE:]
        found = []
        for draw, factor in zip(draws.split(1), factors.split(1), strict=True):
            one, left = self.compiled(*state, draw, factor, left, *constant)
            found.append(one)
        return (torch.cat(found),)

    def _run(self, *inputs: Tensor) -> Sequence[Tensor]:
        for place, value in zip(self.places, inputs, strict=True):
            if place.data_ptr() != value.data_ptr():
                place.copy_(value)
        self.graph.replay()
        return self.found


def _compiled(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """A graph as one function of inductor's, without the guards that are for code which may change."""
    import torch._inductor
    from torch._guards import TracingContext, tracing
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    for module in graph.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.clear()  # what tracing noted about values is no use to the C++ wrapper
    known = () if any(value.is_cuda for value in inputs) else torch._inductor.list_options()
    options = {name: value for name, value in CPU_OPTIONS.items() if name in known}
    with tracing(TracingContext(FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True))):  # loops ask for it
        return torch._inductor.compile(graph, list(inputs), options=options)
