"""``vsbc``: variational simulation-based calibration, a check of a guide's marginals without knowing the posterior."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from pyro import poutine
from torch import Tensor
from tqdm import tqdm

from pyro_flowguides.diagnostics.plots import new_figure
from pyro_flowguides.diagnostics.weights import weigh
from pyro_flowguides.inference.fitting import fit
from pyro_flowguides.nn.arguments import check_callable, check_count, check_seed, describe
from pyro_flowguides.programs.simulation import simulate
from pyro_flowguides.programs.types import Args, Kwargs, Model, Values
from pyro_flowguides.studies.isolated_fits import GuideFactory, check_factory, check_fit_options, isolation

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["VSBC", "symmetry_test", "vsbc"]

#: Default options of ``fit``. There are many fits, so each is short.
FIT_OPTIONS: Kwargs = {"steps": 500, "num_particles": 16, "warm_start": True, "progress": False}
#: Number of failures before the first success that ends the study.
MAX_FIRST_FAILURES = 3
#: Level of the test of all marginals together.
LEVEL = 0.05
#: Standard errors beyond which a histogram counts as too wide or too narrow.
WIDTH_LIMIT = 3.0
#: Most marginals that are printed and plotted.
MAX_SHOWN = 12


def vsbc(
    model: Model,
    guide: GuideFactory,
    *args: object,
    replicates: int = 100,
    observed: Sequence[str] | None = None,
    num_samples: int = 1000,
    fit_options: Kwargs | None = None,
    seed: int = 0,
    progress: bool = True,
    **kwargs: object,
) -> VSBC:
    r"""Check the location of a guide's marginals by variational simulation-based calibration.

    Each replicate draws parameters :math:`\theta^* \sim p(\theta)` and data :math:`y \sim p(y \mid \theta^*)` from the
    model, fits the guide to y, and records for each scalar parameter

    .. math:: p = P_q(\theta < \theta^*).

    For the exact posterior, p is uniform. A variational posterior can be useful with a wrong spread, so the test is for
    symmetry of the histogram of p about 1/2 (:func:`~pyro_flowguides.studies.calibration.symmetry_test`): p tends to be
    above 1/2 where the guide lies too low, and below where it lies too high. The column ``width`` reports symmetric
    errors of the spread.

    New data replace the old at the observed sites. A guide or a prior that reads data from the arguments still sees the
    original data.

    Args:
        model: a Pyro model with proper priors.
        guide: a guide class, or a function ``model -> guide``. It receives the model with the replicate's data.
        *args, **kwargs: the model's arguments; their data only show which sites are observed, and their shapes.
        replicates: number of replicates R.
        observed: names of the observed sites; those with data in a run of the model if not given.
        num_samples: draws of the guide for each p.
        fit_options: options of :func:`~pyro_flowguides.fit`, such as ``steps``; short fits with a warm start by
            default.
        seed: seed of everything random; the global generator and the parameter store are left as they were.
        progress: show a progress bar over the replicates.

    Returns:
        a :class:`VSBC`; print it.

    Raises:
        ValueError: if the model's data or parameters cannot be drawn from it (an improper prior, a factor, a subsampled
            plate), if its observed sites are not those named, or if it has none, or for fewer than two replicates.
        RuntimeError: if the first replicates all fail.

    Cost:
        R fits; for ``AutoIAF`` and some tens of parameters, one or two seconds each.

    References:
        Y. Yao, A. Vehtari, D. Simpson, A. Gelman (2018). Yes, but did it work? Evaluating variational inference.
        arXiv:1802.02538. S. Talts et al. (2018). Validating Bayesian inference algorithms with simulation-based
        calibration. arXiv:1804.06788.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoDiagonalNormal
        >>> def model(y):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        >>> y, options = torch.tensor(0.0), {"steps": 60, "lr": 0.1}
        >>> result = vsbc(model, AutoDiagonalNormal, y, replicates=4, fit_options=options, progress=False)
        >>> result.p["z"].shape
        torch.Size([4])
    """
    check_callable("vsbc", "model", model, "a Pyro model, a function that calls pyro.sample")
    check_factory("vsbc", guide)
    replicates, seed = check_count("vsbc", "replicates", replicates, 2), check_seed("vsbc", seed)
    num_samples = check_count("vsbc", "num_samples", num_samples)
    options = FIT_OPTIONS | check_fit_options("vsbc", fit_options or {}, ("seed", "checkpoint"))
    if isinstance(observed, str) or not isinstance(observed, Iterable | None):
        raise TypeError(f"vsbc: observed must be a sequence of names of sites, got {describe(observed)}")
    sites = None if observed is None else tuple(observed)
    seeds = torch.randint(2**62, (replicates, 2), generator=torch.Generator().manual_seed(seed)).tolist()
    shares: list[Values] = []
    errors: list[str] = []
    for prior_seed, fit_seed in tqdm(seeds, desc="vsbc", disable=not progress, leave=False):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(prior_seed)
            truth, data = simulate(model, args, kwargs, sites)
        conditioned = poutine.condition(model, data=data)
        try:
            draws = _draws_of_fit(conditioned, guide, args, kwargs, options, num_samples, fit_seed)
            shares.append({name: (value < truth[name]).double().mean(0).cpu() for name, value in draws.items()})
        except Exception as error:  # extreme data may break a fit in any way; other replicates still count
            errors.append(f"{type(error).__name__}: {error}")
            if not shares and len(errors) >= min(MAX_FIRST_FAILURES, replicates):
                raise RuntimeError(f"vsbc: the first {len(errors)} replicates failed; the last with {error}") from error
    return VSBC({name: torch.stack([one[name] for one in shares]) for name in shares[0]}, num_samples, tuple(errors))


def _draws_of_fit(
    model: Model, guide: GuideFactory, args: Args, kwargs: Kwargs, options: Kwargs, num_samples: int, seed: int
) -> Values:
    with isolation(seed):
        result = fit(model, guide(model), *args, seed=seed, **options, **kwargs)
        return weigh(result.program, num_samples).draws


@dataclass(frozen=True)
class _Marginal:
    """The p of one scalar parameter, and its row of the table; :attr:`VSBC.table` explains the columns."""

    marginal: str
    p: Tensor
    mean_p: float
    statistic: float
    p_value: float
    bias: str
    width: str


@dataclass(frozen=True)
class VSBC:
    """The result of :func:`vsbc`; print it, or look at ``table``.

    Attributes:
        p: site -> share of the guide's draws below the true value, ``(R, *site)`` for R replicates.
        num_samples: draws of the guide for each share.
        errors: messages of the replicates that failed; these are left out.
    """

    p: Values = field(repr=False)
    num_samples: int
    errors: tuple[str, ...] = ()

    @property
    def replicates(self) -> int:
        """Number of replicates R that succeeded."""
        return next(iter(self.p.values())).shape[0]

    @cached_property
    def p_values(self) -> Values:
        """site -> p-value of the symmetry of each marginal's histogram, shaped like the site."""
        return {
            name: torch.tensor([one.p_value for one in marginals], dtype=torch.float64).reshape(self.p[name].shape[1:])
            for name, marginals in self._by_site.items()
        }

    @cached_property
    def _by_site(self) -> dict[str, list[_Marginal]]:
        num_marginals = sum(p[0].numel() for p in self.p.values())
        return {
            name: [_test(label, column, num_marginals) for label, column in _columns(name, p)]
            for name, p in self.p.items()
        }

    @cached_property
    def _marginals(self) -> list[_Marginal]:
        """All marginals, smallest p-value first."""
        return sorted(itertools.chain(*self._by_site.values()), key=lambda marginal: marginal.p_value)

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per scalar, smallest p-value first.

        The columns: ``marginal`` (site and index), ``mean_p``, ``statistic`` and ``p_value`` of the symmetry test,
        ``bias`` (where the guide lies, ``"too low"`` or ``"too high"``, if that is significant at 5 % over all
        marginals together; else empty) and ``width`` (``"too narrow"`` or ``"too wide"`` if the spread of p differs
        from that of a uniform p by more than three standard errors; else empty). The symmetry test does not detect
        symmetric errors of scale, which ``width`` shows.
        """
        columns = ("marginal", "mean_p", "statistic", "p_value", "bias", "width")
        rows = [[getattr(marginal, column) for column in columns] for marginal in self._marginals]
        frame: pd.DataFrame = importlib.import_module("pandas").DataFrame(rows, columns=columns)
        return frame

    @property
    def biased(self) -> list[str]:
        """The marginals whose asymmetry is significant at 5 % over all marginals together."""
        return [marginal.marginal for marginal in self._marginals if marginal.bias]

    def plot(self) -> Figure:
        """Plot histograms of p for the marginals with the smallest p-values, at most twelve; flat for an exact guide.

        The histogram rises to the right if the guide lies too low, and is shaped like a U if the guide is too narrow.

        Returns:
            a figure, which is not shown and does not belong to pyplot.
        """
        shown = self._marginals[:MAX_SHOWN]
        num_columns = min(len(shown), 4)
        num_rows = math.ceil(len(shown) / num_columns)
        figure = new_figure(2.6 * num_columns, 2.2 * num_rows)
        axes = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
        for ax, marginal in itertools.zip_longest(axes, shown):
            if marginal is None:
                ax.set_axis_off()
            else:
                _plot_histogram(ax, marginal)
        return figure

    def __str__(self) -> str:
        total, num_biased = len(self._marginals), len(self.biased)
        failed = f", {len(self.errors)} failed" if self.errors else ""
        head = f"{num_biased} of {total} marginals biased ({self.replicates} replicates{failed}; 5 % for all together)"
        formatters = dict.fromkeys(("mean_p", "statistic", "p_value"), "{:.3f}".format)
        body = self.table.head(MAX_SHOWN).to_string(index=False, formatters=formatters)
        return f"{head}\n{body}" + (f"\n... and {total - MAX_SHOWN} more" if total > MAX_SHOWN else "")


def _test(label: str, p: Tensor, num_marginals: int) -> _Marginal:
    """Test one marginal, at a level shared among all."""
    statistic, p_value = symmetry_test(p)
    mean = float(p.mean())
    bias = ("too low" if mean > 0.5 else "too high") if p_value * num_marginals < LEVEL else ""
    return _Marginal(label, p, mean, statistic, p_value, bias, _width(p))


def _width(p: Tensor) -> str:
    """Compare the mean distance from 1/2 with that of a uniform p."""
    excess = (float((p - 0.5).abs().mean()) - 0.25) * math.sqrt(48 * len(p))
    if abs(excess) < WIDTH_LIMIT:
        return ""
    return "too narrow" if excess > 0 else "too wide"


def _columns(name: str, p: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the label and the p, (R,), of each scalar of a site."""
    for index in np.ndindex(*p.shape[1:]):
        yield f"{name}[{','.join(map(str, index))}]" if index else name, p[(slice(None), *index)]


def _plot_histogram(ax: Axes, marginal: _Marginal) -> None:
    num_bins = max(5, min(20, len(marginal.p) // 10))
    color = "tab:red" if marginal.bias else "tab:blue"
    ax.hist(marginal.p.numpy(), bins=num_bins, range=(0, 1), color=color, alpha=0.7)
    ax.axhline(len(marginal.p) / num_bins, color="black", linewidth=1)
    notes = ", ".join(filter(None, (marginal.bias, marginal.width)))
    title = f"{marginal.marginal}: {marginal.p_value:.2g}" + (f"\n{notes}" if notes else "")
    ax.set_title(title, fontsize="small")
    ax.set_yticks([])


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
