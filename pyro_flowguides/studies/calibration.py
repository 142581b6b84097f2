"""``vsbc``: variational simulation-based calibration, a check of a guide's marginals without knowing the posterior."""

from collections.abc import Sequence

import torch
from pyro import poutine
from tqdm import tqdm

from pyro_flowguides.diagnostics.weights import weigh
from pyro_flowguides.inference.fitting import fit
from pyro_flowguides.programs.simulation import simulate
from pyro_flowguides.programs.types import Args, Kwargs, Model, Values
from pyro_flowguides.studies.calibration_result import VSBC
from pyro_flowguides.studies.guide_factories import GuideFactory
from pyro_flowguides.studies.isolated_fits import isolation

__all__ = ["vsbc"]

#: Default options of ``fit``. There are many fits, so each is short.
FIT_OPTIONS: Kwargs = {"steps": 500, "num_particles": 16, "warm_start": True, "progress": False}
#: Number of failures before the first success that ends the study.
MAX_FIRST_FAILURES = 3


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
    symmetry of the histogram of p about 1/2 (:func:`~pyro_flowguides.studies.symmetry.symmetry_test`): p tends to be
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
    if replicates < 2 or num_samples < 1:
        raise ValueError(
            f"vsbc: replicates must be at least 2 and num_samples positive, got {replicates} and {num_samples}"
        )
    options = FIT_OPTIONS | (fit_options or {})
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
