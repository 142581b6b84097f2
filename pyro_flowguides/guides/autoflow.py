"""Autoguides with a flow posterior over all latent variables."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from torch import Tensor
from torch.distributions import biject_to

from pyro_flowguides.flows import Builder, get_flow
from pyro_flowguides.guides import structure
from pyro_flowguides.guides.density_delta import WithDensityDeltas
from pyro_flowguides.guides.initialization import InitialValue, check_finite
from pyro_flowguides.guides.lazy import LazyGuide
from pyro_flowguides.guides.param_names import bind
from pyro_flowguides.guides.path_distribution import PathDistribution
from pyro_flowguides.transforms import Compose, Flow, HeavyTail, LowerTriangularAffine, LowRankAffine
from pyro_flowguides.transforms.families.low_rank_affine import stretch

__all__ = ["AutoFlow", "AutoIAF", "AutoMAF", "AutoNICE", "AutoPlanar", "AutoRadial", "AutoRealNVP", "AutoSylvester"]

#: Up to this many latent dimensions the final affine map is full-rank; beyond, diagonal and low-rank.
FULL_RANK_LIMIT = 300
#: Draws behind :meth:`AutoFlow.median` and :meth:`AutoFlow.quantiles`.
QUANTILE_DRAWS = 4096


class AutoFlow(LazyGuide, AutoContinuous):
    r"""A flow posterior for any model with continuous latent variables: put it where ``AutoNormal`` stands.

    All latent variables, mapped to unconstrained space and stacked, are

    .. math:: z = \ell + S\, t_\lambda(f_\phi(\varepsilon)), \qquad \varepsilon \sim N(0, I), \qquad
        \log q(z) = \log N(\varepsilon) - \log|\det J_f| - \log|\det J_t| - \log|\det S|

    with a flow f that starts at the identity, a tail weight :math:`\lambda` of every coordinate that is learned
    (:class:`~pyro_flowguides.transforms.HeavyTail`), a location :math:`\ell` that starts at ``init_loc_fn`` and a scale
    S that starts at ``init_scale``: full-rank (lower triangular) up to 300 dimensions, beyond them a diagonal with a
    stretch along 20 directions (:class:`~pyro_flowguides.transforms.LowRankAffine`). The guide thus starts where
    :class:`~pyro.infer.autoguide.AutoMultivariateNormal` does, and contains it up to 300 dimensions.

    It works wherever Pyro's autoguides do. Parameters are created when the model is first run: by the first call, by
    :meth:`setup`, or on first access if the model needs no arguments. Their dtype and device are those of the model's
    latent variables unless the guide was moved or converted before. Two guides in one process are independent; values
    loaded into Pyro's parameter store reach a new guide of the same class and options.

    Args:
        model: a Pyro model.
        flow: a name in :data:`~pyro_flowguides.flows.FLOWS`, or a builder ``(input_dim, **options) -> Flow``.
        init_loc_fn: where to start, one of Pyro's initialization functions. Improper priors start at 0 unconstrained.
        init_scale: initial standard deviation of every unconstrained coordinate, positive.
        path_gradient: follow the path gradient (:class:`~pyro_flowguides.guides.path_distribution.PathDistribution`), which
            has less variance near the solution and none at it, but more far from it: for refining a fit.
        **flow_options: passed to the builder, for example ``depth`` or ``hidden_dims``.

    Raises:
        ValueError: for an unknown flow, a discrete latent site, a latent site in a subsampled plate, a support that
            depends on another latent site, a structure that changes, or an initial value that is not finite.
        RuntimeError: if the model has no latent site, or parameters are asked for that only a model run can create.

    References:
        D. Rezende, S. Mohamed (2015). Variational inference with normalizing flows. arXiv:1505.05770.
        A. Kucukelbir et al. (2017). Automatic differentiation variational inference. arXiv:1603.00788.

    Example:
        >>> import pyro, pyro.distributions as dist, pyro_flowguides as fg
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x**2, 1.0).expand([2]).to_event(1))
        >>> guide = fg.AutoFlow(model, "iaf", depth=2)
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
        >>> loss = svi.step()
        >>> sorted(guide())
        ['x', 'y']
    """

    learned = "transform"
    transient = ("_init", "_builder")

    def __init__(
        self,
        model: Callable[..., Any],
        flow: str | Builder,
        *,
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float = 0.1,
        path_gradient: bool = False,
        **flow_options: Any,
    ) -> None:
        if not init_scale > 0:
            raise ValueError(f"{type(self).__name__}: init_scale must be positive, got {init_scale}")
        self._init = InitialValue(init_loc_fn)
        super().__init__(model, init_loc_fn=self._init)
        self._builder = get_flow(flow)
        self._init_scale, self._flow_options = init_scale, flow_options
        self._distribution = PathDistribution if path_gradient else dist.TransformedDistribution

    # -- setting up ----------------------------------------------------------------------------------------------------

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        with structure.isolated():
            super()._setup_prototype(*args, **kwargs)
        owner, prototype = type(self).__name__, self._prototype
        structure.check_plates(owner, prototype)
        structure.check_static(owner, self.model, self._prototype_hide_fn, prototype, args, kwargs)
        self._signatures.add(structure.call_signature(args, kwargs))
        self._observed = structure.observed_sites(self.model, args, kwargs)
        built = self._built
        if built is None:
            for name, site in structure.latent_sites(prototype):
                check_finite(owner, name, biject_to(site["fn"].support).inv(site["value"]), site["value"])
            self._create(self._requested(self._init_loc()))
        elif built.input_dim != self.latent_dim:
            raise ValueError(
                f"{owner}: the loaded parameters are for {built.input_dim} latent dimensions, the model has "
                f"{self.latent_dim}"
            )

    def _create(self, loc: Tensor) -> None:
        dim = loc.shape[0]
        flow = self._builder(dim, **self._flow_options)
        if not isinstance(flow, Flow) or flow.input_dim != dim:
            raise ValueError(
                f"{type(self).__name__}: the builder must return an unconditional Flow with input_dim {dim}, "
                f"got {type(flow).__name__}({getattr(flow, 'input_dim', '')})"
            )
        affine = LowerTriangularAffine if dim <= FULL_RANK_LIMIT else LowRankAffine
        self.transform = Compose([flow, HeavyTail(dim), affine(dim, loc=loc, scale=self._init_scale)]).to(loc)

    def _compare(self, args: Any, kwargs: Any) -> None:
        trace = structure.latent_trace(self.model, self._prototype_hide_fn, args, kwargs)
        owner, when = type(self).__name__, "for these arguments"
        structure.check_same_structure(owner, self._prototype, trace, when, self._observed)

    def _prepared(self, model: Callable[..., Any]) -> tuple[Callable[..., Any], ...]:
        return (InitMessenger(self._init)(model) if self._init else model,)

    # -- the posterior -------------------------------------------------------------------------------------------------

    def get_base_dist(self) -> dist.Distribution:
        """The standard normal in ``latent_dim`` dimensions."""
        transform = self._ensure_parameters()
        zero = next(transform.parameters()).new_zeros(())
        return dist.Normal(zero, zero + 1).expand([transform.input_dim]).to_event(1)

    def get_transform(self, *args: Any, **kwargs: Any) -> Flow:
        """The whole map from the base to the unconstrained latent vector, as one flow."""
        if self._built is None and (args or kwargs):
            self.setup(*args, **kwargs)
        self._ensure_parameters()
        bind(self, "transform", self._token)
        transform: Flow = self.transform  # within a call this registers the parameters with Pyro, once
        return transform

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.TransformedDistribution:
        """The posterior over the unconstrained latent vector ``(latent_dim,)``."""
        transform = self.get_transform(*args, **kwargs)
        return self._distribution(self.get_base_dist(), [transform])

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw all latent sites; arguments are those of the model."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        else:
            self._check_structure(args, kwargs)
        with WithDensityDeltas():
            draws: dict[str, Tensor] = super().forward(*args, **kwargs)
        return draws

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The marginal median of every site, shaped like the site."""
        return {name: value[0] for name, value in self.quantiles([0.5], *args, **kwargs).items()}

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Marginal quantiles, taken in unconstrained space over 4,096 draws that are the same at every call.

        Args:
            quantiles: numbers in [0, 1].
            args, kwargs: the model's arguments.

        Returns:
            site -> tensor with a leading dimension for the quantiles.
        """
        self.setup(*args, **kwargs)
        transform = self.get_transform()
        loc = next(transform.parameters())
        noise = torch.randn(QUANTILE_DRAWS, self.latent_dim, generator=torch.Generator().manual_seed(0), device="cpu")
        draws, _ = transform.forward_and_ladj(noise.to(loc))
        levels = torch.as_tensor(quantiles, dtype=loc.dtype, device=loc.device)
        latents = marginal_quantiles(draws, levels)
        rows = [
            {site["name"]: biject_to(site["fn"].support)(value) for site, value in self._unpack_latent(latent)}
            for latent in latents
        ]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    @property
    def location(self) -> Tensor:
        """Where the affine part puts the origin, in unconstrained space ``(latent_dim,)``."""
        location: Tensor = self._ensure_parameters().parts[-1].loc
        return location

    def set_tails(self, weight: float) -> None:
        """Give all coordinates this tail weight, in (0, 1/2); for a guide whose affine part fits already."""
        tails: Any = self._ensure_parameters().parts[1]
        tails.set_weight(weight)

    @torch.no_grad()
    def set_affine(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Set the affine part: location ``(D,)`` and lower-triangular scale ``(D, D)`` with a positive diagonal.

        Beyond the full-rank limit only the diagonal of the scale is used.
        """
        affine: Any = self._ensure_parameters().parts[-1]
        scale = scale_tril.diagonal()
        if isinstance(affine, LowRankAffine):
            affine.assign(loc, scale, loc.new_zeros(len(loc), 0), loc.new_zeros(0))
            return
        affine.loc.copy_(loc)
        affine.log_scale.copy_(scale.log())
        rows, columns = torch.tril_indices(len(loc), len(loc), -1)
        affine.lower.copy_((scale_tril / scale[:, None])[rows, columns])

    @torch.no_grad()
    def set_low_rank_affine(self, loc: Tensor, scale: Tensor, directions: Tensor, log_stretch: Tensor) -> None:
        """Set the affine part to a diagonal scale after a stretch along some directions.

        Args:
            loc: location ``(D,)``.
            scale: diagonal scale ``(D,)``, positive.
            directions: orthonormal columns ``(D, K)``; beyond the full-rank limit K is at most 20.
            log_stretch: logarithms of the stretches ``(K,)``.
        """
        affine: Any = self._ensure_parameters().parts[-1]
        if isinstance(affine, LowRankAffine):
            affine.assign(loc, scale, directions, log_stretch)
            return
        root = stretch(torch.diag(scale), directions, log_stretch)
        self.set_affine(loc, torch.linalg.cholesky(root @ root.mT))

    # -- a module like any other ---------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
        loc = state_dict.get(f"{prefix}transform.parts.2.loc")
        if self._built is None and loc is not None:
            self._create(self._requested(torch.zeros_like(loc)))
        super()._load_from_state_dict(state_dict, prefix, *args)


