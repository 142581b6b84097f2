"""``neutra_mcmc``: NUTS in the space that a trained guide has straightened."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
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

from pyro_flowguides.diagnostics import WeightedDraws, arviz_compat
from pyro_flowguides.diagnostics.export import DatasetBuilder, collect_groups, describe_origin
from pyro_flowguides.inference.replay import NotRecordedError, Replay, record
from pyro_flowguides.programs.layout import NotVectorizedError
from pyro_flowguides.programs.model_runs import score_model
from pyro_flowguides.programs.program import Program
from pyro_flowguides.programs.running import evaluation

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["neutra_mcmc"]

#: The latent site behind all others.
NOISE = "_flowguides_noise"
#: What NUTS is given unless asked otherwise. Smaller steps than usual, for where the flow ends and a funnel goes on.
NUTS_OPTIONS: dict[str, Any] = {"init_strategy": init_to_sample, "target_accept_prob": 0.95}
#: Options of NUTS that concern a model and not a potential energy.
MODEL_OPTIONS = {"jit_compile", "init_strategy", "transforms", "max_plate_nesting"}


def neutra_mcmc(
    model: Callable[..., Any],
    guide: AutoContinuous,
    *args: Any,
    num_samples: int = 1000,
    warmup_steps: int = 500,
    num_chains: int = 1,
    nuts_options: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: bool = True,
    **kwargs: Any,
) -> Any:
    r"""Neural transport: NUTS on the posterior as the guide's flow sees it, brought back to the model's own sites.

    For a guide :math:`z = T(\varepsilon)` trained on :math:`p(z \mid x)`, NUTS draws from

    .. math:: \log p(\varepsilon \mid x) = \log p(x, T(\varepsilon)) + \log|\det J_T(\varepsilon)| + \text{const},

    which is close to N(0, I) where the guide is good, whatever funnels and scales the posterior has. The draws
    :math:`T(\varepsilon)` are those of the exact posterior, not of the guide: a poor guide costs time, not truth.

    Args:
        model: a Pyro model.
        guide: a trained autoguide with a transform: those of this package, ``AutoMultivariateNormal``,
            ``AutoDiagonalNormal``, ``AutoIAFNormal``. One that has never been run is set up and used as it starts.
        *args: arguments of model and guide.
        num_samples: number of draws per chain.
        warmup_steps: steps per chain that adapt the step size and the mass matrix, and are thrown away.
        num_chains: number of chains, drawn one after the other in this process, each from a draw of the guide.
        nuts_options: options of ``pyro.infer.NUTS``, such as ``target_accept_prob`` (0.95 by default) or
            ``jit_compile``.
        seed: of the chains; the global generator is restored afterwards.
        progress: show a progress bar for each chain.
        **kwargs: keyword arguments of model and guide.

    Returns:
        The groups of :func:`~pyro_flowguides.diagnostics.to_inference_data` (ArviZ 0.2x: ``InferenceData``, 1.x:
        ``DataTree``) with dimensions chain and draw; ``sample_stats`` holds ``diverging``, ``acceptance_rate``,
        ``step_size`` and ``lp``, the log joint density.

    Raises:
        TypeError: for a guide without a transform, such as ``AutoNormal`` or a hand-written one.
        ValueError: if a plate is subsampled, or a number of draws or chains is not positive.

    Cost:
        per leapfrog step one gradient of the model and of the flow (its fast direction for IAF), some milliseconds.

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
    for name, number in (("num_samples", num_samples), ("warmup_steps", warmup_steps), ("num_chains", num_chains)):
        if number < 1:
            raise ValueError(f"neutra_mcmc: {name} must be positive, got {number}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _check_guide(guide, args, kwargs)
        program = Program.inspect(model, guide, args, kwargs)
        program.check_full_density()
        options = NUTS_OPTIONS | dict(nuts_options or {})
        chains: list[_Chain] = []
        with _frozen(guide):
            asked = MODEL_OPTIONS & set(nuts_options or {})
            potential = None if asked else _recorded_potential(program)
            for _ in range(num_chains):
                kernel = NUTS(_Transport(guide).reparam(model) if potential is None else None, potential, **options)
                start = None if potential is None else {NOISE: guide.get_base_dist().sample()}
                chains.append(_Chain(num_samples).run(kernel, start, warmup_steps, progress, args, kwargs))
        return _export(program, guide, chains)


def _check_guide(guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a guide that is no transformed normal, and set up one that has never been run."""
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


def _latents(guide: AutoContinuous) -> Collection[str]:
    assert guide.prototype_trace is not None
    return guide.prototype_trace.nodes


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No gradients of a module's parameters within the block."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _recorded_potential(program: Program) -> Callable[[dict[str, Tensor]], Tensor] | None:
    """The negative log density of the noise with its gradient, recorded; ``None`` where that cannot be."""
    guide: Any = program.guide
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
        # A density that is right for a leading dimension of one only by chance is found out by three.
        log_density.check(torch.stack([guide.get_transform()(base.sample()) for _ in range(3)]))
        replay = Replay(record(value_and_gradient, base.sample(), check=[base.sample()]))
    except (NotVectorizedError, NotRecordedError, torch.linalg.LinAlgError):
        return None
    return lambda sites: _Potential.apply(sites[NOISE], replay)


class _Potential(torch.autograd.Function):
    """A value that comes with its gradient."""

    @staticmethod
    def forward(ctx: Any, noise: Tensor, replay: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        value, gradient = replay(noise)
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    def backward(ctx: Any, by_value: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return by_value * gradient, None


class _Transport(NeuTraReparam):
    """Pyro's reparametrization, with the flow's Jacobian counted once.

    Pyro adds it to the log density of the first latent site, element by element: once for each member of a plate.
    """

    def apply(self, msg: Any) -> Any:
        name, fn = msg["name"], msg["fn"]
        if name not in _latents(self.guide):
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
        """Draw the noise behind all sites, outside the model's plates, and count the Jacobian of the flow."""
        transform = self.guide.get_transform()
        with ExitStack() as stack:
            for plate in self.guide.plates.values():
                stack.enter_context(block_plate(dim=plate.dim, strict=False))
            noise = pyro.sample(NOISE, self.guide.get_base_dist().mask(False))
            latent = transform(noise)
            pyro.factor(f"{NOISE}_ladj", transform.log_abs_det_jacobian(noise, latent).sum())
        self.x_unconstrained = {site["name"]: (site, value) for site, value in self.guide._unpack_latent(latent)}


@dataclass
class _Chain:
    """One chain: its noise, and what NUTS says of every draw."""

    num_samples: int
    noise: Tensor = field(init=False)
    mean_acceptance: list[float] = field(default_factory=list)
    step_size: list[float] = field(default_factory=list)
    divergences: set[int] = field(default_factory=set)

    def run(
        self,
        kernel: NUTS,
        start: dict[str, Tensor] | None,
        warmup_steps: int,
        progress: bool,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> _Chain:
        mcmc = MCMC(
            kernel,
            num_samples=self.num_samples,
            warmup_steps=warmup_steps,
            initial_params=start,
            disable_progbar=not progress,
            hook_fn=self._note,
        )
        mcmc.run(*args, **kwargs)
        self.noise = mcmc.get_samples()[NOISE]
        return self

    def _note(self, kernel: NUTS, params: Any, stage: str, step: int) -> None:
        if stage.startswith("Sample"):
            self.mean_acceptance.append(kernel._mean_accept_prob)
            self.step_size.append(float(kernel.step_size))
            self.divergences.update(kernel._divergences)

    @property
    def stats(self) -> dict[str, Tensor]:
        """What goes into ``sample_stats``, each ``(S,)``."""
        count = torch.arange(1, self.num_samples + 1, dtype=torch.float64)
        total = count * torch.tensor(self.mean_acceptance, dtype=torch.float64)  # NUTS keeps the mean so far
        return {
            "diverging": torch.tensor([draw in self.divergences for draw in range(self.num_samples)]),
            "acceptance_rate": total.diff(prepend=total.new_zeros(1)).clamp(0, 1),
            "step_size": torch.tensor(self.step_size, dtype=torch.float64),
        }


# -- export ------------------------------------------------------------------------------------------------------------


def _export(program: Program, guide: AutoContinuous, chains: Sequence[_Chain]) -> Any:
    """The draws of all chains with all that ArviZ's functions ask for."""
    num_samples = chains[0].num_samples
    with evaluation():
        draws = program.log_density.constrain(guide.get_transform()(torch.cat([chain.noise for chain in chains])))
        scores = score_model(program, draws, program.default_chunk_size)
    log_p, none = scores.log_p, torch.zeros_like(scores.log_p)
    weighted = WeightedDraws(draws, log_p, log_p, none, model_mode=scores.mode, model_note=scores.note)
    groups, notes = collect_groups(program, weighted)
    stats = {name: torch.cat([chain.stats[name] for chain in chains]) for name in chains[0].stats}
    groups["sample_stats"] = stats | {"lp": log_p}
    attrs = {**describe_origin(program, num_samples, resampled=False), "draws": "NUTS in the guide's noise", **notes}
    builder = DatasetBuilder(program, {})
    datasets = {
        group: _by_chain(builder.dataset(group, values, attrs), len(chains))
        for group, values in groups.items()
        if values
    }
    return arviz_compat.build_tree(datasets, attrs)


def _by_chain(dataset: xr.Dataset, num_chains: int) -> xr.Dataset:
    """One chain that holds the draws of all, cut into as many."""
    if "draw" not in dataset.dims or num_chains == 1:
        return dataset
    size = dataset.sizes["draw"] // num_chains
    concat = importlib.import_module("xarray").concat
    parts = [
        dataset.isel(draw=slice(chain * size, (chain + 1) * size)).assign_coords(chain=[chain], draw=np.arange(size))
        for chain in range(num_chains)
    ]
    joined: xr.Dataset = concat(parts, dim="chain")
    return joined
