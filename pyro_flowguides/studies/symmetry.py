"""A test of symmetry about 1/2."""

from functools import lru_cache

import numpy as np
from torch import Tensor

__all__ = ["symmetry_test"]


def symmetry_test(p: Tensor) -> tuple[float, float]:
    r"""Test whether a sample is symmetric about 1/2, with the Kolmogorov–Smirnov distance of p and 1 − p.

    .. math:: D = \sup_x |F_R(x) - \tilde F_R(x)|

    where :math:`F_R` and :math:`\tilde F_R` are the empirical distributions of :math:`p_1, \dots, p_R` and of
    :math:`1 - p_1, \dots, 1 - p_R`. The usual p-value of that distance is for independent samples, but these two are
    mirror images: with it, the test would reject a symmetric p about 11 % of the time at the level of 5 %. Under
    symmetry, R D is the largest distance from zero of a fair walk of R steps :math:`\pm 1`, which gives the exact
    p-value (slightly too high where values are tied).

    Args:
        p: values in [0, 1], shape ``(R,)``.

    Returns:
        D, and the probability of a distance at least as large under symmetry.

    References:
        Y. Yao, A. Vehtari, D. Simpson, A. Gelman (2018). Yes, but did it work? Evaluating variational inference.
        arXiv:1802.02538. C. Butler (1969). A test for symmetry using the sample distribution function. Annals of
        Mathematical Statistics 40(6).

    Example:
        >>> import torch
        >>> symmetry_test(torch.linspace(0, 1, 50).double())[1]
        1.0
        >>> symmetry_test(torch.linspace(0, 1, 50).double().sqrt())[1] < 0.01
        True
    """
    offset = np.round(2 * p.double().numpy() - 1, 9)
    offset = offset[offset != 0]
    distances, group = np.unique(-np.abs(offset), return_inverse=True)
    walk = np.cumsum(np.bincount(group, weights=np.sign(offset), minlength=len(distances)))
    farthest = round(float(np.abs(walk).max(initial=0.0)))
    return farthest / p.shape[0], _probability_to_reach(farthest, len(offset))


@lru_cache(maxsize=1024)
def _probability_to_reach(level: int, num_steps: int) -> float:
    """Return the probability that a fair walk is at some time at least ``level`` away from its start."""
    if level == 0:
        return 1.0
    inside = np.zeros(2 * level + 1)  # the outermost places are the boundary, which absorbs
    inside[level] = 1.0
    for _ in range(num_steps):
        inside[1:-1] = (inside[:-2] + inside[2:]) / 2
        inside[[0, -1]] = 0.0
    return float(1 - inside.sum())
