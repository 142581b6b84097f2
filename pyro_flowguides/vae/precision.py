"""Mixed precision: networks may compute with 16 bits, log densities may not."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["at_least_single"]


def at_least_single(x: Tensor) -> Tensor:
    """The tensor itself, or in single precision if it has less.

    A sum of a thousand log probabilities in bfloat16 is right to whole nats only.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae.precision import at_least_single
        >>> at_least_single(torch.ones(2, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
