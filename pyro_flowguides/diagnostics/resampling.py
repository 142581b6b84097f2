"""Draws of a guide turned into draws of the posterior by Pareto-smoothed importance resampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_flowguides.diagnostics.psis import pareto_smooth
from pyro_flowguides.diagnostics.weights import WeightedDraws, log_weights


def importance_resample(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_samples: int = 1000,
    num_proposals: int = 4000,
    replace: bool = True,
    **kwargs: Any,
) -> dict[str, Tensor]:
    r"""Draw from the posterior by drawing from a guide and resampling with Pareto-smoothed weights.

    Draw s of S is chosen with probability proportional to its smoothed weight :math:`\tilde w_s`. With replacement, the
    choice is systematic: each draw appears :math:`n \tilde w_s` times, rounded up or down, and the order is shuffled.
    Without, draws are distinct, and the result lies between guide and posterior unless n is much smaller than the
    effective sample size. Look at :func:`diagnose` first: weights with k-hat above its threshold help little.

    Args:
        model: a Pyro model.
        guide: any Pyro guide for it.
        *args: arguments of model and guide.
        num_samples: number of draws n to return.
        num_proposals: number of draws S from the guide.
        replace: whether a draw may be chosen more than once.
        **kwargs: keyword arguments of model and guide.

    Returns:
        Draws of each latent site, ``(n, *batch, *event)``.

    Raises:
        ValueError: if no weight is positive; if fewer than ``num_samples`` are, without replacement; and as
            :func:`log_weights`.

    References:
        A. Vehtari, D. Simpson, A. Gelman, Y. Yao, J. Gabry (2024). Pareto smoothed importance sampling.
        arXiv:1507.02646. A. Agrawal, D. Sheldon, J. Domke (2020). Advances in black-box VI. arXiv:2006.10343.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> _ = pyro.set_rng_seed(0)
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(2.0))
        >>> def guide():  # the posterior is N(1, 0.71)
        ...     pyro.sample("z", dist.Normal(0.5, 1.0))
        >>> draws = importance_resample(model, guide, num_samples=2000)
        >>> draws["z"].shape, round(draws["z"].mean().item(), 1)
        (torch.Size([2000]), 1.0)
    """
    weighted = log_weights(model, guide, *args, num_samples=num_proposals, **kwargs)
    return resample(weighted, num_samples, replace=replace).draws


def resample(weighted: WeightedDraws, num_samples: int, *, replace: bool = True) -> WeightedDraws:
    """Resample draws that are there already; densities and weights stay with their draws.

    Args:
        weighted: draws with their weights.
        num_samples: number of draws n to return.
        replace: whether a draw may be chosen more than once.

    Raises:
        ValueError: as :func:`importance_resample`.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be positive, not {num_samples}")
    smoothed = pareto_smooth(weighted.log_w).log_weights
    chosen = _systematic(smoothed, num_samples) if replace else _distinct(smoothed, num_samples)
    return WeightedDraws(
        draws={name: value[chosen.to(value.device)] for name, value in weighted.draws.items()},
        log_p=weighted.log_p[chosen],
        log_q=weighted.log_q[chosen],
        log_w=weighted.log_w[chosen],
        point_sites=weighted.point_sites,
        guide_note=weighted.guide_note,
        model_run=weighted.model_run,
        model_note=weighted.model_note,
    )


def _systematic(log_w: Tensor, num_samples: int) -> Tensor:
    """Systematic resampling, shuffled: expected counts n·w, with the smallest spread around them."""
    edges = log_w.exp().cumsum(0)
    ticks = (torch.arange(num_samples, dtype=edges.dtype) + torch.rand((), dtype=edges.dtype)) / num_samples
    chosen = torch.searchsorted(edges / edges[-1], ticks, right=True)
    last = int(torch.where(log_w.isfinite())[0][-1])
    return chosen.clamp(max=last)[torch.randperm(num_samples)]


def _distinct(log_w: Tensor, num_samples: int) -> Tensor:
    """Sampling without replacement: the largest of the log weights with Gumbel noise."""
    num_positive = int(log_w.isfinite().sum())
    if num_samples > num_positive:
        raise ValueError(f"{num_samples} different draws asked for, but only {num_positive} have positive weight")
    noise = -torch.empty_like(log_w).exponential_().log()
    return (log_w + noise).topk(num_samples).indices
