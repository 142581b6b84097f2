"""Amortized flow posteriors: of a hand-written encoder, and of the local variables of one datum."""

import inspect
import math
from collections.abc import Callable, Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.params.param_store import param_with_module_name
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor, nn
from torch.func import functional_call

from pyro_flowguides.flows import Builder, check_options, get_flow
from pyro_flowguides.guides.distributions import PathDistribution, draw_normal, normal_log_prob
from pyro_flowguides.guides.param_names import Owner, claim_names, drop_references, registered_name
from pyro_flowguides.nn import MLP
from pyro_flowguides.nn.arguments import check_count, check_tensor, check_widths
from pyro_flowguides.transforms import ConditionalFlow, with_path_gradient
from pyro_flowguides.transforms.tracing import is_tracing

__all__ = ["FlowPosterior", "LocalPosterior", "local_path_log_prob"]

#: Number of units in which the global variables and the features of a datum interact.
MIXING_DIM = 64


class FlowPosterior(nn.Module):
    r"""An amortized posterior: a flow on top of an encoder's diagonal Gaussian.

    .. math:: z = f_\phi(z_0;\, h), \qquad z_0 \sim N(\mu, \operatorname{diag} \sigma^2), \qquad
        \log q(z \mid x) = \log N(z_0;\, \mu, \sigma) - \log|\det \partial f_\phi / \partial z_0|

    with the encoder's location :math:`\mu`, scale :math:`\sigma` and context h. The flow starts at, or within 1e-2 of,
    the identity, so that training starts at the diagonal Gaussian. The context shifts every parameter of a planar,
    radial or Sylvester layer through a hypernetwork (linear unless ``hidden_dims`` is given), and every layer of the
    conditioner of an autoregressive or coupling layer through a projection of its own.

    The distribution returned is like any other: it works in a plate, under vectorized particles and expanded, and it
    scores values from other distributions. Draws are reparametrized. Drawing and scoring the draw cost one pass of the
    flow; scoring another value costs one inversion.

    Within a Pyro program the parameters always reach Pyro's store: through :func:`pyro.module` or a
    :class:`~pyro.nn.PyroModule` around this module if there is one, else by the call itself, under names of its own.
    Parameters of the encoder still need :func:`pyro.module`.

    Args:
        latent_dim: D.
        context_dim: width C of the context, at least 1.
        flow: a name in :data:`~pyro_flowguides.flows.FLOWS`, or a builder ``(input_dim, context_dim, **options)``.
        path_gradient: follow the path gradient (:class:`~pyro_flowguides.guides.distributions.PathDistribution`).
            It is off by default for two reasons. Importance-weighted objectives (IWAE, Rényi) need the total gradient:
            under their weights, the terms that the path gradient leaves out do not average to zero. And it solves for
            the inverse Jacobian, which can be huge while the flow is far from the posterior: with four IAF steps, its
            norm passed 1e10 within 25 steps, while that of the total gradient stayed near 1e3.
        **flow_options: options of the builder, for example ``depth`` or ``hidden_dims``.

    Shapes:
        loc, scale ``(..., D)``, context ``(..., C)``, their batch shapes broadcast together; the distribution has that
        batch shape and event shape ``(D,)``.

    Raises:
        ValueError: for an unknown flow, a builder that returns another kind of flow, or arguments of other shapes.
        TypeError: for an option that the builder does not take.

    References:
        D. Rezende, S. Mohamed (2015). Variational inference with normalizing flows. arXiv:1505.05770.
        D. Kingma et al. (2016). Improving variational inference with inverse autoregressive flow. arXiv:1606.04934.
        R. van den Berg, L. Hasenclever, J. Tomczak, M. Welling (2018). Sylvester normalizing flows for variational
        inference. arXiv:1803.05649.

    Example:
        >>> import torch, pyro_flowguides as fg
        >>> posterior = fg.FlowPosterior(latent_dim=3, context_dim=4, flow="iaf", depth=2)
        >>> q = posterior(torch.zeros(5, 3), torch.ones(5, 3), torch.randn(5, 4))
        >>> q.batch_shape, q.event_shape
        (torch.Size([5]), torch.Size([3]))
        >>> z = q.rsample((2,))
        >>> torch.allclose(q.log_prob(z), q.log_prob(z.clone()), atol=1e-4)
        True
    """

    def __init__(
        self,
        latent_dim: int,
        context_dim: int,
        flow: str | Builder = "iaf",
        *,
        path_gradient: bool = False,
        **flow_options: object,
    ) -> None:
        super().__init__()
        latent_dim = check_count("FlowPosterior", "latent_dim", latent_dim)
        context_dim = check_count("FlowPosterior", "context_dim", context_dim)
        self.latent_dim, self.context_dim = latent_dim, context_dim
        builder = get_flow(flow)
        check_options(type(self).__name__, builder, flow_options, others=inspect.signature(type(self)).parameters)
        layers = builder(latent_dim, context_dim, **flow_options)
        dims = getattr(layers, "input_dim", None), getattr(layers, "context_dim", None)
        if not isinstance(layers, ConditionalFlow) or dims != (latent_dim, context_dim):
            raise ValueError(
                f"FlowPosterior: the builder must return a conditional flow with input_dim {latent_dim} and "
                f"context_dim {context_dim}, got {type(layers).__name__} with {dims[0]} and {dims[1]}"
            )
        self.flow = layers
        self._distribution = PathDistribution if path_gradient else dist.TransformedDistribution
        self._pyro_name, self._owner = type(self).__name__, Owner()

    def forward(self, loc: Tensor, scale: Tensor, context: Tensor) -> dist.TransformedDistribution:
        """Return the posterior for these outputs of an encoder."""
        if am_i_wrapped():
            self._register()
        return self.distribution(loc, scale, context)

    def distribution(self, loc: Tensor, scale: Tensor, context: Tensor) -> dist.TransformedDistribution:
        """Return the same posterior without registering parameters with Pyro; the caller takes care of them."""
        self._check(loc, scale, context)
        return self._distribution(dist.Normal(loc, scale).to_event(1), [self.flow.condition(context)])

    def rsample_and_log_prob(
        self, loc: Tensor, scale: Tensor, context: Tensor, sample_shape: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor]:
        """Draw from the posterior and score the draw in one pass, for training loops in plain torch.

        Returns:
            z ``(*sample_shape, ..., D)`` and its log density ``(*sample_shape, ...)``, with the path gradient if
            ``path_gradient`` is on.

        Raises:
            ValueError: for arguments of other shapes, or a scale that is not positive, unless the validation of
                torch's distributions is off.
        """
        self._check(loc, scale, context)
        if torch.distributions.Distribution._validate_args and not is_tracing(scale) and not bool((scale > 0).all()):
            raise ValueError(
                f"FlowPosterior: scale must be positive, got {float(scale.min()):.3g}. Take the softplus or the "
                "exponential of the encoder's output."
            )
        sample_shape = check_widths("FlowPosterior", "sample_shape", sample_shape)
        z, noise = draw_normal(loc, scale, sample_shape)
        flow = self.flow.condition(context)
        if self._distribution is PathDistribution and torch.is_grad_enabled():
            z, ladj, score = flow.forward_and_score(z, -noise / scale)
            return z, with_path_gradient(normal_log_prob(noise, scale) - ladj, z, score)
        z, ladj = flow.forward_and_ladj(z)
        return z, normal_log_prob(noise, scale) - ladj

    def _check(self, loc: Tensor, scale: Tensor, context: Tensor) -> None:
        widths = {"loc": self.latent_dim, "scale": self.latent_dim, "context": self.context_dim}
        for name, value in zip(widths, (loc, scale, context), strict=True):
            check_tensor("FlowPosterior", name, value)
        shapes = {name: tuple(value.shape) for name, value in zip(widths, (loc, scale, context), strict=True)}
        for name, shape in shapes.items():
            if shape[-1:] != (widths[name],):
                kind = "context_dim" if name == "context" else "latent_dim"
                raise ValueError(
                    f"FlowPosterior: {name} must have shape (..., {widths[name]}), got {shape}. Give the encoder "
                    f"{widths[name]} outputs for it, or build the posterior with another {kind}."
                )
        try:
            torch.broadcast_shapes(*(shape[:-1] for shape in shapes.values()))
        except RuntimeError:
            raise ValueError(
                f"FlowPosterior: the batch shapes of the arguments (all but the last dimension) do not broadcast: "
                f"{', '.join(f'{name} {shape}' for name, shape in shapes.items())}"
            ) from None

    def _register(self) -> None:
        """Register the parameters with Pyro: under the names they have in its store, else under names of their own.

        A module around this one may have named them already. They are registered all the same, because Pyro trains only
        the parameters that the program itself registers.
        """
        if pyro.settings.get("module_local_params"):
            return
        parameters = {name: p for name, p in self.flow.named_parameters() if p.requires_grad}
        if any(registered_name(p) is None for p in parameters.values()):
            claim_names(self, "flow", self._owner)
        for name, parameter in parameters.items():
            full_name = registered_name(parameter) or param_with_module_name(f"{self._pyro_name}.flow", name)
            pyro.param(full_name, parameter)

    def __getstate__(self) -> dict[str, object]:
        drop_references(self)
        return self.__dict__.copy()

    def extra_repr(self) -> str:
        return f"{self.latent_dim}, context_dim={self.context_dim}"


