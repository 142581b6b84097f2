"""The autoguide for models with a plate of local latent variables, amortized over the data."""

import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import init_to_median
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from pyro_flowguides.flows import Builder, check_options, get_flow
from pyro_flowguides.guides.autoflow import AutoFlow, check_quantiles, marginal_quantiles
from pyro_flowguides.guides.data_plate import DataPlate, LocalSite, encode_data, find_data_plate
from pyro_flowguides.guides.distributions import PathDistribution
from pyro_flowguides.guides.flow_posterior import FlowPosterior, LocalPosterior, local_path_log_prob
from pyro_flowguides.guides.lazy import LazyGuide
from pyro_flowguides.guides.param_names import claim_names
from pyro_flowguides.nn.arguments import check_callable, check_count, describe
from pyro_flowguides.programs import structure
from pyro_flowguides.programs.running import isolated
from pyro_flowguides.programs.sites import latent_sites
from pyro_flowguides.programs.types import Args, Kwargs, Model, Site, Values

__all__ = ["AutoAmortizedFlow"]

#: Number of draws behind :meth:`AutoAmortizedFlow.median` and :meth:`AutoAmortizedFlow.quantiles`.
NUM_QUANTILE_SAMPLES = 1024
#: Number of rows (draws times data) that :meth:`AutoAmortizedFlow.sample_all` computes in one pass.
ROWS_PER_PASS = 2**18


class LocalModule(nn.Module):
    """The user's encoder, and the posterior of the local variables, which exists once the model has been run."""

    posterior: LocalPosterior | None

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.posterior = None


