"""Record the tensor operations of a function once, and replay them."""

import linecache
import math
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from pyro_flowguides.programs.batched_run import first_line

__all__ = ["NotRecordedError", "Operations", "Replay", "assert_same", "record"]

#: Most operations of a recording. A longer one takes so long to record that its replays do not repay it.
MAX_OPERATIONS = 4000

Operations: TypeAlias = Callable[..., Sequence[Tensor]]


class NotRecordedError(ValueError):
    """The function does something that a list of tensor operations cannot repeat."""


def record(
    function: Callable[..., Sequence[Tensor | None]],
    *inputs: Tensor,
    check: Sequence[Tensor],
    parameters: Sequence[Tensor] = (),
) -> fx.GraphModule:
    """Record the tensor operations of a function, including derivatives taken inside it, without the Python between.

    Anything that depends neither on the inputs nor on a tensor that requires gradients is computed once, while
    recording. Tensors that require gradients, such as parameters of a guide or a model, are read again by every replay.
    A replay gives NaN where a matrix cannot be factorized.

    Cost: two runs of the function, and some tenths of a millisecond per operation.

    Args:
        function: from tensors to a sequence of tensors and ``None``.
        inputs: tensors with the shapes and dtypes of later calls.
        check: other inputs, at which the recording must give what the function gives.
        parameters: tensors that the function reads and that the recording takes as further inputs.

    Returns:
        a module to call like the function, with the parameters after its inputs, without gradients.

    Raises:
        NotRecordedError: if the control flow of the function depends on values, if it draws random numbers, if it fails
            while it is recorded, if it has too many operations, or if the recording gives other numbers.
        torch.linalg.LinAlgError: if a matrix cannot be factorized at these inputs.
    """
    tape = _Tape((*inputs, *parameters))
    try:
        with tape:
            outputs = function(*inputs)
        expected = function(*check)
    except (NotRecordedError, torch.linalg.LinAlgError):
        raise
    except Exception as error:  # a program may fail in any way while its operations are recorded
        raise NotRecordedError(f"it fails while it is recorded ({first_line(error)})") from error
    module = tape.finish(outputs)
    with torch.no_grad():
        replayed = module(*check, *parameters)
    assert_same(replayed, expected)
    return module


class Replay:
    """A recording that runs without Python between its operations.

    TorchScript's interpreter runs the operations. Where it cannot, they are run one by one.

    Args:
        recording: the module that :func:`record` returned.

    Attributes:
        failure: why the operations are run one by one; empty if they are not.
    """

    def __init__(self, recording: fx.GraphModule) -> None:
        self.recording = recording
        self.run: Operations | None = None
        self.failure = ""

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        if self.run is None:
            self.run = self._interpreted(inputs)
        return self.run(*inputs)

    def _interpreted(self, inputs: Sequence[Tensor]) -> Operations:
        """Return the recording as TorchScript, not optimized, which can take seconds; or the recording itself."""
        try:
            script = _trace(self.recording, inputs)

            def run(*inputs: Tensor) -> Sequence[Tensor]:
                with torch.jit.optimized_execution(False):
                    return script(*inputs)

            assert_same(run(*inputs), self.recording(*inputs))
        except Exception as error:  # TorchScript is deprecated and may fail in any way
            self.failure = first_line(error)
            return self.recording
        return run


