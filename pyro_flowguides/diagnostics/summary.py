"""Moments of draws that arrive in parts, computed without keeping the draws."""

import torch
from torch import Tensor

from pyro_flowguides.diagnostics.moments import Moments, RunningMoments
from pyro_flowguides.diagnostics.psis import ParetoSmoothed, pareto_smooth, tail_length, without_invalid
from pyro_flowguides.programs.types import Values

__all__ = ["GuideSummary", "SmoothedMoments"]


class SmoothedMoments:
    """Moments under Pareto-smoothed weights, of draws that arrive in parts.

    Smoothing changes only the largest weights, so only draws that may be among these are kept. The weights of all
    other draws are final relative to each other, and their moments are merged at once.

    Args:
        num_samples: total number of draws S.

    Cost: memory for min(S / 5, 3 √S) draws.
    """

    def __init__(self, num_samples: int) -> None:
        self._tail_length = tail_length(num_samples)
        self._log_w: list[Tensor] = []
        self._body = RunningMoments()
        self._tail_draws: Values = {}
        self._tail_index = torch.zeros(0, dtype=torch.long)

    @property
    def log_w(self) -> Tensor:
        """All log weights so far."""
        return torch.cat(self._log_w)

    def add(self, draws: Values, log_w: Tensor) -> None:
        """Add a part: site -> (S', ...), and log weights (S',)."""
        start = sum(map(len, self._log_w))
        self._log_w.append(log_w)
        index = torch.cat([self._tail_index, torch.arange(start, start + len(log_w))])
        if self._tail_draws:
            draws = {name: torch.cat([self._tail_draws[name], value]) for name, value in draws.items()}
        weights = without_invalid(self.log_w[index])
        in_tail = torch.zeros(len(index), dtype=torch.bool)
        in_tail[weights.topk(min(self._tail_length, len(index))).indices] = True
        self._body.add(_select(draws, ~in_tail), weights[~in_tail])
        self._tail_draws, self._tail_index = _select(draws, in_tail), index[in_tail]

    def smooth(self) -> tuple[ParetoSmoothed, Moments]:
        """Return the smoothed weights and the moments under them; at least one weight must be positive."""
        smoothed = pareto_smooth(self.log_w)
        weights, in_body = smoothed.log_weights, torch.ones(len(self.log_w), dtype=torch.bool)
        in_body[self._tail_index] = False
        total = RunningMoments()
        total.merge(weights[in_body].logsumexp(0), self._body.moments)
        total.add(self._tail_draws, weights[self._tail_index])
        return smoothed, total.moments


class GuideSummary:
    """Log weights of a guide's own draws, and their moments before and after weighting.

    Args:
        num_samples: total number of draws.

    Attributes:
        weighted: moments under Pareto-smoothed weights, and all log weights.
        unweighted: moments of equally weighted draws.
        constant: sites where all draws so far are equal.
    """

    def __init__(self, num_samples: int) -> None:
        self.weighted = SmoothedMoments(num_samples)
        self.constant: set[str] = set()
        self.unweighted = RunningMoments()
        self._first: Values = {}

    def add(self, draws: Values, log_w: Tensor) -> None:
        """Add a part: site -> (S', ...), and log weights (S',)."""
        if not self._first:
            self._first = {name: value[0].clone() for name, value in draws.items()}
            self.constant = set(draws)
        self.constant = {name for name in self.constant if bool((draws[name] == self._first[name]).all())}
        self.unweighted.add(draws, torch.zeros_like(log_w))
        self.weighted.add(draws, log_w)


def _select(draws: Values, mask: Tensor) -> Values:
    return {name: value[mask.to(value.device)] for name, value in draws.items()}
