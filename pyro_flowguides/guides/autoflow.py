"""The autoguide with a flow posterior over all latent variables."""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.guides import prototype_hide_fn
from pyro.infer.autoguide.initialization import init_to_median
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import biject_to

from pyro_flowguides.flows import Builder, check_options, get_flow
from pyro_flowguides.guides.distributions import DensityDeltaMessenger, PathDistribution
from pyro_flowguides.guides.lazy import LazyGuide, check_finite
from pyro_flowguides.guides.param_names import claim_names
from pyro_flowguides.nn.arguments import check_number, check_tensor, describe
from pyro_flowguides.programs import structure
from pyro_flowguides.programs.sites import latent_sites
from pyro_flowguides.programs.types import Args, Kwargs, Model, Site, Values
from pyro_flowguides.transforms import Compose, Flow, HeavyTail, LowerTriangularAffine, LowRankAffine
from pyro_flowguides.transforms.algebra import stretch
from pyro_flowguides.transforms.conditioner import set_gain

__all__ = ["AutoFlow", "RegisteredFlowGuide", "check_quantiles", "marginal_quantiles"]

#: Up to this number of latent dimensions the final affine map is full-rank; beyond, diagonal and low-rank.
FULL_RANK_LIMIT = 300
#: Gain of the flow's networks before a warm start: small, so that plain SVI is stable from any start.
CAUTIOUS_GAIN = 0.05
#: Number of draws behind :meth:`AutoFlow.median` and :meth:`AutoFlow.quantiles`.
NUM_QUANTILE_SAMPLES = 4096


