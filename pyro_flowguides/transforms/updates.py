r"""How autoregressive and coupling layers update a coordinate: log-scale and shift from two outputs of a network.

Both depend on the gain γ of the layer (:class:`~pyro_flowguides.transforms.conditioner.ConditionerFlow`), so that
training at a small gain is stable from any start. A log-scale is bounded, :math:`a = b \tanh(s / b)`, with b = 2 for
the sign that shrinks draws and b = 2γ for the sign that stretches them: at a small gain, layers can shrink their input
but hardly stretch it. A large shift grows only like a logarithm, :math:`\delta(m) = c \operatorname{asinh}(m / c)` with
:math:`c = 3 / (1.001 - \gamma)`; near a gain of one it is the identity. A gate keeps its own shift, which it scales by
at most one. The idea is that of D. Andrade (2024), Stable training of normalizing flows for high-dimensional
variational inference, arXiv:2402.16408.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_flowguides.transforms.bounds import soft_bound, soft_log

__all__ = ["UPDATES", "Limits", "Update", "invert_affine"]

#: Largest absolute log-scale of one affine step at full gain.
LOG_SCALE_BOUND = 2.0
#: Shift at which damping sets in at a gain of zero, in standard deviations of a flow's base.
LOG_ONSET = 3.0
#: Bias of the gate's logit: the gate opens to at most 1 / sigmoid(2) = 1.135 times the input.
GATE_BIAS = LOG_SCALE_BOUND
#: Logarithm of the gate at its bias.
LOG_GATE_AT_BIAS = -math.log1p(math.exp(-GATE_BIAS))


class Limits(NamedTuple):
    """How far the first output may go below and above zero, and where the damping of the second sets in."""

    below: float | Tensor
    above: float | Tensor
    onset: Tensor | None = None

    def bound(self, raw: Tensor) -> Tensor:
        """Bound an output smoothly, with slope 1 at zero."""
        return soft_bound(raw, self.above if self.above is self.below else torch.where(raw > 0, self.above, self.below))

    def damp(self, shift: Tensor) -> Tensor:
        """Damp a shift, or return it if there is no onset."""
        return shift if self.onset is None else soft_log(shift, self.onset)


def _affine(raw: Tensor, shift: Tensor, limits: Limits) -> tuple[Tensor, Tensor]:
    return limits.bound(raw), limits.damp(shift)


def _gated(raw: Tensor, shift: Tensor, limits: Limits) -> tuple[Tensor, Tensor]:
    """Divide the gate by its value at the bias, so that a step starts at the identity and not as a contraction.

    The logit stays within twice the bias of the bias, so the gate's logarithm stays above minus the bias: the gate
    never shuts. The factor of the shift is not divided and not zero at the start, so the shift learns from there.
    """
    logit = limits.bound(raw) + GATE_BIAS
    return logsigmoid(logit) - LOG_GATE_AT_BIAS, (-logit).sigmoid() * shift


def _shift(raw: Tensor, shift: Tensor, limits: Limits) -> tuple[Tensor, Tensor]:
    """Only shift ("mean only"): the log-scale is zero for any output of the network."""
    return 0 * raw, limits.damp(shift)


def invert_affine(log_scale: Tensor, shift: Tensor, w: Tensor) -> Tensor:
    """Solve ``exp(log_scale) z + shift = w``; divide by the very scale that the forward direction multiplies by."""
    return (w - shift) / log_scale.exp()


class Update(NamedTuple):
    """Log-scale and shift from the two outputs of the network, the first of them bounded."""

    formula: Callable[[Tensor, Tensor, Limits], tuple[Tensor, Tensor]]
    #: Largest absolute value of the first output at full gain.
    bound: float

    def __call__(self, raw: Tensor, shift: Tensor, limits: Limits | None = None) -> tuple[Tensor, Tensor]:
        return self.formula(raw, shift, Limits(self.bound, self.bound) if limits is None else limits)

    def limits(self, gain: Tensor, *, stretches_draws: bool) -> Limits:
        """Return the limits of both outputs.

        Args:
            gain: share of the bound that is open to the sign that stretches draws.
            stretches_draws: True if a positive output stretches draws, False if it shrinks them.
        """
        bound = gain.new_full((), self.bound)  # made once: every operation with a number turns it into a tensor
        below, above = (bound, gain * bound) if stretches_draws else (gain * bound, bound)
        return Limits(below, above, LOG_ONSET / (1.001 - gain))


UPDATES = {
    "affine": Update(_affine, LOG_SCALE_BOUND),
    "gated": Update(_gated, 2 * GATE_BIAS),
    "shift": Update(_shift, 0.0),
}
