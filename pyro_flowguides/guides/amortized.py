"""An autoguide for models with a plate of local latent variables, amortized over the data."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from pyro_flowguides.flows import Builder, get_flow
from pyro_flowguides.guides import structure
from pyro_flowguides.guides.autoflow import AutoFlow, marginal_quantiles
from pyro_flowguides.guides.data_plate import Plate, plate_of
from pyro_flowguides.guides.flow_posterior import FlowPosterior
from pyro_flowguides.guides.initialization import InitialValue
from pyro_flowguides.guides.lazy import LazyGuide
from pyro_flowguides.guides.local_posterior import Conditional, log_prob_on_path
from pyro_flowguides.guides.local_site import LocalSite
from pyro_flowguides.guides.param_names import bind
from pyro_flowguides.guides.path_distribution import PathDistribution

__all__ = ["AutoAmortizedFlow"]

#: Draws behind :meth:`AutoAmortizedFlow.median` and :meth:`AutoAmortizedFlow.quantiles`.
QUANTILE_DRAWS = 1024
#: Rows (draws times data) computed at a time by :meth:`AutoAmortizedFlow.sample_all`.
ROWS_AT_A_TIME = 2**18


class Local(nn.Module):
    """The encoder, which is given, and the conditional posterior, which is built once the model has been run."""

    conditional: Conditional | None

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.conditional = None


class AutoAmortizedFlow(LazyGuide):
    r"""A flow posterior for models with a plate of local latent variables, subsampled or not.

    .. math:: q(g, z \mid x) = q(g) \prod_{i=1}^{N} q(z_i \mid h(x_i), g)

    The variables :math:`z_i` of all sites in the plate, mapped to unconstrained space and stacked per datum, have a
    :class:`~pyro_flowguides.guides.FlowPosterior` whose location, scale and context are functions of the datum's
    features, which the ``encoder`` computes, and of how far the global variables g lie from their location. The sites
    outside the plate have an :class:`~pyro_flowguides.guides.AutoFlow`. Local variables are independent given g in the
    exact posterior too, so that the family contains it where encoder and flows are rich enough. Without the dependence
    on g the posterior of g would come out too narrow, however good the rest.

    **The plate.** In every call the guide asks the model which plate it makes for these arguments, and makes the same
    one: of the same size, subsampled to the same size, or with the indices that the model passes as ``subsample``. The
    model then uses the guide's indices, as Pyro's models always do. So the model may take all data and subsample them
    itself, or take a minibatch, and it may do now one and now the other.

    **The encoder** is called with the model's arguments, tensors among them that have one row for each of the N data
    cut down to the rows of the subsample; it returns the features ``(B, C)``, one row for each of the B data in the
    subsample. Where it does not take the model's arguments, or data have another layout, ``inputs`` says what it takes:
    a function of the indices ``(B,)`` and the model's arguments that returns the encoder's argument or a tuple of them.

    Further plates inside or outside of that of the data are allowed if they are not subsampled: what a site holds for
    one datum is then an array. Everything else is as for :class:`~pyro_flowguides.guides.AutoFlow`: parameters are
    created when the model is first run, two guides are independent, and the initial posterior is at ``init_loc_fn``
    with standard deviation ``init_scale``.

    Args:
        model: a Pyro model.
        encoder: a module that computes the features of data.
        flow: the flow of the local variables, a name in :data:`~pyro_flowguides.flows.FLOWS` or a builder.
        plate: the name of the plate of the data.
        inputs: ``(indices, *args, **kwargs) -> argument or arguments of the encoder``, see above.
        global_flow: the flow of the global variables.
        global_options: options of its builder.
        condition_on_globals: whether the local posterior reads the global variables; where these are very many, such as
            the weights of a network, it should not.
        init_loc_fn: where to start, one of Pyro's initialization functions.
        init_scale: initial standard deviation of every unconstrained coordinate, positive.
        path_gradient: follow the path gradient (:class:`~pyro_flowguides.guides.path_distribution.PathDistribution`) of the
            joint posterior, which has no noise at the solution but that of the subsample.
        **flow_options: passed to the builder of ``flow``, for example ``depth`` or ``hidden_dims``.

    Raises:
        ValueError: if there is no such plate, no latent site in it, a discrete one, one whose support depends on the
            datum or on other sites, another subsampled plate around a latent site, a structure that changes, or if the
            encoder returns anything but one row of features per datum.

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

    learned = "local"
    transient = ("_init", "_build")

    def __init__(
        self,
        model: Callable[..., Any],
        encoder: nn.Module,
        flow: str | Builder = "iaf",
        *,
        plate: str,
        inputs: Callable[..., Any] | None = None,
        global_flow: str | Builder = "iaf",
        global_options: Mapping[str, Any] | None = None,
        condition_on_globals: bool = True,
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float = 0.1,
        path_gradient: bool = False,
        **flow_options: Any,
    ) -> None:
        owner = type(self).__name__
        if not init_scale > 0:
            raise ValueError(f"{owner}: init_scale must be positive, got {init_scale}")
        if not isinstance(encoder, nn.Module):
            raise ValueError(
                f"{owner}: the encoder must be a torch.nn.Module, so that its parameters are trained, got "
                f"{type(encoder).__name__}. What prepares its arguments goes into inputs."
            )
        super().__init__(model)
        self._init = InitialValue(init_loc_fn)
        self.model = model
        self.local = Local(encoder)
        self.register_module("globals", None)
        self._plate, self._inputs, self._init_scale = plate, inputs, init_scale
        self._condition_on_globals = condition_on_globals
        get_flow(flow), get_flow(global_flow)
        self._build: Any = (
            partial(AutoFlow, flow=global_flow, path_gradient=path_gradient, **(global_options or {})),
            partial(FlowPosterior, flow=flow, path_gradient=path_gradient, **flow_options),
        )

    # -- setting up ----------------------------------------------------------------------------------------------------

    @property
    def _built(self) -> Local | None:
        local = self._modules["local"]
        return local if isinstance(local, Local) and local.conditional is not None else None

    def _prepared(self, model: Callable[..., Any]) -> tuple[Callable[..., Any], ...]:
        """The model as it is run for its structure, and as it was given."""
        return InitMessenger(self._init)(model) if self._init else model, model

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        asked = self._ask(args, kwargs)
        with structure.isolated():
            super()._setup_prototype(*args, **kwargs)
        try:
            self._create(asked, args, kwargs)
        except Exception:
            self.prototype_trace = None  # so that the next call, with a mended encoder or other arguments, starts anew
            raise

    def _create(self, asked: Plate, args: Any, kwargs: Any) -> None:
        owner, prototype = type(self).__name__, self._prototype
        self._signatures.add(structure.call_signature(args, kwargs))
        self._observed = structure.observed_sites(self.model, args, kwargs)
        self._sites = self._local_sites(prototype)
        if not self._sites:
            raise ValueError(
                f"{owner}: no latent site lies in plate {self._plate!r}. Use AutoFlow for a model whose latent sites "
                f"are all global."
            )
        self._create_globals(args, kwargs)
        structure.check_static(owner, self.model, self._prototype_hide_fn, prototype, args, kwargs)
        if self._built is None:
            self._create_local(asked, args, kwargs)

    def _local_sites(self, trace: Trace) -> list[LocalSite]:
        return [
            LocalSite.of(type(self).__name__, self._plate, site)
            for name, site in structure.latent_sites(trace)
            if any(frame.name == self._plate for frame in site["cond_indep_stack"])
        ]

    def _create_globals(self, args: Any, kwargs: Any) -> None:
        local = [site.name for site in self._sites]
        if len(local) == len(list(structure.latent_sites(self._prototype))):
            return
        if self._modules["globals"] is None:
            guide = self._build[0](
                poutine.block(self.model, hide=local), init_loc_fn=self._init, init_scale=self._init_scale
            )
            guide._anchor, guide._anchor_start = self._anchor, self._anchor_start
            # Assigned as an attribute, it would first delete the values of its parameters that Pyro's store may hold.
            self.add_module("globals", guide)
            guide._update_master(self.master or weakref.ref(self))
        self.globals._setup_prototype(*args, **kwargs)

    def _create_local(self, asked: Plate, args: Any, kwargs: Any) -> None:
        nodes: Any = self._prototype.nodes
        loc = self._requested(torch.cat([site.rows(nodes[site.name]["value"]).mean(0) for site in self._sites]))
        local: Any = self._modules["local"]
        with structure.isolated():
            self.plates = self._open(asked)
            with self.plates[self._plate] as indices:
                features = self._features(local.encoder, cast("Tensor", indices), args, kwargs)
        if features.dtype != loc.dtype:
            raise ValueError(
                f"{type(self).__name__}: the encoder returns {features.dtype}, the local variables are {loc.dtype}. "
                f"Convert the encoder (encoder.to({loc.dtype})) or the guide."
            )
        guide: Any = self._modules["globals"]
        global_dim: int = guide.latent_dim if guide is not None and self._condition_on_globals else 0
        local.conditional = Conditional(loc, self._init_scale, features.shape[-1], global_dim, self._build[1])

    def _compare(self, args: Any, kwargs: Any) -> None:
        trace = structure.latent_trace(self.model, self._prototype_hide_fn, args, kwargs)
        before = {site.name: site.layout for site in self._sites}
        after = {site.name: site.layout for site in self._local_sites(trace) if site.name not in self._observed}
        if before != after:
            raise ValueError(
                f"{type(self).__name__}: the latent sites in plate {self._plate!r} have other names, shapes or plates "
                f"for these arguments than when the guide was set up: {after} now, {before} then. A flow guide serves "
                f"one fixed structure per datum: create one guide per structure."
            )

    # -- the plate -----------------------------------------------------------------------------------------------------

    def _ask(self, args: Any, kwargs: Any) -> Plate:
        """The plate of the data as the model makes it for these arguments."""
        _, raw = self._model if self._model is not None else (None, self.model)
        return plate_of(type(self).__name__, raw, self._plate, args, kwargs)

    def _open(self, asked: Plate) -> dict[str, pyro.plate]:
        """All plates around latent sites, that of the data as asked for."""
        plates = {}
        for name, frame in sorted(self._prototype_frames.items()):
            if name != self._plate:
                plates[name] = pyro.plate(name, frame.full_size or frame.size, dim=frame.dim)
            elif asked.subsample is not None:
                plates[name] = pyro.plate(name, asked.size, subsample=asked.subsample, dim=frame.dim)
            else:
                plates[name] = pyro.plate(name, asked.size, asked.subsample_size, dim=frame.dim)
        return plates

    def _create_plates(self, *args: Any, **kwargs: Any) -> dict[str, pyro.plate]:
        if self.master is not None:
            self.plates = self.master().plates
        else:
            self.plates = self._open(self._ask(args, kwargs))
        return self.plates

    def _check_prototype(self, part_trace: Trace) -> None:
        """Pyro's question to the owner of the plates: the sites of the global part are those of the same model."""

    # -- the features of the data --------------------------------------------------------------------------------------

    def _features(self, encoder: Any, indices: Tensor, args: Any, kwargs: Any) -> Tensor:
        """What the encoder says of the data with these indices, ``(B, C)``."""
        if self._inputs is not None:
            chosen = self._inputs(indices, *args, **kwargs)
            features = encoder(*chosen) if isinstance(chosen, tuple) else encoder(chosen)
        else:
            features = self._encode_arguments(encoder, indices, args, kwargs)
        if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != len(indices):
            got = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"{type(self).__name__}: the encoder must return a tensor of shape ({len(indices)}, C), one row of "
                f"features for each datum in the subsample of plate {self._plate!r}, got {got}. If the model's "
                f"arguments are not what it takes, or have no leading dimension for the data, say what it takes with "
                f"inputs=lambda indices, *args, **kwargs: ..."
            )
        return features

    def _encode_arguments(self, encoder: Any, indices: Tensor, args: Any, kwargs: Any) -> Any:
        """The encoder at the model's arguments, tensors with one row per datum cut down to the subsample."""
        size = self.plates[self._plate].size
        if len(indices) == size and not torch.equal(indices, torch.arange(size, device=indices.device)):
            raise ValueError(
                f"{type(self).__name__}: the subsample of plate {self._plate!r} is all data in another order, and the "
                f"model's arguments may be in that order already. Say what the encoder takes with "
                f"inputs=lambda indices, *args, **kwargs: ..."
            )

        def rows(value: Any) -> Any:
            if len(indices) == size or not isinstance(value, Tensor) or value.dim() == 0 or len(value) != size:
                return value
            return value[indices.to(value.device)]

        try:
            return encoder(*map(rows, args), **{name: rows(value) for name, value in kwargs.items()})
        except TypeError as error:
            raise TypeError(
                f"{type(self).__name__}: the encoder could not be called with the model's arguments ({error}). Say "
                f"what it takes with inputs=lambda indices, *args, **kwargs: ..."
            ) from error

    # -- the posterior -------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw all latent sites; arguments are those of the model."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        else:
            self._check_structure(args, kwargs)
        self._create_plates(*args, **kwargs)
        return self._draw(args, kwargs)

    def _draw(self, args: Any, kwargs: Any) -> dict[str, Tensor]:
        bind(self, self.learned, self._token)
        values, latent = self._draw_globals(args, kwargs)
        local = self.local  # within a call this registers the parameters with Pyro, once
        with self.plates[self._plate] as indices:
            features = self._features(local.encoder, indices, args, kwargs)
            posterior = self._posterior(local.conditional, features, latent)
            drawn = pyro.sample(f"_{self._pyro_name}_latent", posterior, infer={"is_auxiliary": True})
            for site, rows in zip(self._sites, drawn.split([site.size for site in self._sites], -1), strict=True):
                with ExitStack() as stack:
                    for frame in site.frames:
                        stack.enter_context(self.plates[frame.name])
                    values[site.name] = pyro.sample(site.name, site.image(rows))
        return values

    def _draw_globals(self, args: Any, kwargs: Any) -> tuple[dict[str, Tensor], Tensor | None]:
        """The global sites, and the latent vector behind them if the local posterior reads it."""
        guide = self._modules["globals"]
        if guide is None:
            return {}, None
        with poutine.trace() as tracer:
            values = self.globals(*args, **kwargs)
        if not self._condition_on_globals:
            return values, None
        return values, tracer.trace.nodes[f"_{guide._pyro_name}_latent"]["value"]

    def _posterior(self, conditional: Any, features: Tensor, latent: Tensor | None) -> Any:
        """The distribution of the rows of the local sites."""
        if features.shape[-1] != conditional.features:
            raise ValueError(
                f"{type(self).__name__}: the encoder returned {features.shape[-1]} features, and "
                f"{conditional.features} when the guide was set up"
            )
        if latent is None:
            return conditional(self._context(features))
        location = self.globals.location
        posterior = conditional(self._context(features, latent - location))
        if isinstance(posterior, PathDistribution):
            context = self._context(features.detach(), latent - location.detach())
            posterior.on_path = partial(log_prob_on_path, conditional, context)
        return posterior

    def _context(self, features: Tensor, *deviation: Tensor) -> Tensor:
        """Features ``(B, C)`` with B at the plate's dimension, beside the global variables of every particle."""
        inner = -1 - self._prototype_frames[self._plate].dim
        parts = [features.reshape(len(features), *(1,) * inner, features.shape[-1]), *deviation]
        batch = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return torch.cat([part.expand(*batch, part.shape[-1]) for part in parts], -1)

    @torch.no_grad()
    def sample_all(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws of the posterior over all data, also where the model subsamples them.

        Args:
            num_samples: number of joint draws.
            args, kwargs: the model's arguments, with all data.

        Returns:
            site -> draws ``(num_samples, *shape of the site for all data)``.
        """
        self.setup(*args, **kwargs)
        size = self._ask(args, kwargs).size
        leftmost = min(frame.dim for frame in self._prototype_frames.values())
        at_a_time = max(1, ROWS_AT_A_TIME // size)
        parts = []
        for start in range(0, num_samples, at_a_time):
            count = min(at_a_time, num_samples - start)
            with poutine.block():
                self.plates = self._open(Plate(size, size))
                with pyro.plate("_draws", count, dim=leftmost - 1):
                    parts.append(self._draw(args, kwargs))
        return {name: torch.cat([self._compact(name, part[name]) for part in parts]) for name in parts[0]}

    def _compact(self, name: str, draws: Tensor) -> Tensor:
        """Draws without the dimensions of plates that the site is not in."""
        dims = cast("Tensor", self._prototype.nodes[name]["value"]).dim()
        return draws.reshape(len(draws), *draws.shape[draws.dim() - dims :])

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The marginal median of every site for all data, estimated from 1,024 draws."""
        return {name: value[0] for name, value in self.quantiles([0.5], *args, **kwargs).items()}

    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Marginal quantiles for all data, estimated from 1,024 draws.

        Args:
            quantiles: numbers in [0, 1].
            args, kwargs: the model's arguments, with all data.

        Returns:
            site -> tensor with a leading dimension for the quantiles.
        """
        draws = self.sample_all(QUANTILE_DRAWS, *args, **kwargs)
        result = {}
        for name, values in draws.items():
            levels = torch.as_tensor(quantiles, dtype=values.dtype, device=values.device)
            result[name] = marginal_quantiles(values.reshape(len(values), -1), levels).reshape(-1, *values.shape[1:])
        return result

    def _load_from_state_dict(self, *args: Any) -> None:
        self._ensure_parameters()
        super()._load_from_state_dict(*args)