class AutoFlow(LazyGuide, AutoContinuous):
    r"""A flow posterior for any model with continuous latent variables; use it in place of ``AutoNormal``.

    All latent variables, mapped to unconstrained space and stacked, are

    .. math:: z = \ell + S\, t_\lambda(f_\phi(\varepsilon)), \qquad \varepsilon \sim N(0, I), \qquad
        \log q(z) = \log N(\varepsilon) - \log|\det J_f| - \log|\det J_t| - \log|\det S|

    with a flow f that starts at the identity, a learned tail weight :math:`\lambda` of every coordinate
    (:class:`~pyro_flowguides.transforms.HeavyTail`), a location :math:`\ell` that starts at ``init_loc_fn`` and a scale
    S that starts at ``init_scale``. The scale is full-rank (lower triangular) up to 300 dimensions; beyond, it is a
    diagonal with a stretch along 20 directions (:class:`~pyro_flowguides.transforms.LowRankAffine`). The guide thus
    starts where :class:`~pyro.infer.autoguide.AutoMultivariateNormal` does, and contains it up to 300 dimensions.

    The networks of f start at a small gain, so that plain SVI is stable from any start; a warm start of
    :func:`~pyro_flowguides.fit` opens it (:class:`~pyro_flowguides.transforms.conditioner.ConditionerFlow`).

    It works wherever Pyro's autoguides do. Parameters are created when the model is first run: by the first call, by
    :meth:`setup`, or on first access if the model needs no arguments. They have the dtype and device of the model's
    latent variables, unless the guide was moved or converted before. Two guides in one process are independent. Values
    loaded into Pyro's parameter store reach a new guide of the same class and options.

    Args:
        model: a Pyro model.
        flow: a name in :data:`~pyro_flowguides.flows.FLOWS`, or a builder ``(input_dim, **options) -> Flow``.
        init_loc_fn: where to start, one of Pyro's initialization functions. Improper priors start at 0 unconstrained.
        init_scale: initial standard deviation of every unconstrained coordinate, positive.
        path_gradient: follow the path gradient
            (:class:`~pyro_flowguides.guides.distributions.PathDistribution`). It has less variance near the
            solution and none at it, but more far from it: use it to refine a fit.
        **flow_options: options of the builder, for example ``depth`` or ``hidden_dims``.

    Raises:
        ValueError: for an unknown flow, a discrete latent site, a latent site in a subsampled plate, a support that
            depends on another latent site, a structure that changes, or an initial value that is not finite.
        TypeError: for an option that the builder does not take.
        RuntimeError: if the model has no latent site, or parameters are requested that only a run of the model can
            create.

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

    module_name = "transform"
    setup_only = ("_builder",)
    #: Latent sites and their shapes that parameters were loaded for; ``None`` if none were loaded.
    _loaded_sites: dict[str, tuple[int, ...]] | None = None

    def __init__(
        self,
        model: Model,
        flow: str | Builder,
        *,
        init_loc_fn: Callable[..., object] = init_to_median,
        init_scale: float = 0.1,
        path_gradient: bool = False,
        **flow_options: object,
    ) -> None:
        owner = type(self)
        super().__init__(model, init_loc_fn, init_scale)
        self._builder, self._flow_options = get_flow(flow), flow_options
        check_options(owner.__name__, self._builder, flow_options, others=inspect.signature(owner).parameters)
        self._distribution = PathDistribution if path_gradient else dist.TransformedDistribution

    def _prototype_hide_fn(self, msg: Site) -> bool:
        """Hide what is not latent; of a model run to predict also the data, which a loaded state does not name."""
        return prototype_hide_fn(msg) or (self._loaded_sites is not None and msg["name"] not in self._loaded_sites)

    def _create_from_prototype(self, args: Args, kwargs: Kwargs) -> None:
        owner, prototype = type(self).__name__, self._prototype
        structure.check_plates(owner, prototype)
        structure.check_static(owner, self.model, self._prototype_hide_fn, prototype, args, kwargs)
        transform = self._module_or_none
        if transform is None:
            for name, site in latent_sites(prototype):
                check_finite(owner, name, biject_to(site["fn"].support).inv(site["value"]), site["value"])
            self._create(self._convert_as_requested(self._init_loc()))
        if self._loaded_sites is not None:
            self._check_loaded_sites(self._loaded_sites)
        if transform is not None and transform.input_dim != self.latent_dim:
            raise ValueError(
                f"{owner}: the loaded parameters are for {transform.input_dim} latent dimensions, the model has "
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
        set_gain(flow, CAUTIOUS_GAIN)
        self.transform = Compose([flow, HeavyTail(dim), affine(dim, loc=loc, scale=self._init_scale)]).to(loc)

    def _compare_structure(self, trace: Trace) -> None:
        owner, when = type(self).__name__, "for these arguments"
        structure.check_same_structure(owner, self._prototype, trace, when, self._observed)

    def get_base_dist(self) -> dist.Distribution:
        """Return the standard normal in ``latent_dim`` dimensions."""
        transform = self._ensure_parameters()
        zero = next(transform.parameters()).new_zeros(())
        return dist.Normal(zero, zero + 1).expand([transform.input_dim]).to_event(1)

    def get_transform(self, *args: object, **kwargs: object) -> Flow:
        """Return the whole map from the base to the unconstrained latent vector, as one flow."""
        if self._module_or_none is None and (args or kwargs):
            self.setup(*args, **kwargs)
        self._ensure_parameters()
        claim_names(self, "transform", self._owner)
        transform: Flow = self.transform  # within a Pyro program, reading it registers the parameters once
        return transform

    def get_posterior(self, *args: object, **kwargs: object) -> dist.TransformedDistribution:
        """Return the posterior over the unconstrained latent vector ``(latent_dim,)``."""
        transform = self.get_transform(*args, **kwargs)
        return self._distribution(self.get_base_dist(), [transform])

    def forward(self, *args: object, **kwargs: object) -> Values:
        """Draw all latent sites; the arguments are those of the model."""
        self._prepare(args, kwargs)
        with DensityDeltaMessenger():
            values: Values = super().forward(*args, **kwargs)
        return values

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: object, **kwargs: object) -> Values:
        """Return marginal quantiles, estimated in unconstrained space from 4,096 draws, the same at every call.

        Args:
            quantiles: numbers in [0, 1].
            args, kwargs: the model's arguments.

        Returns:
            site -> tensor with a leading dimension for the quantiles.
        """
        check_quantiles(type(self).__name__, quantiles)
        self.setup(*args, **kwargs)
        transform = self.get_transform()
        loc = next(transform.parameters())
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(NUM_QUANTILE_SAMPLES // 2, self.latent_dim, generator=generator, device="cpu")
        # Pairs of opposite sign: the median of a guide that is still Gaussian is exactly its location.
        draws, _ = transform.forward_and_ladj(torch.cat([noise, -noise]).to(loc))
        levels = torch.as_tensor(quantiles, dtype=loc.dtype, device=loc.device)
        rows = [
            {site["name"]: biject_to(site["fn"].support)(value) for site, value in self._unpack_latent(latent)}
            for latent in marginal_quantiles(draws, levels)
        ]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _parts(self) -> tuple[Flow, HeavyTail, LowerTriangularAffine | LowRankAffine]:
        flow, tails, affine = cast("Compose", self._ensure_parameters()).parts
        return cast("tuple[Flow, HeavyTail, LowerTriangularAffine | LowRankAffine]", (flow, tails, affine))

    @property
    def location(self) -> Tensor:
        """The location of the affine part in unconstrained space ``(latent_dim,)``."""
        return self._parts()[2].loc

    def set_gain(self, gain: float) -> None:
        """Set the gain of the flow's networks, in (0, 1); near 1 for a guide that starts close to the posterior."""
        set_gain(self._parts()[0], gain)

    def set_tail_weight(self, weight: float) -> None:
        """Set the tail weight of all coordinates, in (0, 1/2); for a guide whose affine part fits already."""
        self._parts()[1].set_weight(weight)

    @torch.no_grad()
    def set_affine(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Set the affine part: location ``(D,)`` and lower-triangular scale ``(D, D)`` with a positive diagonal.

        Beyond the full-rank limit only the diagonal of the scale is used.
        """
        affine, owner = self._parts()[2], type(self).__name__
        for name, value in (("loc", loc), ("scale_tril", scale_tril)):
            check_tensor(owner, name, value)
        dim, shapes = affine.input_dim, (tuple(loc.shape), tuple(scale_tril.shape))
        if shapes != ((dim,), (dim, dim)):
            raise ValueError(
                f"{owner}: expected loc ({dim},) and scale_tril ({dim}, {dim}), got {shapes[0]} and {shapes[1]}"
            )
        scale = scale_tril.diagonal()
        if not bool((scale > 0).all()):
            raise ValueError(f"{owner}: scale_tril must have a positive diagonal, got {scale.min():.3g}")
        if isinstance(affine, LowRankAffine):
            affine.assign(loc, scale, loc.new_zeros(len(loc), 0), loc.new_zeros(0))
            return
        affine.loc.copy_(loc)
        affine.log_scale.copy_(scale.log())
        rows, columns = torch.tril_indices(len(loc), len(loc), -1)
        affine.lower.copy_((scale_tril / scale[:, None])[rows, columns])

    @torch.no_grad()
    def set_low_rank_affine(self, loc: Tensor, scale: Tensor, directions: Tensor, log_stretch: Tensor) -> None:
        """Set the affine part to a stretch along some directions followed by a diagonal scale.

        Args:
            loc: location ``(D,)``.
            scale: diagonal scale ``(D,)``, positive.
            directions: orthonormal columns ``(D, K)``; beyond the full-rank limit K is at most 20.
            log_stretch: logarithms of the stretches ``(K,)``.
        """
        affine = self._parts()[2]
        if isinstance(affine, LowRankAffine):
            affine.assign(loc, scale, directions, log_stretch)
            return
        if not bool((scale > 0).all()):
            raise ValueError(f"{type(self).__name__}: scale must be positive, got {scale.min():.3g}")
        root = stretch(torch.diag(scale), directions, log_stretch)
        self.set_affine(loc, torch.linalg.cholesky(root @ root.mT))

    def get_extra_state(self) -> Tensor:
        """Return names and shapes of the sites as a tensor of bytes: other values in a state dict break programs."""
        shapes = (self._loaded_sites or {}) if self.prototype_trace is None else self._site_shapes()
        return torch.tensor(list(json.dumps(shapes).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Take over the names and shapes of the sites that loaded parameters belong to.

        Raises:
            ValueError: if the guide was set up for other sites.
        """
        sites = {name: tuple(shape) for name, shape in json.loads(bytes(state.tolist())).items()}
        if sites and self.prototype_trace is not None:
            self._check_loaded_sites(sites)
        self._loaded_sites = sites or None

    def _check_loaded_sites(self, loaded: Mapping[str, tuple[int, ...]]) -> None:
        now = self._site_shapes()
        if list(now.items()) != list(loaded.items()):
            raise ValueError(
                f"{type(self).__name__}: the loaded parameters are for the latent sites {_list_shapes(loaded)}; the "
                f"model has {_list_shapes(now)}. Load them into a guide of the model they were trained for."
            )

    def _site_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(site["value"].shape) for name, site in latent_sites(self._prototype)}

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: Mapping[str, object],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        loc = state_dict.get(f"{prefix}transform.parts.2.loc")
        if self._module_or_none is None and loc is not None:
            self._create(self._convert_as_requested(torch.zeros_like(loc)))
        others = local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        try:
            super()._load_from_state_dict(state_dict, prefix, *others)
        except ValueError as error:  # of other sites
            error_msgs.append(str(error))
        if f"{prefix}_extra_state" in missing_keys:  # states saved by earlier versions have none
            missing_keys.remove(f"{prefix}_extra_state")


