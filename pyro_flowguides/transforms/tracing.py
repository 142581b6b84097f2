"""Find out whether a call is being traced or recorded: its control flow must then not depend on values."""

import torch
from torch import Tensor

__all__ = ["in_dispatch_mode", "is_tracing"]


def is_tracing(*tensors: Tensor) -> bool:
    """Return True under compile, jit.trace or a functorch transform, or if a tensor is on the meta device."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or any(tensor.is_meta for tensor in tensors)
    )


def in_dispatch_mode() -> bool:
    """Return True if a dispatch mode intercepts operations one by one, for example to record them.

    Values are known then, so that :func:`is_tracing` returns False.
    """
    return torch._C._len_torch_dispatch_stack() > 0
