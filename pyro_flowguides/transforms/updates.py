"""How autoregressive layers update a coordinate: log-scale and shift from two outputs of a network."""

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_flowguides.transforms.bounds import soft_bound

__all__ = ["UPDATES", "Update", "invert_affine"]

#: Largest absolute log-scale of one affine step.
LOG_SCALE_BOUND = 2.0
#: Bias of the gate's logit: the gate opens to at most 1 / sigmoid(2) = 1.135 times the input.
GATE_BIAS = LOG_SCALE_BOUND
#: Logarithm of the gate at its bias.
LOG_GATE_AT_BIAS = -math.log1p(math.exp(-GATE_BIAS))


def _affine(raw: Tensor, shift: Tensor, bound: float | Tensor) -> tuple[Tensor, Tensor]:
    return soft_bound(raw, bound), shift


def _gated(raw: Tensor, shift: Tensor, bound: float | Tensor) -> tuple[Tensor, Tensor]:
    """Divide the gate by its value at the bias, so that a step starts at the identity and not as a contraction.

    The logit stays within twice the bias of the bias, so the gate's logarithm stays above minus the bias: the gate
    never shuts. The factor of the shift is not divided and not zero at the start, so the shift learns from there.
    """
    logit = soft_bound(raw, bound) + GATE_BIAS
    return logsigmoid(logit) - LOG_GATE_AT_BIAS, (-logit).sigmoid() * shift


def _shift(raw: Tensor, shift: Tensor, _: float | Tensor) -> tuple[Tensor, Tensor]:
    """Only shift ("mean only"): the log-scale is zero for any output of the network."""
    return 0 * raw, shift


def invert_affine(log_scale: Tensor, shift: Tensor, w: Tensor) -> Tensor:
    """Solve ``exp(log_scale) z + shift = w``; divide by the very scale that the forward direction multiplies by."""
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