class LocalPosterior(nn.Module):
    r"""The posterior of the local variables of one datum, given its features and the global variables.

    With the features h and the deviation u of the global variables from their location,

    .. math:: c = (h,\ u,\ \operatorname{elu}(V (h, u) + v)), \qquad (\mu, s) = W c + b, \qquad
        q(z \mid h, u) = \operatorname{FlowPosterior}(\mu, \operatorname{softplus}(s), c)

    The last part of c, in which features and global variables interact, exists only if there are global variables. The
    global variables are a part of c of their own as well, so that a dependence shared by all data is learned from all
    of them, however weak it is.

    Args:
        loc, scale: initial location ``(D,)`` and scale for every datum.
        feature_dim, global_dim: widths of h and u.
        posterior: ``(latent_dim, context_dim) ->`` :class:`~pyro_flowguides.guides.FlowPosterior`.
    """

    def __init__(
        self, loc: Tensor, scale: float, feature_dim: int, global_dim: int, posterior: Callable[..., FlowPosterior]
    ) -> None:
        super().__init__()
        self.feature_dim, width = feature_dim, feature_dim + global_dim
        self.mix = nn.Linear(width, MIXING_DIM) if global_dim else None
        width += MIXING_DIM if global_dim else 0
        self.head = MLP(width, (), 2 * len(loc))
        self.flow_posterior = posterior(len(loc), width)
        self.to(loc)
        with torch.no_grad():
            self.head.biases[0].copy_(torch.cat([loc, torch.full_like(loc, math.log(math.expm1(scale)))]))

    def forward(self, context: Tensor) -> dist.TransformedDistribution:
        """Return the posterior for ``(h, u)``, ``(..., feature_dim + global_dim)``."""
        if self.mix is not None:
            context = torch.cat([context, nn.functional.elu(self.mix(context))], -1)
        loc, raw = self.head(context).chunk(2, -1)
        return self.flow_posterior.distribution(loc, nn.functional.softplus(raw), context)


class _ScoreAtBase(nn.Module):
    """The log density of a draw z whose base draw, z before the flow, is known."""

    def __init__(self, posterior: LocalPosterior) -> None:
        super().__init__()
        self.posterior = posterior

    def forward(self, context: Tensor, z: Tensor, base_draw: Tensor) -> Tensor:
        q = self.posterior(context)
        base, ladj = q.transforms[0].inverse_at(z, base_draw)
        log_prob: Tensor = q.base_dist.log_prob(base) - ladj
        return log_prob


def local_path_log_prob(posterior: LocalPosterior, context: Tensor, z: Tensor, base_draw: Tensor) -> Tensor:
    """Return log q(z | h, u) with derivatives by z and the context, global draws in it included, and no parameter."""
    score = _ScoreAtBase(posterior)
    constants = {name: parameter.detach() for name, parameter in score.named_parameters()}
    log_prob: Tensor = functional_call(score, constants, (context, z, base_draw))
    return log_prob
