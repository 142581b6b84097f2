"""Draws of a guide with their importance weights, on which all other diagnostics build."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_flowguides.diagnostics.widening import LOG_RATIO, Widening
from pyro_flowguides.programs.batched_run import RunMode
from pyro_flowguides.programs.program import Program
from pyro_flowguides.programs.program_runs import sample_guide, score_model
from pyro_flowguides.programs.running import evaluation
from pyro_flowguides.programs.types import Guide, Model, Values

__all__ = ["WeightedDraws", "log_weight", "log_weights", "point_sites", "weigh", "weigh_widened"]


@dataclass(frozen=True, eq=False)
class WeightedDraws:
    """Draws z of a guide q, with importance weights for the posterior p(z | x) ∝ p(x, z).

    The densities are in double precision on the CPU; the draws keep their device and type.

    Attributes:
        draws: constrained value of each latent site, without auxiliary sites: ``(S, *batch, *event)``.
        log_p: log p(x, z), shape (S,); −inf where the density is zero.
        log_q: log q(z), shape (S,).
        log_w: log p(x, z) − log q(z), shape (S,); −inf where p is zero, NaN where either density is undefined.
        point_sites: continuous sites where all draws are equal, so that the guide has no density.
        guide_note: the reason why the guide ran draw by draw; empty if it ran on many draws at once.
        model_mode: how the model ran.
        model_note: the reason why the model did not run under a plate of draws; empty if it did.
    """

    draws: Values
    log_p: Tensor
    log_q: Tensor
    log_w: Tensor
    point_sites: tuple[str, ...] = ()
    guide_note: str = ""
    model_mode: RunMode = RunMode.PLATE
    model_note: str = ""

    @property
    def num_samples(self) -> int:
        """Number of draws S."""
        return self.log_w.shape[0]

    @property
    def num_zero(self) -> int:
        """Number of draws with zero density under the model."""
        return int(self.log_w.isneginf().sum())

    @property
    def num_invalid(self) -> int:
        """Number of draws at which a density is NaN or infinite."""
        return int(self.log_w.isnan().sum())

    @property
    def vectorized(self) -> bool:
        """Whether both model and guide ran on many draws at once."""
        return not self.guide_note and self.model_mode is not RunMode.SINGLE


def log_weights(
    model: Model, guide: Guide, *args: object, num_samples: int = 1000, chunk_size: int | None = None, **kwargs: object
) -> WeightedDraws:
    r"""Draw from a guide and weigh the draws.

    .. math:: \log w_s = \log p(x, z_s) - \log q(z_s), \qquad z_s \sim q

    Model and guide run on many draws at once, under an outermost plate of draws. A few draws of each chunk, including
    the extreme ones, also run one by one. If the results differ (due to a sum over all dimensions or an index from the
    left), the model is mapped over the draws by ``torch.func.vmap``. If that fails (due to a branch on a value), or if
    the guide's results differ, runs are draw by draw, which is slow but correct.

    Discrete sites of the model that are marked for parallel enumeration and missing in the guide are summed out.
    Auxiliary sites of the guide enter log q with their density. That is correct if the other sites are a one-to-one
    function of them, as in Pyro's autoguides.

    Args:
        model, guide: a Pyro model and any Pyro guide for it.
        *args, **kwargs: arguments of both.
        num_samples: number of draws S.
        chunk_size: number of draws that run together; chosen by the size of the sites by default.

    Raises:
        ValueError: if S or the chunk size is not positive; if a plate is subsampled, since a weight needs the density
            of all the data; if model and guide differ in their latent sites.

    Cost: S runs of guide and model, in chunks of some tens of MB.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> _ = pyro.set_rng_seed(0)
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(2.0))
        >>> def guide():  # the exact posterior
        ...     pyro.sample("z", dist.Normal(1.0, 0.5**0.5))
        >>> weighted = log_weights(model, guide, num_samples=100)
        >>> evidence = dist.Normal(0.0, 2.0**0.5).log_prob(torch.tensor(2.0))
        >>> weighted.draws["z"].shape, torch.allclose(weighted.log_w.float(), evidence)
        (torch.Size([100]), True)
    """
    return weigh(Program.inspect(model, guide, args, kwargs), num_samples, chunk_size)


def weigh(program: Program, num_samples: int, chunk_size: int | None = None) -> WeightedDraws:
    """Draw from the guide of an inspected program and weigh the draws; see :func:`log_weights`."""
    return weigh_widened(program, Widening((), 1.0), num_samples, chunk_size)[0]


def weigh_widened(
    program: Program, widening: Widening, num_samples: int, chunk_size: int | None = None, *, from_widened: bool = False
) -> tuple[WeightedDraws, Tensor]:
    """Draw from a guide or from the widened guide, and weigh the draws.

    Args:
        program: the program.
        widening: the sites to widen and the factor.
        num_samples: number of draws S.
        chunk_size: number of draws that run together.
        from_widened: draw from the widened guide. ``log_q`` is the density of the guide itself in both cases.

    Returns:
        The weighted draws, and the log density of the widened guide minus that of the guide itself, (S,).
    """
    program.check_full_density()
    size = program.default_chunk_size if chunk_size is None else chunk_size
    for name, number in (("num_samples", num_samples), ("chunk_size", size)):
        if number < 1:
            raise ValueError(f"{name} must be positive, got {number}")
    if not program.latents:
        raise ValueError("model and guide have no latent site in common: there is nothing to weigh")
    with evaluation():
        widen = widening.handler(active=from_widened)
        drawn = sample_guide(program, num_samples, size, handlers=[widen], collect=widen.collect)
        log_p = score_model(program, drawn.values, size)
    log_ratio = drawn.extras[LOG_RATIO]
    log_q = drawn.log_density - log_ratio if from_widened else drawn.log_density
    constant = {name for name, value in drawn.values.items() if num_samples > 1 and bool((value == value[:1]).all())}
    weighted = WeightedDraws(
        draws=drawn.values,
        log_p=log_p,
        log_q=log_q,
        log_w=log_weight(log_p, log_q),
        point_sites=point_sites(program, constant),
        guide_note=drawn.note,
        model_note=program.mode_note,
        model_mode=program.mode,
    )
    return weighted, log_ratio


def log_weight(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return log p − log q: −inf where p is zero, NaN where either density is undefined."""
    is_valid = log_q.isfinite() & ~log_p.isnan() & ~log_p.isposinf()
    return torch.where(is_valid, log_p - log_q, torch.nan)


def point_sites(program: Program, constant: Collection[str]) -> tuple[str, ...]:
    """Return the continuous sites among those with constant draws, unless the model itself fixes them to a point."""
    return tuple(
        name
        for name, site in program.latents.items()
        if name in constant and not site.is_discrete and not site.is_point_mass
    )
