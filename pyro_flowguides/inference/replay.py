"""Running a function once and replaying the tensor operations it consisted of."""

from __future__ import annotations

import math
import operator
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["NotRecordedError", "Replay", "assert_same", "in_short", "record"]

#: What compiling costs, in seconds per operation, and the share of a replay that it saves: on one core, with inductor.
COMPILE_SECONDS, COMPILE_SAVES = 0.04, 0.6
#: Most operations of a recording: longer ones take so long to record that a usual number of replays does not repay it.
MOST_OPERATIONS = 4000
#: Replays that are timed before it is known what compiling would save.
TIMED = 20


class NotRecordedError(ValueError):
    """The function does something that a list of tensor operations cannot repeat."""


def record(
    function: Callable[..., Any], *inputs: Tensor, check: Sequence[Tensor], parameters: Sequence[Tensor] = ()
) -> fx.GraphModule:
    """The tensor operations of a function, derivatives taken inside it among them, without the Python around them.

    What depends neither on the inputs nor on a tensor that requires gradients is computed once, now. Tensors that
    require gradients, the parameters of a guide or a model, are read anew by every replay. A replay gives NaN where a
    matrix cannot be factorized.

    Cost: two runs of the function, and some tenths of a millisecond per operation.

    Args:
        function: from tensors to a sequence of tensors and ``None``.
        inputs: tensors of the shapes and dtypes of later calls.
        check: other inputs, at which the recording has to give what the function gives.
        parameters: tensors that the function reads and the recording is to take as further inputs.

    Returns:
        a module to be called like the function, with the parameters behind its inputs, without gradients.

    Raises:
        NotRecordedError: if the function's course depends on values, if it draws random numbers, if it fails while it
            is recorded, if it is too long, or if its recording gives other numbers than it does.
        torch.linalg.LinAlgError: if a matrix cannot be factorized at these inputs.
    """
    tape = _Tape((*inputs, *parameters))
    try:
        with tape:
            outputs = function(*inputs)
    except (NotRecordedError, torch.linalg.LinAlgError):
        raise
    except Exception as error:  # a program may fail in any way where its operations are watched
        raise NotRecordedError(f"it fails where it is watched ({type(error).__name__}: {in_short(error)})") from error
    module = tape.finish(outputs)
    with torch.no_grad():
        found = module(*check, *parameters)
    assert_same(found, function(*check))
    return module


def in_short(error: Exception) -> str:
    """What an error says first."""
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


