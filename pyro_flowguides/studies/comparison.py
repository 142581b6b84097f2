"""``compare``: several guides on one model, each fitted more than once, side by side."""

from collections.abc import Mapping, Sequence

from tqdm import tqdm

from pyro_flowguides.diagnostics import agreement
from pyro_flowguides.programs.batched_run import first_line
from pyro_flowguides.programs.types import Kwargs, Model
from pyro_flowguides.studies.comparison_result import Comparison
from pyro_flowguides.studies.guide_factories import GuideSpec, resolve_guides
from pyro_flowguides.studies.isolated_fits import IsolatedFit, diagnose_again, fit_in_isolation

__all__ = ["compare"]

#: Guides to compare by default.
DEFAULT_GUIDES = ("normal", "mvn", "planar", "sylvester", "iaf")
#: Options of ``fit`` that must differ between fits or that ``compare`` sets itself.
RESERVED_OPTIONS = ("seed", "checkpoint", "progress")


def compare(
    model: Model,
    *args: object,
    guides: Sequence[GuideSpec] = DEFAULT_GUIDES,
    repeats: int = 2,
    fit_options: Kwargs | None = None,
    seed: int = 0,
    progress: bool = True,
    **kwargs: object,
) -> Comparison:
    r"""Fit several guides to one model, each more than once, and rank them by ELBO.

    For data x, the ELBO of every guide bounds the same evidence,

    .. math:: \log p(x) = \text{ELBO}(q) + \text{KL}(q \,\|\, p(\cdot \mid x)),

    so a difference of ELBOs is a difference of divergences, in nats. The independent fits of a guide have different
    seeds. The differences between their importance-resampled draws enter the verdict on the better one, because a fit
    that has lost a mode cannot see that in its own weights. Each fit has its own parameter store, parameters and random
    state, so that nothing outside changes and all results can be used side by side. The table lists the error of a
    guide that fails.

    Args:
        model: a Pyro model. If it is a module, each fit trains a copy of its parameters.
        *args, **kwargs: the model's arguments.
        guides: any of the names in :data:`~pyro_flowguides.flows.FLOWS`, ``"normal"``, ``"diagonal"``, ``"lowrank"``
            and ``"mvn"`` (Pyro's ``AutoNormal``, ``AutoDiagonalNormal``, ``AutoLowRankMultivariateNormal`` and
            ``AutoMultivariateNormal``); a guide class or any function ``model -> guide``; or ``(label, function)``.
        repeats: independent fits per guide; one leaves the agreement unchecked.
        fit_options: options of :func:`~pyro_flowguides.fit` for all fits, such as ``steps``.
        seed: seed of everything random; the global generator is restored afterwards.
        progress: show a progress bar over the fits.

    Returns:
        a :class:`Comparison`; print it.

    Raises:
        ValueError: for no guides, an unknown name (the nearest is named), a label that occurs twice, ``repeats``
            below 1, or a ``seed``, ``checkpoint`` or ``progress`` in ``fit_options``.
        TypeError: for a guide instead of a function that makes one; every fit needs its own guide.

    Cost:
        ``len(guides) * repeats`` fits, and one more diagnosis per guide.

    References:
        Y. Yao, A. Vehtari, D. Simpson, A. Gelman (2018). Yes, but did it work? Evaluating variational inference.
        arXiv:1802.02538. A. Agrawal, D. Sheldon, J. Domke (2020). Advances in black-box VI. arXiv:2006.10343, on
        independent runs.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        ...     pyro.sample("x", dist.Normal(z.sum(-1), 0.3), obs=torch.tensor(1.0))
        >>> options = {"steps": 60}
        >>> comparison = compare(model, guides=["diagonal", "planar"], repeats=1, fit_options=options, progress=False)
        >>> list(comparison.table["guide"])  # the posterior is correlated
        ['planar', 'diagonal']
    """
    factories, options = resolve_guides(guides), fit_options or {}
    _check(repeats, options)
    best_fits: dict[str, IsolatedFit] = {}
    errors: dict[str, str] = {}
    with tqdm(total=len(factories) * repeats, disable=not progress, leave=False) as bar:
        for label, factory in factories.items():
            bar.set_description(label)
            fits, messages = [], []
            for repeat in range(repeats):
                try:
                    fits.append(fit_in_isolation(label, factory, model, args, kwargs, options, seed + repeat))
                except Exception as error:  # a program may raise anything; the other fits still count
                    messages.append(first_line(error))
                bar.update()
            if fits:
                best_fits[label] = _best(fits, seed)
            if messages:
                count = f"{len(messages)} of {repeats} fits failed" if fits else "failed"
                errors[label] = f"{count}: {messages[0]}"
    labels = sorted(best_fits, key=lambda label: -best_fits[label].elbo)
    return Comparison({label: best_fits[label].result for label in labels}, repeats, errors)


def _check(repeats: int, options: Mapping[str, object]) -> None:
    if repeats < 1:
        raise ValueError(f"compare: repeats must be at least 1, got {repeats}")
    for name in RESERVED_OPTIONS:
        if name in options:
            raise ValueError(f"compare: {name!r} cannot be the same for all fits; leave it out of fit_options")


def _best(fits: Sequence[IsolatedFit], seed: int) -> IsolatedFit:
    """Choose the fit with the highest ELBO, and diagnose it again with the agreement of all fits."""
    best = max(fits, key=lambda fit: fit.elbo)
    draws = [fit.draws for fit in fits if fit.draws is not None]
    return diagnose_again(best, agreement(*draws), seed) if len(draws) > 1 else best
