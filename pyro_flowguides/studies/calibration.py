"""``vsbc``: variational simulation-based calibration, a check of a guide's marginals without knowing the posterior."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor
from tqdm import tqdm

from pyro_flowguides.diagnostics.weights import weigh
from pyro_flowguides.inference.fitting import fit
from pyro_flowguides.programs.simulation import simulate
from pyro_flowguides.programs.types import Values

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["VSBC", "symmetry_test", "vsbc"]

#: What ``fit`` is given unless asked otherwise: short fits, since there are many.
FIT_OPTIONS: dict[str, Any] = {"steps": 500, "num_particles": 16, "warm_start": True, "progress": False}
#: Level of the whole test, shared among all marginals.
LEVEL = 0.05
#: Standard errors beyond which a histogram is called too spread out or too narrow.
WIDTH_LIMIT = 3.0
#: Replicates that may fail in a row, from the first one on.
PATIENCE = 3
#: Marginals that are printed and plotted.
SHOWN = 12


@dataclass(frozen=True)
class VSBC:
    """What :func:`vsbc` returns; print it, or look at ``table``.

    Attributes:
        p: site -> share of the guide's draws below the true value, ``(R, *site)`` for R replicates.
        num_samples: draws of the guide behind each share.
        errors: what the replicates that failed have said; they are left out.
    """

    p: dict[str, Tensor] = field(repr=False)
    num_samples: int
    errors: tuple[str, ...] = ()

    @property
    def replicates(self) -> int:
        """Number of replicates R that succeeded."""
        return next(iter(self.p.values())).shape[0]

    @cached_property
    def p_values(self) -> dict[str, Tensor]:
        """site -> p-value of the symmetry of each marginal's histogram, shaped like the site."""
        return {
            name: torch.tensor([test[1] for test in tests], dtype=torch.float64).reshape(self.p[name].shape[1:])
            for name, tests in self._tests.items()
        }

    @cached_property
    def _tests(self) -> dict[str, list[tuple[float, float]]]:
        return {name: [symmetry_test(column) for column in _columns(p)] for name, p in self.p.items()}

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per scalar, smallest p-value first.

        The columns: ``marginal`` (site and index), ``mean_p``, ``statistic`` and ``p_value`` of the symmetry test,
        ``bias`` (``"too low"`` or ``"too high"``: where the guide lies, if that is significant at 5 % over all
        marginals together, else empty) and ``width`` (``"too narrow"`` or ``"too wide"`` in the same way; symmetric
        errors of scale, which the symmetry test does not see).
        """
        rows = list(self._rows())
        frame: pd.DataFrame = importlib.import_module("pandas").DataFrame(rows)
        return frame.sort_values("p_value", kind="stable", ignore_index=True)

    def _rows(self) -> Iterator[dict[str, Any]]:
        total = sum(len(tests) for tests in self._tests.values())
        for name, p in self.p.items():
            for label, column, (statistic, p_value) in zip(
                _labels(name, p), _columns(p), self._tests[name], strict=True
            ):
                mean = float(column.mean())
                direction = "too low" if mean > 0.5 else "too high"
                yield {
                    "marginal": label,
                    "mean_p": mean,
                    "statistic": statistic,
                    "p_value": p_value,
                    "bias": direction if p_value * total < LEVEL else "",
                    "width": _width(column),
                }

    @property
    def biased(self) -> list[str]:
        """The marginals whose asymmetry is significant at 5 % over all marginals together."""
        return list(self.table["marginal"][self.table["bias"] != ""])

    def plot(self) -> Figure:
        """Histograms of p, those with the smallest p-values first, at most twelve; flat for an exact guide.

        A histogram that rises to the right belongs to a guide that lies too low, one shaped like a U to a guide that
        is too narrow.

        Returns:
            A figure. It is not shown, and does not belong to pyplot.
        """
        columns = dict(self._all_columns())
        shown = self.table.head(SHOWN)
        wide = min(len(shown), 4)
        high = math.ceil(len(shown) / wide)
        figure: Figure = importlib.import_module("matplotlib.figure").Figure(
            figsize=(2.6 * wide, 2.2 * high), layout="constrained"
        )
        axes = figure.subplots(high, wide, squeeze=False).ravel()
        for ax, row in itertools.zip_longest(axes, shown.to_dict("records")):
            if row is None:
                ax.set_axis_off()
            else:
                _histogram(ax, columns[row["marginal"]], row)
        return figure

    def _all_columns(self) -> Iterator[tuple[str, Tensor]]:
        for name, p in self.p.items():
            yield from zip(_labels(name, p), _columns(p), strict=True)

    def __str__(self) -> str:
        total, biased = len(self.table), len(self.biased)
        failed = f", {len(self.errors)} failed" if self.errors else ""
        head = f"{biased} of {total} marginals biased ({self.replicates} replicates{failed}; 5 % for all together)"
        shown = self.table.head(SHOWN)
        body = shown.to_string(
            index=False, formatters=dict.fromkeys(("mean_p", "statistic", "p_value"), "{:.3f}".format)
        )
        rest = f"\n... and {total - len(shown)} more" if total > len(shown) else ""
        return f"{head}\n{body}{rest}"


def vsbc(
    model: Callable[..., Any],
    guide: Callable[[Callable[..., Any]], Callable[..., Any]],
    *args: Any,
    replicates: int = 100,
    observed: Sequence[str] | None = None,
    num_samples: int = 1000,
    fit_options: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: bool = True,
    **kwargs: Any,
) -> VSBC:
    r"""Variational simulation-based calibration: does a guide lie where the posterior lies, on average over the prior?

    In every replicate, parameters and data are drawn from the model, :math:`\theta^* \sim p(\theta)` and
    :math:`y \sim p(y \mid \theta^*)`; the guide is fitted to y; and of each scalar parameter

    .. math:: p = P_q(\theta < \theta^*)

    is recorded. For the exact posterior p is uniform. A variational posterior need not have the right spread to be
    useful, so only the symmetry of the histogram of p about 1/2 is tested: p tends to be above 1/2 where the guide lies
    too low, and below where it lies too high (see :func:`symmetry_test`). Symmetric errors of spread are reported
    beside that, in the column ``width``.

    The data are replaced at the observed sites, whatever argument carried them; a guide or a prior that reads them
    from the arguments still sees the original ones.

    Args:
        model: a Pyro model with proper priors.
        guide: makes a guide: a guide class, or a function ``model -> guide``. It is given the model with the
            replicate's data.
        *args: the model's arguments; the data in them only serve to find the observed sites and shapes.
        replicates: number of replicates R.
        observed: names of the observed sites; those with data in a run of the model if not given.
        num_samples: draws of the guide behind each p.
        fit_options: options of :func:`~pyro_flowguides.fit`, such as ``steps``; short fits with warm start
            by default.
        seed: of everything random; the global generator and the parameter store are left as they were.
        progress: show a progress bar over the replicates.
        **kwargs: the model's keyword arguments.

    Returns:
        a :class:`VSBC`; print it.

    Raises:
        ValueError: if the model's data or parameters cannot be drawn from it (an improper prior, a factor, a subsampled
            plate), it has no observed site or others than those named, or for fewer than two replicates.
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
        >>> found = vsbc(model, AutoDiagonalNormal, y, replicates=4, fit_options=options, progress=False)
        >>> found.p["z"].shape
        torch.Size([4])
    """
    if replicates < 2 or num_samples < 1:
        raise ValueError(
            f"vsbc: replicates must be at least 2 and num_samples positive, got {replicates} and {num_samples}"
        )
    study = _Study(model, guide, args, kwargs, None if observed is None else tuple(observed), num_samples)
    study.options = FIT_OPTIONS | dict(fit_options or {})
    seeds = torch.randint(2**62, (replicates, 2), generator=torch.Generator().manual_seed(seed)).tolist()
    shares: list[Values] = []
    errors: list[str] = []
    for prior_seed, fit_seed in tqdm(seeds, desc="vsbc", disable=not progress, leave=False):
        truth, data = study.simulate(prior_seed)
        try:
            shares.append(study.shares(truth, data, fit_seed))
        except Exception as error:  # extreme data may break a fit in any way; the others count all the same
            errors.append(f"{type(error).__name__}: {error}")
            if not shares and len(errors) >= min(PATIENCE, replicates):
                raise RuntimeError(f"vsbc: the first {len(errors)} replicates failed; the last with {error}") from error
    return VSBC({name: torch.stack([one[name] for one in shares]) for name in shares[0]}, num_samples, tuple(errors))


# -- one replicate -----------------------------------------------------------------------------------------------------


@dataclass
class _Study:
    """What all replicates share."""

    model: Callable[..., Any]
    guide: Callable[[Callable[..., Any]], Callable[..., Any]]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    observed: tuple[str, ...] | None
    num_samples: int
    options: dict[str, Any] = field(default_factory=dict)

    def simulate(self, seed: int) -> tuple[Values, Values]:
        """Parameters and data, drawn from the model."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return simulate(self.model, self.args, self.kwargs, self.observed)

    def shares(self, truth: Values, data: Values, seed: int) -> Values:
        """Fit the guide to the data: the share of its draws below each of the true values."""
        conditioned = poutine.condition(self.model, data=data)
        with torch.random.fork_rng(devices=[]), pyro.get_param_store().scope():
            torch.manual_seed(seed)
            guide = self.guide(conditioned)
            result = fit(conditioned, guide, *self.args, seed=seed, **self.options, **self.kwargs)
            drawn = weigh(result.program, self.num_samples).draws
        return {name: (value < truth[name]).double().mean(0).cpu() for name, value in drawn.items()}


