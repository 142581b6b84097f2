"""Fully connected encoders, decoders, and the Gaussian head of an amortized posterior."""

import itertools
import math
from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from pyro_flowguides.nn.arguments import check_count, check_widths

__all__ = ["DenseDecoder", "DenseEncoder", "GaussianEncoder", "positive_scale"]


def _relu_layers(owner: str, widths: Sequence[int]) -> list[nn.Module]:
    """Return linear layers, each followed by a ReLU, whose initial weights preserve the scale of the signal.

    The initialization is that of He et al. (2015). PyTorch's default shrinks the signal by a factor of 2.4 per layer,
    and a VAE then ignores z for many steps.
    """
    if any(width < 1 for width in check_widths(owner, "its widths", widths)):
        raise ValueError(f"{owner}: widths must be positive, got {list(widths)}")
    layers = [nn.Linear(inputs, outputs) for inputs, outputs in itertools.pairwise(widths)]
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
    return [module for layer in layers for module in (layer, nn.ReLU())]


class DenseEncoder(nn.Sequential):
    """A multilayer perceptron from data to features.

    Args:
        data_shape: shape of one datum.
        hidden: widths of the layers, at least one, each followed by a ReLU; the last is the number of features.

    Shapes:
        ``(..., *data_shape) -> (..., features)``.

    References:
        K. He, X. Zhang, S. Ren, J. Sun (2015). Delving deep into rectifiers. arXiv:1502.01852.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import DenseEncoder
        >>> DenseEncoder((1, 8, 8), hidden=[32])(torch.rand(5, 1, 8, 8)).shape
        torch.Size([5, 32])
    """

    def __init__(self, data_shape: Sequence[int], hidden: Sequence[int] = (300, 300)) -> None:
        data_shape = check_widths("DenseEncoder", "data_shape", data_shape)
        hidden = check_widths("DenseEncoder", "hidden", hidden)
        if not hidden:
            raise ValueError("DenseEncoder: hidden needs at least one width")
        layers = _relu_layers("DenseEncoder", [math.prod(data_shape), *hidden])
        super().__init__(nn.Flatten(-len(data_shape)), *layers)
        self.features = hidden[-1]


class DenseDecoder(nn.Sequential):
    """A multilayer perceptron from a latent vector to the parameters of a likelihood.

    Args:
        latent_dim: width of z.
        data_shape: shape of one datum.
        parameters_per_value: number of likelihood parameters for each value of the datum.
        hidden: widths of the hidden layers, each followed by a ReLU.

    Shapes:
        ``(..., latent_dim) -> (..., *data_shape, parameters_per_value)``.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import DenseDecoder
        >>> DenseDecoder(3, (1, 8, 8), parameters_per_value=2, hidden=[32])(torch.randn(4, 5, 3)).shape
        torch.Size([4, 5, 1, 8, 8, 2])
    """

    def __init__(
        self, latent_dim: int, data_shape: Sequence[int], parameters_per_value: int, hidden: Sequence[int] = (300, 300)
    ) -> None:
        data_shape = check_widths("DenseDecoder", "data_shape", data_shape)
        check_count("DenseDecoder", "parameters_per_value", parameters_per_value)
        widths = [
            check_count("DenseDecoder", "latent_dim", latent_dim),
            *check_widths("DenseDecoder", "hidden", hidden),
        ]
        last = nn.Linear(widths[-1], math.prod(data_shape) * parameters_per_value)
        unflatten = nn.Unflatten(-1, (*data_shape, parameters_per_value))
        super().__init__(*_relu_layers("DenseDecoder", widths), last, unflatten)


def positive_scale(raw: Tensor) -> Tensor:
    """Map real numbers to positive scales, and 0 to 1, by softplus(raw) / log 2."""
    return F.softplus(raw) / math.log(2)


class GaussianEncoder(nn.Module):
    r"""The encoder of an amortized posterior: location, scale and context as functions of the data.

    .. math:: h = f(x), \qquad \mu = W_\mu h + b_\mu, \qquad
        \sigma = \operatorname{softplus}(W_\sigma h + b_\sigma) / \log 2

    The features h are the context; each layer of a flow applies its own projection to them. The scale starts near 1.

    Args:
        network: from data to features; its attribute ``features`` is their number.
        latent_dim: width of z.

    Shapes:
        ``(..., *data_shape)`` -> loc ``(..., latent_dim)``, scale ``(..., latent_dim)``, context ``(..., features)``.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import DenseEncoder, GaussianEncoder
        >>> loc, scale, context = GaussianEncoder(DenseEncoder((8,), [32]), latent_dim=2)(torch.rand(5, 8))
        >>> loc.shape, context.shape
        (torch.Size([5, 2]), torch.Size([5, 32]))
    """

    def __init__(self, network: nn.Module, latent_dim: int) -> None:
        super().__init__()
        check_count("GaussianEncoder", "latent_dim", latent_dim)
        self.latent_dim, self.context_dim = latent_dim, cast("int", network.features)
        self.network = network
        self.head = nn.Linear(self.context_dim, 2 * latent_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        context = self.network(x)
        loc, raw = self.head(context).chunk(2, -1)
        return loc, positive_scale(raw), context