class AutoAmortizedFlow(LazyGuide):
    r"""A flow posterior for models with a plate of local latent variables, subsampled or not.

    .. math:: q(g, z \mid x) = q(g) \prod_{i=1}^{N} q(z_i \mid h(x_i), g)

    The variables :math:`z_i` of all sites in the plate, mapped to unconstrained space and stacked per datum, have a
    :class:`~pyro_flowguides.guides.FlowPosterior`. Its location, scale and context are functions of the features of the
    datum, computed by the ``encoder``, and of the deviation of the global variables g from their location. The sites
    outside the plate have an :class:`~pyro_flowguides.guides.AutoFlow`. Local variables are independent given g in the
    exact posterior too, so the family contains the exact posterior if encoder and flows are rich enough. Without the
    dependence on g, the posterior of g would come out too narrow however good the other parts are.

    **The plate.** In every call the guide looks up the plate that the model creates for these arguments, and creates
    the same one: of the same size, subsampled to the same size, or with the indices that the model passes as
    ``subsample``. The model then uses the guide's indices, as Pyro's models always do. So the model may take all data
    and subsample them itself, or take a minibatch, and may do either from call to call.

    **The encoder** is called with the model's arguments. Tensors among them with one row for each of the N data are cut
    down to the rows of the subsample. It returns the features ``(B, C)``, one row for each of the B data in the
    subsample. If it takes other arguments, or data have another layout, pass ``inputs``: a function of the indices
    ``(B,)`` and the model's arguments that returns the encoder's argument or a tuple of its arguments.

    Further plates inside or outside the plate of the data are allowed if they are not subsampled; the value of a site
    for one datum is then an array. Otherwise the guide behaves as :class:`~pyro_flowguides.guides.AutoFlow`: parameters
    are created when the model is first run, two guides are independent, and the initial posterior is at ``init_loc_fn``
    with standard deviation ``init_scale``.

    Args:
        model: a Pyro model.
        encoder: a module that computes the features of data.
        flow: the flow of the local variables, a name in :data:`~pyro_flowguides.flows.FLOWS` or a builder.
        plate: the name of the plate of the data.
        inputs: ``(indices, *args, **kwargs) -> argument or arguments of the encoder``, see above.
        global_flow: the flow of the global variables.
        global_options: options of its builder.
        condition_on_globals: let the local posterior depend on the global variables; turn it off for very many of them,
            such as the weights of a network.
        init_loc_fn: where to start, one of Pyro's initialization functions.
        init_scale: initial standard deviation of every unconstrained coordinate, positive.
        path_gradient: follow the path gradient of the joint posterior
            (:class:`~pyro_flowguides.guides.distributions.PathDistribution`). At the solution, its only noise is
            that of the subsample.
        **flow_options: options of the builder of ``flow``, for example ``depth`` or ``hidden_dims``.

    Raises:
        ValueError: if there is no such plate, no latent site in it, a discrete one, one whose support depends on the
            datum or on other sites, another subsampled plate around a latent site, a structure that changes, or if the
            encoder returns anything but one row of features per datum.
        TypeError: for an option that a builder does not take, or if the encoder does not accept the model's arguments.

    References:
        D. Kingma, M. Welling (2014). Auto-encoding variational Bayes. arXiv:1312.6114.
        A. Agrawal, J. Domke (2021). Amortized variational inference for simple hierarchical models. arXiv:2111.03144.

    Example:
        >>> import pyro, pyro.distributions as dist, pyro_flowguides as fg, torch
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("groups", len(y), subsample_size=10) as batch:
        ...         theta = pyro.sample("theta", dist.Normal(mu, 1.0))
        ...         pyro.sample("y", dist.Normal(theta[..., None], 1.0).expand([10, 3]).to_event(1), obs=y[batch])
        >>> y = torch.randn(50, 3)
        >>> encoder = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.ELU())
        >>> guide = fg.AutoAmortizedFlow(model, encoder, "iaf", plate="groups")
        >>> loss = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO()).step(y)
        >>> {name: tuple(value.shape) for name, value in guide.sample_all(100, y).items()}
        {'mu': (100,), 'theta': (100, 50)}
    """

    module_name = "local"
    setup_only = ("_new_global_guide", "_new_posterior")

    def __init__(
        self,
        model: Model,
        encoder: nn.Module,
        flow: str | Builder = "iaf",
        *,
        plate: str,
        inputs: Callable[..., object] | None = None,
        global_flow: str | Builder = "iaf",
        global_options: Mapping[str, Any] | None = None,
        condition_on_globals: bool = True,
        init_loc_fn: Callable[..., object] = init_to_median,
        init_scale: float = 0.1,
        path_gradient: bool = False,
        **flow_options: Any,
    ) -> None:
        owner = type(self).__name__
        if not isinstance(encoder, nn.Module):
            raise ValueError(
                f"{owner}: the encoder must be a torch.nn.Module, so that its parameters are trained, got "
                f"{type(encoder).__name__}. Prepare its arguments in inputs."
            )
        if inputs is not None:
            check_callable(owner, "inputs", inputs, "a function (indices, *args, **kwargs) of the model's arguments")
        if not isinstance(global_options, Mapping | None):
            raise TypeError(f"{owner}: global_options must map options to values, got {describe(global_options)}")
        super().__init__(model, init_loc_fn, init_scale)
        check_options(owner, get_flow(flow), flow_options, others=inspect.signature(type(self)).parameters)
        check_options(f"{owner}: global_options", get_flow(global_flow), global_options or {})
        self.local = LocalModule(encoder)
        self.register_module("globals", None)
        self._plate, self._inputs, self._condition_on_globals = plate, inputs, condition_on_globals
        global_options = {**(global_options or {}), "path_gradient": path_gradient}
        self._new_global_guide: Callable[..., AutoFlow] = partial(AutoFlow, flow=global_flow, **global_options)
        self._new_posterior = partial(FlowPosterior, flow=flow, path_gradient=path_gradient, **flow_options)

    @property
    def _module_or_none(self) -> LocalModule | None:
        local = self._modules["local"]
        return local if isinstance(local, LocalModule) and local.posterior is not None else None

    def _create_from_prototype(self, args: Args, kwargs: Kwargs) -> None:
        data_plate = self._find_data_plate(args, kwargs)
        owner, prototype = type(self).__name__, self._prototype
        self._sites = self._local_sites(prototype)
        if not self._sites:
            raise ValueError(
                f"{owner}: no latent site lies in plate {self._plate!r}. Use AutoFlow for a model whose latent sites "
                f"are all global."
            )
        self._create_global_guide(args, kwargs)
        structure.check_static(owner, self.model, self._prototype_hide_fn, prototype, args, kwargs)
        if self._module_or_none is None:
            self._create_posterior(data_plate, args, kwargs)

    def _local_sites(self, trace: Trace) -> list[LocalSite]:
        return [
            LocalSite.of(type(self).__name__, self._plate, site)
            for name, site in latent_sites(trace)
            if any(frame.name == self._plate for frame in site["cond_indep_stack"])
        ]

    def _create_global_guide(self, args: Args, kwargs: Kwargs) -> None:
        local = [site.name for site in self._sites]
        if len(local) == len(list(latent_sites(self._prototype))):
            return
        if self._modules["globals"] is None:
            model = poutine.block(self.model, hide=local)
            guide = self._new_global_guide(model, init_loc_fn=self._init, init_scale=self._init_scale)
            guide._placeholder, guide._initial_placeholder = self._placeholder, self._initial_placeholder
            # Assigning the attribute would first delete the values of its parameters that Pyro's store may hold.
            self.add_module("globals", guide)
            guide._update_master(self.master or weakref.ref(self))
        self.globals._setup_prototype(*args, **kwargs)

    def _create_posterior(self, data_plate: DataPlate, args: Args, kwargs: Kwargs) -> None:
        nodes = cast("Mapping[str, Site]", self._prototype.nodes)
        start = torch.cat([site.to_rows(nodes[site.name]["value"]).mean(0) for site in self._sites])
        loc = self._convert_as_requested(start)
        local = cast("LocalModule", self._modules["local"])
        with isolated():
            self.plates = self._plates_with(data_plate)
            with self.plates[self._plate] as indices:
                features = self._encode(local.encoder, cast("Tensor", indices), args, kwargs)
        if features.dtype != loc.dtype:
            raise ValueError(
                f"{type(self).__name__}: the encoder returns {features.dtype}, the local variables are {loc.dtype}. "
                f"Convert the encoder (encoder.to({loc.dtype})) or the guide."
            )
        guide = cast("AutoFlow | None", self._modules["globals"])
        global_dim = guide.latent_dim if guide is not None and self._condition_on_globals else 0
        local.posterior = LocalPosterior(loc, self._init_scale, features.shape[-1], global_dim, self._new_posterior)

    def _compare_structure(self, trace: Trace) -> None:
        before = {site.name: site.layout for site in self._sites}
        after = {site.name: site.layout for site in self._local_sites(trace) if site.name not in self._observed}
        if before != after:
            raise ValueError(
                f"{type(self).__name__}: the latent sites in plate {self._plate!r} have other names, shapes or plates "
                f"for these arguments than when the guide was set up: {after} now, {before} then. A flow guide serves "
                f"one fixed structure per datum: create one guide per structure."
            )

    def _find_data_plate(self, args: Args, kwargs: Kwargs) -> DataPlate:
        users_model = self.model if self._model is None else self._model[1]
        return find_data_plate(type(self).__name__, users_model, self._plate, args, kwargs)

    def _plates_with(self, data_plate: DataPlate) -> dict[str, pyro.plate]:
        """Create all plates around latent sites, with this plate of the data."""
        return {
            name: data_plate.create(name, frame.dim)
            if name == self._plate
            else pyro.plate(name, frame.full_size or frame.size, dim=frame.dim)
            for name, frame in sorted(self._prototype_frames.items())
        }

    def _create_plates(self, *args: object, **kwargs: object) -> dict[str, pyro.plate]:
        master = None if self.master is None else self.master()
        self.plates = master.plates if master else self._plates_with(self._find_data_plate(args, kwargs))
        return self.plates

    def _check_prototype(self, part_trace: Trace) -> None:
        """Accept the sites of the global part, which Pyro compares with the master's: both run the same model."""

    def forward(self, *args: object, **kwargs: object) -> Values:
        """Draw all latent sites; the arguments are those of the model."""
        self._prepare(args, kwargs)
        self._create_plates(*args, **kwargs)
        return self._draw(args, kwargs)

    def _draw(self, args: Args, kwargs: Kwargs) -> Values:
        claim_names(self, "local", self._owner)
        values, global_draw = self._draw_globals(args, kwargs)
        local = self.local  # within a Pyro program, reading it registers the parameters once
        with self.plates[self._plate] as indices:
            features = self._encode(local.encoder, cast("Tensor", indices), args, kwargs)
            distribution = self._local_distribution(cast("LocalPosterior", local.posterior), features, global_draw)
            draw = pyro.sample(f"_{self._pyro_name}_latent", distribution, infer={"is_auxiliary": True})
            for site, rows in zip(self._sites, draw.split([site.size for site in self._sites], -1), strict=True):
                with ExitStack() as stack:
                    for plate in site.further_plates:
                        stack.enter_context(self.plates[plate.name])
                    values[site.name] = pyro.sample(site.name, site.delta(rows))
        return values

    def _draw_globals(self, args: Args, kwargs: Kwargs) -> tuple[Values, Tensor | None]:
        """Draw the global sites; return also their latent vector if the local posterior depends on it."""
        guide = self._modules["globals"]
        if guide is None:
            return {}, None
        with poutine.trace() as tracer:
            values = self.globals(*args, **kwargs)
        if not self._condition_on_globals:
            return values, None
        return values, tracer.trace.nodes[f"_{guide._pyro_name}_latent"]["value"]

    def _encode(self, encoder: nn.Module, indices: Tensor, args: Args, kwargs: Kwargs) -> Tensor:
        plate = self.plates[self._plate]
        return encode_data(type(self).__name__, encoder, self._inputs, plate, indices, args, kwargs)

    def _local_distribution(
        self, posterior: LocalPosterior, features: Tensor, global_draw: Tensor | None
    ) -> dist.TransformedDistribution:
        """Return the distribution of the rows of the local sites."""
        if features.shape[-1] != posterior.feature_dim:
            raise ValueError(
                f"{type(self).__name__}: the encoder returned {features.shape[-1]} features, and "
                f"{posterior.feature_dim} when the guide was set up"
            )
        if global_draw is None:
            return posterior(self._context(features))
        location = self.globals.location
        distribution = posterior(self._context(features, global_draw - location))
        if isinstance(distribution, PathDistribution):
            context = self._context(features.detach(), global_draw - location.detach())
            distribution.path_log_prob = partial(local_path_log_prob, posterior, context)
        return distribution

    def _context(self, features: Tensor, *deviation: Tensor) -> Tensor:
        """Join features ``(B, C)``, with B at the plate's dimension, and the global variables of every particle."""
        inner = -1 - self._prototype_frames[self._plate].dim
        parts = [features.reshape(len(features), *(1,) * inner, features.shape[-1]), *deviation]
        batch = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return torch.cat([part.expand(*batch, part.shape[-1]) for part in parts], -1)

    @torch.no_grad()
    def sample_all(self, num_samples: int, *args: object, **kwargs: object) -> Values:
        """Draw from the posterior over all data, even if the model subsamples them.

        Args:
            num_samples: number of joint draws.
            args, kwargs: the model's arguments, with all data.

        Returns:
            site -> draws ``(num_samples, *shape of the site for all data)``.
        """
        num_samples = check_count(type(self).__name__, "num_samples", num_samples)
        self.setup(*args, **kwargs)
        size = self._find_data_plate(args, kwargs).size
        leftmost = min(frame.dim for frame in self._prototype_frames.values())
        draws_per_pass = max(1, ROWS_PER_PASS // size)
        parts = []
        for start in range(0, num_samples, draws_per_pass):
            count = min(draws_per_pass, num_samples - start)
            with poutine.block():
                self.plates = self._plates_with(DataPlate(size, size))
                with pyro.plate("_draws", count, dim=leftmost - 1):
                    parts.append(self._draw(args, kwargs))
        return {name: torch.cat([self._drop_other_plates(name, part[name]) for part in parts]) for name in parts[0]}

    def _drop_other_plates(self, name: str, draws: Tensor) -> Tensor:
        """Drop the dimensions of plates that the site is not in."""
        dims = cast("Tensor", self._prototype.nodes[name]["value"]).dim()
        return draws.reshape(len(draws), *draws.shape[draws.dim() - dims :])

    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: object, **kwargs: object) -> Values:
        """Return marginal quantiles for all data, estimated from 1,024 draws.

        Args:
            quantiles: numbers in [0, 1].
            args, kwargs: the model's arguments, with all data.

        Returns:
            site -> tensor with a leading dimension for the quantiles.
        """
        check_quantiles(type(self).__name__, quantiles)
        draws = self.sample_all(NUM_QUANTILE_SAMPLES, *args, **kwargs)
        result = {}
        for name, values in draws.items():
            levels = torch.as_tensor(quantiles, dtype=values.dtype, device=values.device)
            result[name] = marginal_quantiles(values.reshape(len(values), -1), levels).reshape(-1, *values.shape[1:])
        return result

    def _load_from_state_dict(self, *args: Any) -> None:
        self._ensure_parameters()
        super()._load_from_state_dict(*args)