# -- the test ----------------------------------------------------------------------------------------------------------


def symmetry_test(p: Tensor) -> tuple[float, float]:
    r"""Test whether a sample is symmetric about 1/2, with the Kolmogorov–Smirnov distance of p and 1 − p.

    .. math:: D = \sup_x |F_R(x) - \tilde F_R(x)|

    with the empirical distributions of :math:`p_1, \dots, p_R` and of :math:`1 - p_1, \dots, 1 - p_R`. The usual
    p-value of that distance is for independent samples, and these two are mirror images: with it, the test would
    reject a symmetric p about 11 % of the time at the level of 5 %. Under symmetry, R D is the largest distance from
    zero of a fair walk of R steps :math:`\pm 1`, which gives the p-value exactly (and a little too high where values
    are tied).

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
    reach = round(float(np.abs(walk).max(initial=0.0)))
    return reach / p.shape[0], _chance_to_reach(len(offset), reach)


@lru_cache(maxsize=1024)
def _chance_to_reach(steps: int, level: int) -> float:
    """The probability that a fair walk of so many steps is, at some time, at least ``level`` from where it began."""
    if level == 0:
        return 1.0
    inside = np.zeros(2 * level + 1)  # the outermost places are the boundary, which absorbs
    inside[level] = 1.0
    for _ in range(steps):
        inside[1:-1] = (inside[:-2] + inside[2:]) / 2
        inside[[0, -1]] = 0.0
    return float(1 - inside.sum())


def _width(p: Tensor) -> str:
    """Whether the distances from 1/2 are larger or smaller than those of a uniform p."""
    excess = (float((p - 0.5).abs().mean()) - 0.25) * math.sqrt(48 * len(p))
    if abs(excess) < WIDTH_LIMIT:
        return ""
    return "too narrow" if excess > 0 else "too wide"


# -- labels and pictures -----------------------------------------------------------------------------------------------


def _columns(p: Tensor) -> list[Tensor]:
    return list(p.reshape(p.shape[0], -1).unbind(1))


def _labels(name: str, p: Tensor) -> list[str]:
    shape = p.shape[1:]
    if not shape:
        return [name]
    return [f"{name}[{','.join(map(str, index))}]" for index in np.ndindex(*shape)]


def _histogram(ax: Axes, p: Tensor, row: Mapping[str, Any]) -> None:
    bins = max(5, min(20, len(p) // 10))
    ax.hist(p.numpy(), bins=bins, range=(0, 1), color="tab:red" if row["bias"] else "tab:blue", alpha=0.7)
    ax.axhline(len(p) / bins, color="black", linewidth=1)
    notes = ", ".join(note for note in (row["bias"], row["width"]) if note)
    ax.set_title(f"{row['marginal']}: {row['p_value']:.2g}" + (f"\n{notes}" if notes else ""), fontsize="small")
    ax.set_yticks([])
