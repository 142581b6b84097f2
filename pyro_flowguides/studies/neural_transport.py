"""``neutra_mcmc``: NUTS in the noise of a trained guide."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, cast

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.initialization import init_to_sample
from pyro.infer.reparam import NeuTraReparam
from pyro.poutine.plate_messenger import block_plate
from torch import Tensor, nn
from torch.distributions import biject_to

from pyro_flowguides.diagnostics import WeightedDraws
from pyro_flowguides.diagnostics.export import export_draws
from pyro_flowguides.inference.replay import NotRecordedError, Replay, record
from pyro_flowguides.nn.arguments import check_callable, check_count, check_mapping, check_number, check_seed
from pyro_flowguides.programs.batched_run import NotVectorizedError
from pyro_flowguides.programs.program import Program
from pyro_flowguides.programs.program_runs import score_model
from pyro_flowguides.programs.running import PYRO_LOCK, evaluation
from pyro_flowguides.programs.types import Args, Kwargs, Model, Site, Values

if TYPE_CHECKING:
    from arviz import InferenceData

__all__ = ["neutra_mcmc"]

#: The latent site from which all others follow.
NOISE = "_flowguides_noise"
#: Default options of NUTS. Steps are smaller than usual, because a funnel may extend beyond the reach of the flow.
NUTS_OPTIONS: Kwargs = {"init_strategy": init_to_sample, "target_accept_prob": 0.95}
#: Share of divergent draws above which there is a warning.
DIVERGENT_FRACTION = 0.1
#: Options of NUTS that apply to a model and not to a potential energy.
MODEL_OPTIONS = {"jit_compile", "init_strategy", "transforms", "max_plate_nesting"}


def neutra_mcmc(
    model: Model,
    guide: AutoContinuous,
    *args: object,
    num_samples: int = 1000,
    warmup_steps: int = 500,
    num_chains: int = 1,
    nuts_options: Kwargs | None = None,
    seed: int = 0,
    progress: bool = True,
    **kwargs: object,
) -> InferenceData:
    r"""Draw from the posterior by neural transport: NUTS in the noise of a trained guide, mapped to the model's sites.

    For a guide :math:`z = T(\varepsilon)` trained on :math:`p(z \mid x)`, NUTS draws from

    .. math:: \log p(\varepsilon \mid x) = \log p(x, T(\varepsilon)) + \log|\det J_T(\varepsilon)| + \text{const},

    which is close to N(0, I) where the guide is good, even if the posterior has funnels and unequal scales. The draws
    :math:`T(\varepsilon)` follow the exact posterior, not the guide: a poor guide costs time, not accuracy.

    Args:
        model: a Pyro model.
        guide: a trained autoguide with a transform: those of this package, ``AutoMultivariateNormal``,
            ``AutoDiagonalNormal``, ``AutoIAFNormal``. A guide that has never run is used untrained.
        *args, **kwargs: arguments of model and guide.
        num_samples: number of draws per chain.
        warmup_steps: steps per chain that adapt the step size and the mass matrix, and are discarded.
        num_chains: number of chains, run one after the other in this process, each started at a draw of the guide.
        nuts_options: options of ``pyro.infer.NUTS``, such as ``target_accept_prob`` (0.95 by default) or
            ``jit_compile``.
        seed: seed of the chains; the global generator is restored afterwards.
        progress: show a progress bar for each chain.

    Returns:
        The groups of :func:`~pyro_flowguides.diagnostics.to_inference_data` (ArviZ 0.2x: ``InferenceData``, 1.x:
        ``DataTree``) with dimensions chain and draw; ``sample_stats`` holds ``diverging``, ``acceptance_rate``,
        ``step_size`` and ``lp``, the log joint density.

    Warns:
        UserWarning: if more than a tenth of the draws, or all, diverged.

    Raises:
        TypeError: for a guide without a transform, such as ``AutoNormal`` or a hand-written one.
        ValueError: if a plate is subsampled, or a number of draws or chains is not positive.

    Cost:
        one gradient of the model and of the flow (for IAF its cheap direction) per leapfrog step, some milliseconds.

    References:
        M. Hoffman et al. (2019). NeuTra-lizing bad geometry in Hamiltonian Monte Carlo using neural transport.
        arXiv:1903.03704.

    Example:
        >>> import pyro, torch, pyro.distributions as dist, pyro_flowguides as fg
        >>> def model(y):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        >>> guide = fg.AutoPlanar(model)
        >>> y = torch.tensor(1.0)
        >>> _ = fg.fit(model, guide, y, steps=100, progress=False)
        >>> data = neutra_mcmc(model, guide, y, num_samples=50, warmup_steps=100, progress=False)
        >>> data["posterior"]["z"].dims, int(data["sample_stats"]["diverging"].sum())
        (('chain', 'draw'), 0)
    """
    counts = {"num_samples": num_samples, "warmup_steps": warmup_steps, "num_chains": num_chains}
    num_samples, warmup_steps, num_chains = (check_count("neutra_mcmc", *count) for count in counts.items())
    seed = check_seed("neutra_mcmc", seed)
    check_callable("neutra_mcmc", "model", model, "a Pyro model, a function that calls pyro.sample")
    options = _check_options(nuts_options or {})
    with PYRO_LOCK, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _check_guide(guide, args, kwargs)
        program = Program.inspect(model, guide, args, kwargs)
        program.check_full_density()
        chains: list[Values] = []
        with _frozen(guide):
            needs_model = MODEL_OPTIONS & {*(nuts_options or {})}
            potential = None if needs_model else _recorded_potential(program)
            for _ in range(num_chains):
                kernel = NUTS(_Transport(guide).reparam(model) if potential is None else None, potential, **options)
                start = None if potential is None else {NOISE: guide.get_base_dist().sample()}
                chains.append(_run_chain(kernel, start, num_samples, warmup_steps, progress, args, kwargs))
        _warn_of_divergences(torch.cat([chain["diverging"] for chain in chains]))
        return _export(program, guide, chains)


def _warn_of_divergences(diverging: Tensor) -> None:
    count, total = int(diverging.sum()), len(diverging)
    if count == total:
        warnings.warn(
            f"neutra_mcmc: all {total} draws diverged: the chain did not move, and its draws do not follow the "
            "posterior. Train the guide longer, or look for NaN and steep edges in the model.",
            UserWarning,
            stacklevel=3,
        )
    elif count > DIVERGENT_FRACTION * total:
        warnings.warn(
            f"neutra_mcmc: {count} of {total} draws diverged: some part of the posterior may be missing. Train the "
            "guide longer, or raise target_accept_prob in nuts_options.",
            UserWarning,
            stacklevel=3,
        )


def _check_options(options: Kwargs) -> Kwargs:
    """Return the options of NUTS with the defaults."""
    check_mapping("neutra_mcmc", "nuts_options", options)
    known = [name for name in inspect.signature(NUTS).parameters if name not in ("model", "potential_fn")]
    for name in options:
        if name not in known:
            raise TypeError(f"neutra_mcmc: NUTS has no option {name!r}. Options: {', '.join(known)}")
    options = NUTS_OPTIONS | options
    check_number("neutra_mcmc", "target_accept_prob", options["target_accept_prob"], 0, 1)
    return options


def _check_guide(guide: object, args: Args, kwargs: Kwargs) -> None:
    """Refuse a guide that has no transform, and run one that has never run."""
    advice = "use one of AutoIAF, AutoPlanar, ..., AutoMultivariateNormal or AutoDiagonalNormal"
    if not isinstance(guide, AutoContinuous):
        raise TypeError(f"neutra_mcmc: {type(guide).__name__} has no transform to one latent vector; {advice}")
    if guide.prototype_trace is None:
        with torch.no_grad():
            guide(*args, **kwargs)
    try:
        guide.get_base_dist(), guide.get_transform()
    except (NotImplementedError, TypeError) as error:
        raise TypeError(
            f"neutra_mcmc: {type(guide).__name__} has no transform that is independent of the data; {advice}"
        ) from error


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Turn off the gradients of a module's parameters for a block."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _recorded_potential(program: Program) -> Callable[[Values], Tensor] | None:
    """Record the negative log density of the noise with its gradient; return ``None`` where that is impossible."""
    guide = cast(AutoContinuous, program.guide)
    log_density, base = program.log_density, guide.get_base_dist()

    def value_and_gradient(noise: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            noise = noise.detach().requires_grad_()
            transform = guide.get_transform()
            z = transform(noise)
            value = -(log_density.at_once(z[None])[0] + transform.log_abs_det_jacobian(noise, z))
            (gradient,) = torch.autograd.grad(value, noise)
        return value.detach(), gradient

    try:
        # With a single particle, a model that does not broadcast may give the right density by chance.
        log_density.check(torch.stack([guide.get_transform()(base.sample()) for _ in range(3)]))
        replay = Replay(record(value_and_gradient, base.sample(), check=[base.sample()]))
    except (NotVectorizedError, NotRecordedError, torch.linalg.LinAlgError):
        return None
    return lambda sites: _Potential.apply(sites[NOISE], replay)


class _Potential(torch.autograd.Function):
    """Attach a gradient that was computed with the value."""

    @staticmethod
    def forward(ctx: Any, noise: Tensor, replay: Replay) -> Tensor:
        value, gradient = replay(noise)
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return upstream * gradient, None


class _Transport(NeuTraReparam):
    """Pyro's reparametrization, with the flow's Jacobian counted once.

    Pyro adds the Jacobian to the log density of every element of the first latent site: once per member of a plate.
    """

    def apply(self, msg: Site) -> Site:  # type: ignore[override]
        name, fn = msg["name"], msg["fn"]
        assert self.guide.prototype_trace is not None
        if name not in self.guide.prototype_trace.nodes:
            return {"fn": fn, "value": msg["value"], "is_observed": msg["is_observed"]}
        if msg["is_observed"]:
            raise NotImplementedError(f"neutra_mcmc: site {name!r} is latent in the guide but observed in the model")
        if name not in self.x_unconstrained:
            self._draw()
        _, unconstrained = self.x_unconstrained.pop(name)
        transform = biject_to(fn.support)
        value = transform(unconstrained)
        ladj = transform.log_abs_det_jacobian(unconstrained, value)
        ladj = sum_rightmost(ladj, ladj.dim() - value.dim() + fn.event_dim)
        density = dist.Delta(value, fn.log_prob(value) + ladj, event_dim=fn.event_dim)
        return {"fn": density, "value": value, "is_observed": True}

    def _draw(self) -> None:
        """Draw the noise of all sites, outside the model's plates, and add the Jacobian of the flow."""
        transform = self.guide.get_transform()
        with ExitStack() as stack:
            for plate in self.guide.plates.values():
                stack.enter_context(block_plate(dim=plate.dim, strict=False))
            noise = pyro.sample(NOISE, self.guide.get_base_dist().mask(False))
            latent = transform(noise)
            pyro.factor(f"{NOISE}_ladj", transform.log_abs_det_jacobian(noise, latent).sum())
        self.x_unconstrained = {site["name"]: (site, value) for site, value in self.guide._unpack_latent(latent)}


