"""Agreement of independent fits of one posterior."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from pyro_flowguides.diagnostics.moments import Moments, log_sd_difference, mean_difference, moments
from pyro_flowguides.nn.arguments import check_mapping, check_tensor

__all__ = ["Agreement", "agreement"]

Draws = Mapping[str, Tensor]


@dataclass(frozen=True)
class Agreement:
    """Largest differences between fits of one posterior, over all pairs of fits and all coordinates.

    Attributes:
        mean_difference: largest difference of two means, in posterior standard deviations.
        log_sd_difference: largest difference of the logarithms of two standard deviations.
        mean_site: site where the means differ most.
        log_sd_site: site where the standard deviations differ most.
        num_fits: number of fits.
    """

    mean_difference: float
    log_sd_difference: float
    mean_site: str
    log_sd_site: str
    num_fits: int = 2

    @property
    def worst_difference(self) -> float:
        """The larger of the two differences."""
        return max(self.mean_difference, self.log_sd_difference)

    @property
    def worst_site(self) -> str:
        """The site where the larger of the two differences occurs."""
        return self.mean_site if self.mean_difference >= self.log_sd_difference else self.log_sd_site

    def __str__(self) -> str:
        return (
            f"{self.num_fits} fits: means within {self.mean_difference:.2f} sd (worst at '{self.mean_site}'), "
            f"log sd within {self.log_sd_difference:.2f} (worst at '{self.log_sd_site}')"
        )


def agreement(draws_a: Draws, draws_b: Draws, *more: Draws) -> Agreement:
    r"""Compare draws of independent fits, preferably after :func:`importance_resample`.

    Return the largest, over all coordinates and all pairs of fits, of

    .. math:: \frac{|m_a - m_b|}{\sqrt{(s_a^2 + s_b^2)/2}} \quad\text{and}\quad |\log s_a - \log s_b|,

    where m and s are mean and standard deviation. The weights of a fit do not reveal a mode that it misses; another fit
    that finds this mode does. The differences have a Monte Carlo error of about :math:`\sqrt{2/n}`, where n is the
    (effective) number of draws of each fit.

    Args:
        draws_a: draws of one fit: site -> (S, ...).
        draws_b: draws of another fit, with the same sites; the number of draws may differ.
        *more: draws of further fits.

    Raises:
        ValueError: if the fits differ in their sites or shapes, if a fit has fewer than two draws, or if there are no
            sites.

    References:
        Y. Yao, A. Vehtari, A. Gelman (2022). Stacking for non-mixing Bayesian computations: the curse and blessing of
        multimodal posteriors. arXiv:2006.12335.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> left, right = torch.randn(1000) - 5, torch.randn(1000) + 5  # each fit finds one of two modes
        >>> agreement({"z": left}, {"z": right}).mean_difference > 5
        True
    """
    fits = [draws_a, draws_b, *more]
    for fit in fits:
        check_mapping("agreement", "the draws of a fit", fit)
    if not draws_a:
        raise ValueError("there are no sites to compare")
    summaries = [_summary(draws) for draws in fits]
    for summary in summaries[1:]:
        _check_same_sites(summaries[0], summary)
    differences = [difference for pair in itertools.combinations(summaries, 2) for difference in _differences(*pair)]
    by_mean = max(differences, key=lambda difference: difference[0])
    by_log_sd = max(differences, key=lambda difference: difference[1])
    return Agreement(
        mean_difference=by_mean[0],
        log_sd_difference=by_log_sd[1],
        mean_site=by_mean[2],
        log_sd_site=by_log_sd[2],
        num_fits=len(fits),
    )


def _summary(draws: Draws) -> Moments:
    for site, value in draws.items():
        check_tensor("agreement", f"site {site!r}", value)
        if value.dim() == 0 or value.shape[0] < 2:
            raise ValueError(f"site '{site}' has fewer than two draws")
    return moments(draws)


def _check_same_sites(first: Moments, second: Moments) -> None:
    if first.keys() != second.keys():
        raise ValueError(f"the fits have different sites: {sorted(first)} and {sorted(second)}")
    for site in first:
        sizes = len(first[site].mean), len(second[site].mean)
        if sizes[0] != sizes[1]:
            raise ValueError(f"site '{site}' has different shapes in two fits: {sizes[0]} and {sizes[1]} coordinates")


def _differences(first: Moments, second: Moments) -> Iterator[tuple[float, float, str]]:
    for site in first:
        a, b = first[site], second[site]
        pooled_sd = ((a.sd.square() + b.sd.square()) / 2).sqrt()
        yield mean_difference(a, b, pooled_sd), log_sd_difference(a, b), site
