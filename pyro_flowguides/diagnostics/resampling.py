"""Pareto-smoothed importance resampling: from draws of a guide to draws of the posterior."""

import dataclasses

import torch
from torch import Tensor

from pyro_flowguides.diagnostics.psis import pareto_smooth
from pyro_flowguides.diagnostics.weights import WeightedDraws, weigh
from pyro_flowguides.programs.program import Program
from pyro_flowguides.programs.types import Guide, Model, Values

__all__ = ["importance_resample", "resample"]


def importance_resample(
    model: Model,
    guide: Guide,
    *args: object,
    num_samples: int = 1000,
    num_proposals: int = 4000,
    replace: bool = True,
    **kwargs: object,
) -> Values:
    r"""Draw from a guide, and resample the draws with Pareto-smoothed weights, so that they follow the posterior.

    Of S draws, draw s is selected with probability proportional to its smoothed weight :math:`\tilde w_s`. With
    replacement, resampling is systematic: draw s appears :math:`n \tilde w_s` times, rounded up or down, in shuffled
    order. Without replacement, the n draws are distinct, and their distribution lies between guide and posterior unless
    n is much smaller than the effective sample size. Run :func:`diagnose` first: if k-hat is above its threshold,
    resampling helps little.

    Args:
        model, guide: a Pyro model and any Pyro guide for it.
        *args, **kwargs: arguments of both.
        num_samples: number of draws n to return.
        num_proposals: number of draws S from the guide.
        replace: whether a draw may be selected more than once.

    Returns:
        Draws of each latent site, ``(n, *batch, *event)``.

    Raises:
        ValueError: if ``num_samples`` or ``num_proposals`` is too small; if no weight is positive, or, without
            replacement, fewer than ``num_samples`` are; and for the reasons that :func:`log_weights` gives.

    Cost: S runs of guide and model.

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
    weighted = weigh(Program.inspect(model, guide, args, kwargs), num_proposals)
    return resample(weighted, num_samples, replace=replace).draws


def resample(weighted: WeightedDraws, num_samples: int, *, replace: bool = True) -> WeightedDraws:
    """Resample weighted draws; each keeps its densities and its weight.

    Args:
        weighted: draws with their weights.
        num_samples: number of draws n to return.
        replace: whether a draw may be selected more than once.

    Raises:
        ValueError: for the reasons that :func:`importance_resample` gives.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be positive, got {num_samples}")
    smoothed = pareto_smooth(weighted.log_w).log_weights
    index = _systematic(smoothed, num_samples) if replace else _distinct(smoothed, num_samples)
    return dataclasses.replace(
        weighted,
        draws={name: value[index.to(value.device)] for name, value in weighted.draws.items()},
        log_p=weighted.log_p[index],
        log_q=weighted.log_q[index],
        log_w=weighted.log_w[index],
    )


def _systematic(log_w: Tensor, num_samples: int) -> Tensor:
    """Select indices by systematic resampling, shuffled: index s appears n·w_s times, rounded up or down."""
    edges = log_w.exp().cumsum(0)
    ticks = (torch.arange(num_samples, dtype=edges.dtype) + torch.rand((), dtype=edges.dtype)) / num_samples
    index = torch.searchsorted(edges / edges[-1], ticks, right=True)
    last_positive = int(torch.where(log_w.isfinite())[0][-1])
    return index.clamp(max=last_positive)[torch.randperm(num_samples)]


def _distinct(log_w: Tensor, num_samples: int) -> Tensor:
    """Select distinct indices: those of the largest log weights after adding Gumbel noise."""
    num_positive = int(log_w.isfinite().sum())
    if num_samples > num_positive:
        raise ValueError(
            f"cannot select {num_samples} distinct draws: only {num_positive} have positive weight. Ask for fewer, or "
            "pass replace=True"
        )
    noise = -torch.empty_like(log_w).exponential_().log()
    return (log_w + noise).topk(num_samples).indices
