"""The memo of a flow's last pair (x, y, ladj), so that scoring a draw computes nothing.

A memo is valid only for the very same tensor objects, unchanged, under unchanged parameters and buffers.
"""

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from pyro_flowguides.transforms.tracing import is_tracing

__all__ = ["Memo", "recall", "remember"]

#: Identity, memory and version of a tensor.
Version: TypeAlias = tuple[int, int, int]

_optimizer_steps = 0


def _count_optimizer_step(*_: object) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


# Some optimizers (torch's fused ones, Pyro's ClippedAdam) change parameters without raising their version.
register_optimizer_step_post_hook(_count_optimizer_step)


class Memo(NamedTuple):
    """The last pair of a flow, and the state of everything it was computed from."""

    x: Tensor
    y: Tensor
    ladj: Tensor
    state: tuple[int | Version, ...]
    has_graph: bool


def remember(flow: nn.Module, x: Tensor, y: Tensor, ladj: Tensor) -> Memo | None:
    """Make the memo of a pair; return None under tracing, where tensors do not outlive the call."""
    return None if is_tracing(x) else Memo(x, y, ladj, _state(flow, x, y), torch.is_grad_enabled())


def recall(flow: nn.Module, memo: Memo | None) -> Memo | None:
    """Return the memo if it is still valid, else None."""
    if memo is None or is_tracing(memo.x) or memo.state != _state(flow, memo.x, memo.y):
        return None
    # A pair computed under no_grad has no gradient to give.
    if not memo.has_graph and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in _read(flow)):
        return None
    return memo


def _read(flow: nn.Module) -> Iterator[Tensor]:
    """Iterate over everything that a call reads besides its input."""
    for module in flow.modules():
        yield from (tensor for tensor in module._parameters.values() if tensor is not None)
        yield from (tensor for tensor in module._buffers.values() if tensor is not None)


def _state(flow: nn.Module, *pair: Tensor) -> tuple[int | Version, ...]:
    return _optimizer_steps, *(_version(tensor) for tensor in (*pair, *_read(flow)))


def _version(tensor: Tensor) -> Version:
    return id(tensor), tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
