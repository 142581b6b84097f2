"""What a verdict asks of weighted draws, gathered while they come in parts, without keeping them."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_flowguides.diagnostics.moments import Moments, RunningMoments
from pyro_flowguides.diagnostics.psis import ParetoSmoothed, pareto_smooth, tail_length, without_invalid
from pyro_flowguides.programs.traces import Values


class SmoothedMoments:
    """Moments under Pareto-smoothed weights, of draws that come in parts.

    Smoothing changes the largest weights only. Draws that may be among these are kept; of all others it is known
    already by what they count relative to each other.

    Args:
        num_samples: number of draws S that will come.

    Cost: memory for min(S / 5, 3 √S) draws.
    """

    def __init__(self, num_samples: int) -> None:
        self._tail = tail_length(num_samples)
        self._log_w: list[Tensor] = []
        self._rest = RunningMoments()
        self._heavy: Values = {}
        self._places = torch.zeros(0, dtype=torch.long)

    @property
    def log_w(self) -> Tensor:
        """All log weights so far."""
        return torch.cat(self._log_w)

    def add(self, draws: Values, log_w: Tensor) -> None:
        """Take in a part: site -> (S', ...), and log weights (S',)."""
        start = sum(map(len, self._log_w))
        self._log_w.append(log_w)
        places = torch.cat([self._places, torch.arange(start, start + len(log_w))])
        if self._heavy:
            draws = {name: torch.cat([self._heavy[name], value]) for name, value in draws.items()}
        weights = without_invalid(self.log_w[places])
        is_heavy = torch.zeros(len(places), dtype=torch.bool)
        is_heavy[weights.topk(min(self._tail, len(places))).indices] = True
        self._rest.add(_chosen(draws, ~is_heavy), weights[~is_heavy])
        self._heavy, self._places = _chosen(draws, is_heavy), places[is_heavy]

    def smooth(self) -> tuple[ParetoSmoothed, Moments]:
        """The smoothed weights, some of which must be positive, and the moments under them."""
        smoothed = pareto_smooth(self.log_w)
        weights, is_rest = smoothed.log_weights, torch.ones(len(self.log_w), dtype=torch.bool)
        is_rest[self._places] = False
        whole = RunningMoments()
        whole.merge(weights[is_rest].logsumexp(0), self._rest.moments)
        whole.add(self._heavy, weights[self._places])
        return smoothed, whole.moments


class Summary:
    """The log weights of a guide's own draws, their moments before and after weighting, and where they do not vary.

    Args:
        num_samples: number of draws that will come.
    """

    def __init__(self, num_samples: int) -> None:
        self.weighted = SmoothedMoments(num_samples)
        self._plain = RunningMoments()
        self._first: Values = {}
        #: Sites at which all draws so far are the same.
        self.constant: set[str] = set()

    @property
    def log_w(self) -> Tensor:
        """All log weights so far."""
        return self.weighted.log_w

    @property
    def plain(self) -> Moments:
        """Moments of all draws so far, equally weighted."""
        return self._plain.moments

    def add(self, draws: Values, log_w: Tensor) -> None:
        """Take in a part: site -> (S', ...), and log weights (S',)."""
        if not self._first:
            self._first = {name: value[0].clone() for name, value in draws.items()}
            self.constant = set(draws)
        self.constant = {name for name in self.constant if bool((draws[name] == self._first[name]).all())}
        self._plain.add(draws, torch.zeros_like(log_w))
        self.weighted.add(draws, log_w)


def _chosen(draws: Values, mask: Tensor) -> Values:
    return {name: value[mask.to(value.device)] for name, value in draws.items()}