def _list_shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name!r} {shape}" for name, shape in shapes.items()) or "none"


def check_quantiles(owner: str, quantiles: Sequence[float] | Tensor) -> None:
    """Refuse quantiles that are not a sequence of numbers in [0, 1]."""
    if isinstance(quantiles, str) or not hasattr(quantiles, "__iter__") or getattr(quantiles, "ndim", 1) == 0:
        raise TypeError(f"{owner}: quantiles must be a sequence, such as [0.05, 0.5, 0.95], got {describe(quantiles)}")
    if len(quantiles) == 0:
        raise ValueError(f"{owner}: quantiles must name at least one level, such as [0.5], got none")
    for level in quantiles:
        check_number(owner, "each quantile", level, 0, 1, inclusive=True)


def marginal_quantiles(draws: Tensor, levels: Tensor) -> Tensor:
    """Return the quantiles of each column of draws ``(S, K)``, ``(len(levels), K)``.

    Columns are taken in parts, because ``torch.quantile`` accepts at most 16 million numbers.
    """
    return torch.cat([torch.quantile(part, levels, dim=0) for part in draws.split(1024, -1)], -1)


class RegisteredFlowGuide(AutoFlow):
    """An :class:`AutoFlow` whose flow is fixed: the base of the autoguides of registered flows.

    Args:
        model: a Pyro model.
        **options: options of :class:`AutoFlow` and of the flow's builder.
    """

    #: Name of the flow in :data:`~pyro_flowguides.flows.FLOWS`.
    flow: ClassVar[str]

    def __init__(self, model: Model, **options: Any) -> None:
        super().__init__(model, self.flow, **options)