def _trace(function: Operations, inputs: Sequence[Tensor]) -> Operations:
    """Return a function as TorchScript that is freed when it is no longer used.

    ``torch.jit.trace`` keeps every trace for the life of the process. It adds the graph to one global compilation unit,
    where this makes a unit for each.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        graph, _ = torch._C._create_graph_by_tracing(function, tuple(inputs), lambda value: "", True, False)
        script: Operations = torch._C._create_function_from_graph("replay", graph)
        return script


class _Tape(TorchDispatchMode):
    """Write operations as nodes of a graph while they run, if their results depend on the inputs."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.graph, self.attributes = fx.Graph(), nn.Module()
        #: Each tensor with its node, by the tensor's identity; holding the tensor keeps its identity unique.
        self.nodes: dict[int, tuple[Tensor, fx.Node]] = {}
        self.memory: set[int] = set()
        self.has_in_place_operations = False
        #: The error codes of factorizations: zero where one succeeded.
        self.error_codes: list[fx.Node] = []
        for index, value in enumerate(inputs):
            self._add(value, self.graph.placeholder(f"input{index}"))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return ``False`` without importing torch's compiler, as the inherited method would, which takes a second."""
        return False

    def _add(self, value: Tensor, node: fx.Node) -> None:
        self.nodes[id(value)] = value, node
        self.memory.add(value.untyped_storage().data_ptr())

    def node(self, value: Tensor) -> fx.Node:
        """Return the node of a tensor; a tensor that does not depend on the inputs becomes an attribute."""
        if id(value) not in self.nodes:
            name = f"tensor{len(self.nodes)}"
            self.attributes.register_buffer(name, value, persistent=False)
            self.nodes[id(value)] = value, self.graph.get_attr(name)
        return self.nodes[id(value)][1]

    def _varies(self, value: object) -> bool:
        if not isinstance(value, Tensor):
            return False
        return value.requires_grad or (id(value) in self.nodes and self.nodes[id(value)][1].op != "get_attr")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise NotRecordedError(f"it draws random numbers ({func})")
        if not any(self._varies(value) for value in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            self.has_in_place_operations = True
            if args[0].untyped_storage().data_ptr() not in self.memory:
                raise NotRecordedError(f"it changes a constant in place ({func})")
        if func is torch.ops.aten._linalg_check_errors.default:
            self.error_codes.append(self.node(args[0]))
            return func(*args, **kwargs)
        if len(self.nodes) > MAX_OPERATIONS:
            raise NotRecordedError(f"it has more than {MAX_OPERATIONS} operations, too many to repay the recording")
        node = self.graph.call_function(func, *tree_map_only(Tensor, self.node, (args, kwargs)))
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            self._add(result, node)
        elif isinstance(result, (tuple, list)):
            for index, value in enumerate(result):
                self._add(value, self.graph.call_function(operator.getitem, (node, index)))
        else:
            raise NotRecordedError(f"its control flow depends on values ({func})")
        return result

    def finish(self, outputs: Sequence[Tensor | None]) -> fx.GraphModule:
        """Return the recording without duplicate operations, unused ones, and those that only autograd needs."""
        nodes = [None if output is None else self.node(output) for output in outputs]
        self.graph.output(tuple(self._nan_where_failed(nodes) if self.error_codes else nodes))
        if not self.has_in_place_operations:  # a change in place may be visible through another node
            _merge_duplicates(self.graph)
            self.graph.eliminate_dead_code()
        module = fx.GraphModule(self.attributes, self.graph)
        module.graph.lint()
        _forget_source(module)
        return module

    def _nan_where_failed(self, outputs: Sequence[fx.Node | None]) -> list[fx.Node | None]:
        """Set the outputs to NaN if a factorization fails; raising an error would need a branch on a value."""
        aten, call = torch.ops.aten, self.graph.call_function
        failed = [call(aten.any.default, (call(aten.ne.Scalar, (code, 0)),)) for code in self.error_codes]
        for failure in failed:
            outputs = [node and call(aten.masked_fill.Scalar, (node, failure, math.nan)) for node in outputs]
        return list(outputs)


def _forget_source(module: fx.GraphModule) -> None:
    """Drop the text of a recording, which torch keeps for tracebacks for the life of the process."""
    name = type(module).forward.__code__.co_filename
    linecache.cache.pop(name, None)
    getattr(getattr(fx.graph_module, "_loader", None), "eval_cache", {}).pop(name, None)


def _merge_duplicates(graph: fx.Graph) -> None:
    first: dict[tuple[object, str, str], fx.Node] = {}
    for node in graph.nodes:
        if node.target is torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.args[0])
        elif node.op in ("call_function", "get_attr"):
            earlier = first.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
            if earlier is not node:
                node.replace_all_uses_with(earlier)


def assert_same(results: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    """Raise :class:`NotRecordedError` where results differ by more than rounding."""
    for one, other in zip(results, expected, strict=True):
        if one is None or other is None or not other.numel():
            continue
        tolerance = torch.finfo(other.dtype).eps ** 0.5 if other.is_floating_point() else 0.0
        size = float(other.detach().nan_to_num(posinf=0.0, neginf=0.0).abs().max())
        if not torch.allclose(one, other, rtol=tolerance, atol=tolerance * size, equal_nan=True):
            raise NotRecordedError(f"its recording differs by {float((one - other).detach().abs().max()):.3g}")
