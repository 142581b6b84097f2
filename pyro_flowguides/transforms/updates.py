"""How autoregressive layers update a coordinate: log-scale and shift from two outputs of a network."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_flowguides.transforms.bounds import soft_bound

__all__ = ["UPDATES", "Update", "place"]

#: Largest absolute log-scale of one affine step.
LOG_SCALE_BOUND = 2.0
#: Bias of the gate: it opens to at most 1 / sigmoid(2) = 1.135 times the input.
GATE_BIAS = LOG_SCALE_BOUND
#: Logarithm of the gate at its bias.
LOG_OPEN = -math.log1p(math.exp(-GATE_BIAS))


def _affine(raw: Tensor, shift: Tensor, bound: float | Tensor) -> tuple[Tensor, Tensor]:
    return soft_bound(raw, bound), shift


def _gated(raw: Tensor, shift: Tensor, bound: float | Tensor) -> tuple[Tensor, Tensor]:
    """The gate, divided by its value at the bias, so that a step starts at the identity and not as a contraction.

    Its logit stays within twice the bias of it, so that its logarithm stays above minus the bias: the gate never shuts.
    What it leaves open to the shift is not divided, and so not zero at the start: the shift is learned from there.
    """
    logit = soft_bound(raw, bound) + GATE_BIAS
    return logsigmoid(logit) - LOG_OPEN, (-logit).sigmoid() * shift


def _shift(raw: Tensor, shift: Tensor, _: float | Tensor) -> tuple[Tensor, Tensor]:
    """A shift alone ("mean only"): the log-scale is zero whatever the network says."""
    return 0 * raw, shift


def place(log_scale: Tensor, shift: Tensor, w: Tensor) -> Tensor:
    """z from its image, divided by the very scale that it was multiplied with."""
    return (w - shift) / log_scale.exp()


class Update(NamedTuple):
    """Log-scale and shift from the two outputs of the network, the first of them bounded."""

    formula: Callable[[Tensor, Tensor, float | Tensor], tuple[Tensor, Tensor]]
    bound: float

    def __call__(self, raw: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        return self.formula(raw, shift, self.bound)


UPDATES = {
    "affine": Update(_affine, LOG_SCALE_BOUND),
    "gated": Update(_gated, 2 * GATE_BIAS),
    "shift": Update(_shift, 0.0),
}