def marginal_quantiles(draws: Tensor, levels: Tensor) -> Tensor:
    """Quantiles of each column of draws ``(S, K)``, in parts: torch.quantile takes at most 16 million numbers."""
    return torch.cat([torch.quantile(part, levels, dim=0) for part in draws.split(1024, -1)], -1)


class _NamedFlow(AutoFlow):
    """An :class:`AutoFlow` for one registered flow."""

    flow: ClassVar[str]

    def __init__(self, model: Callable[..., Any], **options: Any) -> None:
        super().__init__(model, self.flow, **options)


class AutoPlanar(_NamedFlow):
    """:class:`AutoFlow` with planar layers; options of :func:`~pyro_flowguides.flows.planar`."""

    flow = "planar"


class AutoRadial(_NamedFlow):
    """:class:`AutoFlow` with radial layers; options of :func:`~pyro_flowguides.flows.radial`."""

    flow = "radial"


class AutoSylvester(_NamedFlow):
    """:class:`AutoFlow` with Sylvester layers; options of :func:`~pyro_flowguides.flows.sylvester`."""

    flow = "sylvester"


class AutoIAF(_NamedFlow):
    """:class:`AutoFlow` with inverse autoregressive layers; options of :func:`~pyro_flowguides.flows.iaf`.

    It takes the place of Pyro's ``AutoIAFNormal`` and also understands that class's ``hidden_dim``, ``num_transforms``
    and ``stable`` (here ``hidden_dims``, ``depth`` and ``update="gated"``). That class's clips and ``sigmoid_bias`` are
    accepted with a warning: scales are bounded smoothly here.
    """

    flow = "iaf"
    #: Options of Pyro's class that have no counterpart.
    without_effect: ClassVar[frozenset[str]] = frozenset({"log_scale_min_clip", "log_scale_max_clip", "sigmoid_bias"})

    def __init__(
        self,
        model: Callable[..., Any],
        hidden_dim: Sequence[int] | None = None,
        init_loc_fn: Callable[..., Any] | None = None,
        num_transforms: int | None = None,
        *,
        stable: bool = False,
        **options: Any,
    ) -> None:
        for name in sorted(self.without_effect & options.keys()):
            warnings.warn(f"AutoIAF: {name} has no effect, scales are bounded smoothly", UserWarning, stacklevel=2)
            del options[name]
        given: dict[str, Any] = {"hidden_dims": hidden_dim, "init_loc_fn": init_loc_fn, "depth": num_transforms}
        given["update"] = "gated" if stable else None
        super().__init__(model, **{name: value for name, value in given.items() if value is not None}, **options)


class AutoMAF(_NamedFlow):
    """:class:`AutoFlow` with masked autoregressive layers; options of :func:`~pyro_flowguides.flows.maf`.

    Drawing is the slow direction of this flow: prefer :class:`AutoIAF` unless draws of other guides must be scored.
    """

    flow = "maf"


class AutoNICE(_NamedFlow):
    """:class:`AutoFlow` with additive couplings; options of :func:`~pyro_flowguides.flows.nice`."""

    flow = "nice"


class AutoRealNVP(_NamedFlow):
    """:class:`AutoFlow` with affine couplings; options of :func:`~pyro_flowguides.flows.realnvp`."""

    flow = "realnvp"