class Replay:
    """A recording, carried out without Python between its operations.

    The operations are run by TorchScript's interpreter, or one by one where it cannot run them.

    Args:
        recording: what :func:`record` returned.

    Attributes:
        seconds: times of the first calls.
        failure: why the operations are run one by one; empty if they are not.
    """

    def __init__(self, recording: fx.GraphModule) -> None:
        self.recording = recording
        self.run: Callable[..., Any] | None = None
        self.seconds: list[float] = []
        self.failure = ""

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Any:
        if self.run is None:
            self.run = self._interpret(inputs)
        begin = time.perf_counter()
        outputs = self.run(*inputs)
        if len(self.seconds) < TIMED:
            self.seconds.append(time.perf_counter() - begin)
        return outputs

    def compiling_repays(self, remaining: int) -> bool:
        """Whether so many more calls save more time than compiling takes, judged by the first calls."""
        if len(self.seconds) < TIMED:
            return False
        saved = COMPILE_SAVES * remaining * statistics.median(self.seconds)
        return saved > COMPILE_SECONDS * len(self.recording.graph.nodes)

    def _interpret(self, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        """The recording in TorchScript, as it stands and not optimized, which can take seconds; or the recording."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                script = torch.jit.trace(self.recording, tuple(inputs), check_trace=False)

            def run(*inputs: Tensor) -> Any:
                with torch.jit.optimized_execution(False):
                    return script(*inputs)

            assert_same(run(*inputs), self.recording(*inputs))
        except Exception as error:  # an interpreter that is on its way out may fail in any way
            self.failure = in_short(error)
            return self.recording
        return run


class _Tape(TorchDispatchMode):
    """Writes operations down as nodes of a graph while they are carried out: those whose results vary."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.graph, self.attributes = fx.Graph(), nn.Module()
        #: The node of every varying tensor, by its identity; the tensor is kept so that its identity stays its own.
        self.seen: dict[int, tuple[Tensor, fx.Node]] = {}
        self.memory: set[int] = set()
        self.in_place = False
        #: Where factorizations report success: zeros.
        self.reports: list[fx.Node] = []
        for place, value in enumerate(inputs):
            self._note(value, self.graph.placeholder(f"input{place}"))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Not to be told apart by a compiler that is not there: loading it takes a second."""
        return False

    def _note(self, value: Tensor, node: fx.Node) -> None:
        self.seen[id(value)] = value, node
        self.memory.add(value.untyped_storage().data_ptr())

    def node(self, value: Tensor) -> fx.Node:
        """The node of a tensor; what does not come from the inputs becomes an attribute."""
        if id(value) not in self.seen:
            name = f"tensor{len(self.seen)}"
            self.attributes.register_buffer(name, value, persistent=False)
            self.seen[id(value)] = value, self.graph.get_attr(name)
        return self.seen[id(value)][1]

    def _nodes(self, value: Any) -> Any:
        """Nodes in place of tensors, also in sequences of them."""
        if isinstance(value, (tuple, list)):
            return type(value)(map(self._nodes, value))
        return self.node(value) if isinstance(value, Tensor) else value

    def _varies(self, value: Any) -> bool:
        if not isinstance(value, Tensor):
            return False
        return value.requires_grad or (id(value) in self.seen and self.seen[id(value)][1].op != "get_attr")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise NotRecordedError(f"it draws random numbers ({func})")
        if not any(self._varies(value) for value in _leaves((*args, *kwargs.values()))):
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            self.in_place = True
            if args[0].untyped_storage().data_ptr() not in self.memory:
                raise NotRecordedError(f"it changes a constant in place ({func})")
        if func is torch.ops.aten._linalg_check_errors.default:
            self.reports.append(self.node(args[0]))
            return func(*args, **kwargs)
        if len(self.seen) > MOST_OPERATIONS:
            raise NotRecordedError(f"it takes more than {MOST_OPERATIONS} operations, too many to repay the recording")
        node = self.graph.call_function(func, self._nodes(args), {name: self._nodes(kwargs[name]) for name in kwargs})
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            self._note(result, node)
        elif isinstance(result, (tuple, list)):
            for place, value in enumerate(result):
                self._note(value, self.graph.call_function(operator.getitem, (node, place)))
        else:
            raise NotRecordedError(f"its course depends on values ({func})")
        return result

    def finish(self, outputs: Sequence[Tensor | None]) -> fx.GraphModule:
        """The recording, without what is computed twice, not used, or of interest to autograd only."""
        nodes = [None if output is None else self.node(output) for output in outputs]
        self.graph.output(tuple(self._spoilt(nodes) if self.reports else nodes))
        if not self.in_place:  # what is changed in place may be seen through other names
            _merge(self.graph)
            self.graph.eliminate_dead_code()
        module = fx.GraphModule(self.attributes, self.graph)
        module.graph.lint()
        return module

    def _spoilt(self, outputs: Sequence[fx.Node | None]) -> list[fx.Node | None]:
        """The outputs, not numbers where a factorization fails: an error would need the values on their way."""
        aten, call = torch.ops.aten, self.graph.call_function
        failed = [call(aten.any.default, (call(aten.ne.Scalar, (report, 0)),)) for report in self.reports]
        for failure in failed:
            outputs = [node and call(aten.masked_fill.Scalar, (node, failure, math.nan)) for node in outputs]
        return list(outputs)


def _leaves(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _leaves(value)
        else:
            yield value


def _merge(graph: fx.Graph) -> None:
    first: dict[tuple[Any, ...], fx.Node] = {}
    for node in graph.nodes:
        if node.target is torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.args[0])
        elif node.op in ("call_function", "get_attr"):
            earlier = first.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
            if earlier is not node:
                node.replace_all_uses_with(earlier)


def assert_same(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    """Raise :class:`NotRecordedError` where results differ by more than rounding makes them."""
    for one, other in zip(found, expected, strict=True):
        if one is None or other is None or not other.numel():
            continue
        tolerance = torch.finfo(other.dtype).eps ** 0.5 if other.is_floating_point() else 0.0
        size = float(other.detach().nan_to_num(posinf=0.0, neginf=0.0).abs().max())
        if not torch.allclose(one, other, rtol=tolerance, atol=tolerance * size, equal_nan=True):
            raise NotRecordedError(f"its recording differs by {float((one - other).detach().abs().max()):.3g}")