def _run_chain(
    kernel: NUTS, start: Values | None, num_samples: int, warmup_steps: int, progress: bool, args: Args, kwargs: Kwargs
) -> Values:
    """Return the noise of all draws, and the variables of ``sample_stats`` except ``lp``, each (S, ...)."""
    acceptance: list[float] = []
    step_size: list[float] = []
    divergences: set[int] = set()

    def add_statistics(kernel: NUTS, params: object, stage: str, step: int) -> None:
        if stage.startswith("Sample"):
            acceptance.append(kernel._mean_accept_prob)
            step_size.append(float(kernel.step_size))
            divergences.update(kernel._divergences)

    mcmc = MCMC(
        kernel,
        num_samples=num_samples,
        warmup_steps=warmup_steps,
        initial_params=start,
        disable_progbar=not progress,
        hook_fn=add_statistics,
    )
    mcmc.run(*args, **kwargs)
    count = torch.arange(1, num_samples + 1, dtype=torch.float64)
    total = count * torch.tensor(acceptance, dtype=torch.float64)  # NUTS reports the running mean
    return {
        NOISE: mcmc.get_samples()[NOISE],
        "diverging": torch.tensor([draw in divergences for draw in range(num_samples)]),
        "acceptance_rate": total.diff(prepend=total.new_zeros(1)).clamp(0, 1),
        "step_size": torch.tensor(step_size, dtype=torch.float64),
    }


def _export(program: Program, guide: AutoContinuous, chains: Sequence[Values]) -> InferenceData:
    """Export the draws of all chains with the groups that ArviZ's functions need."""
    stats = {name: torch.cat([chain[name] for chain in chains]) for name in chains[0]}
    with evaluation():
        draws = program.log_density.constrain(guide.get_transform()(stats.pop(NOISE)))
        log_p = score_model(program, draws, program.default_chunk_size)
    log_w = torch.zeros_like(log_p)
    weighted = WeightedDraws(draws, log_p, log_p, log_w, model_mode=program.mode, model_note=program.mode_note)
    origin, stats = "NUTS in the guide's noise", stats | {"lp": log_p}
    return export_draws(program, weighted, origin, sample_stats=stats, num_chains=len(chains))
