"""Steps of Adam along a recorded gradient, compiled into one function."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, fx
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_flowguides.inference.flat_adam import BETAS, EPSILON, MAX_GRADIENT_NORM, FlatAdam, unflatten
from pyro_flowguides.inference.replay import Operations, assert_same

__all__ = ["MAX_STEPS_PER_CALL", "CapturedSteps", "CompiledSteps", "LoopedSteps", "compile_steps"]

#: Most steps of one call.
MAX_STEPS_PER_CALL = 50
#: Most parameters for which the compiled function itself loops over steps: with more, a call's overhead is negligible.
MAX_LOOPED_PARAMETERS = 2**17
#: Most random numbers in the noise of all steps of one CUDA graph.
MAX_CAPTURED_NOISE = 2**23
#: Number of tensors in the state of one group of :class:`~pyro_flowguides.inference.flat_adam.FlatAdam`.
STATE_SIZE = 4
#: Options of inductor, where it has them. Code that calls the kernels is compiled apart from them and optimized less,
#: which takes a third of the time. Precompiled headers would repay their own time only after several compilations.
CPU_OPTIONS = {"cpp_wrapper": True, "cpp_wrapper_build_separate": True, "cpp_cache_precompile_headers": False}


def compile_steps(recording: fx.GraphModule, adam: FlatAdam, noise: Tensor, *shared: Tensor) -> CompiledSteps:
    """Compile a recorded step into the fastest form that the compiler can make.

    On a GPU this is a CUDA graph of several steps; on a CPU, with few parameters, a compiled loop over steps;
    otherwise, and where those fail, one step.

    Arguments and errors are those of :class:`CompiledSteps`.
    """
    num_parameters = sum(vector.numel() for vector in adam.vectors)
    form = CapturedSteps if adam.device.type == "cuda" else LoopedSteps
    if form is CapturedSteps or num_parameters <= MAX_LOOPED_PARAMETERS:
        try:
            return form(recording, adam, noise, *shared)
        except Exception:  # these forms demand more of a compiler, which may fail in any way; the next one may not
            pass
    return CompiledSteps(recording, adam, noise, *shared)


class CompiledSteps:
    r"""A recorded gradient, its clipping and the update of Adam as one compiled function.

    .. math::
        m \leftarrow m + (1 - \beta_1)(g - m), \quad v \leftarrow v + (1 - \beta_2)(g^2 - v), \quad
        \phi \leftarrow \phi - \frac{\eta}{1 - \beta_1^t} \, \frac{m}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    It works on the vector and the moments of a :class:`~pyro_flowguides.inference.flat_adam.FlatAdam`, which can take
    over at any step. A call ends before the first step at which the bound or its gradient is not finite.

    Args:
        recording: from noise, other inputs and the parameters to moments, of which the first is the bound, and the flat
            gradient.
        adam: of all parameters, in one group.
        noise: input that differs from step to step.
        *shared: inputs that all steps of a call share.

    Attributes:
        steps_per_call: most steps of one call.

    Raises:
        ValueError: if there are several groups, or the compiled function gives other numbers than the recording.
        Exception: whatever the compiler or its tools raise.
    """

    steps_per_call = 1

    def __init__(self, recording: fx.GraphModule, adam: FlatAdam, noise: Tensor, *shared: Tensor) -> None:
        self.recording, self.adam = recording, adam
        if len(adam.groups) > 1:
            raise ValueError("the parameters have several dtypes or devices")
        (self.group,) = adam.groups
        self.buffer_names = [name for name, _ in recording.named_buffers()]
        moments, *_ = recording(noise, *shared, *(value.detach() for value in self.group))
        self.num_moments = len(moments)
        num_steps = min(self.steps_per_call, 3)
        inputs = self._inputs([noise] * num_steps, shared, [1e-3] * num_steps, 0)
        traced, first, second = ([*(value.clone() for value in adam.state()[0]), *inputs] for _ in range(3))
        with torch.no_grad(), _without_compiler_messages():
            self.compiled = _compile(make_fx(self._steps)(*traced), traced)
            results, expected = self.compiled(*first), self._steps(*second)
            assert_same([*results, *first[:STATE_SIZE]], [*expected, *second[:STATE_SIZE]])

    @torch.no_grad()
    def __call__(self, noises: Sequence[Tensor], *shared: Tensor, lrs: Sequence[float]) -> Tensor:
        """Take steps.

        Args:
            noises: the noise of every step, at most ``steps_per_call``.
            *shared: further inputs of the recording.
            lrs: step sizes.

        Returns:
            the moments at each step, one row per step; NaN from the first step on that was not taken.
        """
        (state,) = self.adam.state()
        moments, *_ = self._run(*state, *self._inputs(noises, shared, lrs, int(state[-1])))
        self.adam.mark_modified()
        return moments[: len(noises)]

    def _run(self, *inputs: Tensor) -> Sequence[Tensor]:
        return self.compiled(*inputs)

    def _inputs(
        self, noises: Sequence[Tensor], shared: Sequence[Tensor], lrs: Sequence[float], steps_before: int
    ) -> list[Tensor]:
        """Return noise, factors and number of steps, then what is constant: scales, shared inputs, buffers.

        The factors are those of m and v, with Adam's corrections for moments that started at zero. Noise and factors
        are padded to ``steps_per_call``.
        """
        padding = self.steps_per_call - len(noises)
        factors = []
        for step, lr in enumerate(lrs, steps_before + 1):
            first, second = (1 - beta**step for beta in BETAS)
            factors.append([lr / first, 1 / second])
        return [
            torch.stack([*noises, *[noises[0]] * padding]),
            noises[0].new_tensor(factors + factors[:1] * padding),
            torch.tensor(len(noises), device=noises[0].device),
            *self.adam.scales,
            *shared,
            *self.recording.buffers(),
        ]

    def _steps(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Take one step in place, if any remain; return its moments, and how many remain if it was taken."""
        state, (noises, factors, remaining, *constant) = inputs[:STATE_SIZE], inputs[STATE_SIZE:]
        moments, *new_state = self._step(remaining > 0, state, noises[0], factors[0], *constant)
        _copy_all(state, new_state)
        return moments[None], torch.where(moments[0].isfinite(), remaining - 1, 0)

    def _step(
        self, is_wanted: Tensor, state: Sequence[Tensor], noise: Tensor, factors: Tensor, scale: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the moments and the state after a step; NaN and the old state if it is not wanted or not finite."""
        vector, first_moment, second_moment, step_count = state
        num_shared = len(rest) - len(self.buffer_names)
        shared, buffers = rest[:num_shared], dict(zip(self.buffer_names, rest[num_shared:], strict=True))
        inputs = (noise, *shared, *unflatten(vector, self.group))
        moments, gradient = functional_call(self.recording, buffers, inputs)
        gradient = gradient * scale
        norm = gradient.norm()
        taken = is_wanted & (moments[0] + norm).isfinite()
        gradient = torch.where(taken, gradient * (MAX_GRADIENT_NORM / norm).clamp(max=1.0), 0.0)
        weight = taken.to(first_moment)
        first_moment = first_moment.lerp(gradient, (1 - BETAS[0]) * weight)
        second_moment = second_moment.lerp(gradient.square(), (1 - BETAS[1]) * weight)
        step = factors[0] * first_moment / ((second_moment * factors[1]).sqrt() + EPSILON)
        vector = vector - torch.where(taken, step * scale, 0.0)
        return torch.where(taken, moments, torch.nan), vector, first_moment, second_moment, step_count + taken


class LoopedSteps(CompiledSteps):
    """Compiled steps whose function loops over the steps of a call, for steps shorter than the overhead of a call."""

    steps_per_call = MAX_STEPS_PER_CALL

    def _steps(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Take the steps in place; return their moments."""
        from torch._higher_order_ops.while_loop import while_loop_op

        state, (noises, factors, number, *constant) = inputs[:STATE_SIZE], inputs[STATE_SIZE:]
        indices = torch.arange(self.steps_per_call, device=noises.device)

        def goes_on(index: Tensor, last_taken: Tensor, *others: Tensor) -> Tensor:
            return last_taken & (index < others[-1])

        def body(index: Tensor, last_taken: Tensor, rows: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
            state, (noises, factors, indices, *constant, _) = others[:STATE_SIZE], others[STATE_SIZE:]
            noise, factor = noises[index[None]][0], factors[index[None]][0]
            moments, *new_state = self._step(last_taken, state, noise, factor, *constant)
            rows = torch.where((indices == index)[:, None], moments, rows)
            return index + 1, moments[0].isfinite(), rows, *new_state

        rows = noises.new_full((self.steps_per_call, self.num_moments), torch.nan)
        carried = (indices[0].clone(), number > 0, rows, *(value.clone() for value in state))
        fixed = noises, factors, indices, *constant, number
        _, _, rows, *new_state = while_loop_op(goes_on, body, carried, fixed)  # type: ignore[arg-type]
        _copy_all(state, new_state)
        return (rows,)


class CapturedSteps(CompiledSteps):
    """Several compiled steps as one CUDA graph, which launches all of their kernels at once.

    A graph reads and writes fixed memory: that of Adam's state and of the first inputs, into which later inputs are
    copied.

    Raises:
        RuntimeError: if an operation of the step cannot be captured.
    """

    def __init__(self, recording: fx.GraphModule, adam: FlatAdam, noise: Tensor, *shared: Tensor) -> None:
        super().__init__(recording, adam, noise, *shared)
        self.steps_per_call = max(1, min(MAX_STEPS_PER_CALL, MAX_CAPTURED_NOISE // noise.numel()))
        self.static_inputs = [*adam.state()[0], *self._inputs([noise], shared, [1e-3], 0)]
        self.graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(self.graph):
            self.static_outputs = self._unrolled(*self.static_inputs)

    def _unrolled(self, *inputs: Tensor) -> tuple[Tensor]:
        """Take as many steps as remain; after one that cannot be taken, none remain."""
        state, (noises, factors, remaining, *constant) = inputs[:STATE_SIZE], inputs[STATE_SIZE:]
        rows = []
        for noise, factor in zip(noises.split(1), factors.split(1), strict=True):
            moments, remaining = self.compiled(*state, noise, factor, remaining, *constant)
            rows.append(moments)
        return (torch.cat(rows),)

    def _run(self, *inputs: Tensor) -> Sequence[Tensor]:
        for static, value in zip(self.static_inputs, inputs, strict=True):
            if static.data_ptr() != value.data_ptr():
                static.copy_(value)
        self.graph.replay()
        return self.static_outputs


def _copy_all(destinations: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for destination, source in zip(destinations, sources, strict=True):
        destination.copy_(source)


@contextmanager
def _without_compiler_messages() -> Iterator[None]:
    log = logging.getLogger("torch._inductor")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _compile(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Operations:
    """Compile a graph with inductor, without guards against other inputs: shapes and dtypes never change."""
    import torch._inductor
    from torch._guards import TracingContext, tracing
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    for module in graph.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.clear()  # the C++ wrapper cannot use what tracing noted about values
    known = () if any(value.is_cuda for value in inputs) else torch._inductor.list_options()
    options = {name: value for name, value in CPU_OPTIONS.items() if name in known}
    with tracing(TracingContext(FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True))):  # loops need a context
        return torch._inductor.compile(graph, list(inputs), options=options)
