"""Fully connected encoders and decoders, and the Gaussian head that every encoder carries."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["DenseDecoder", "DenseEncoder", "GaussianEncoder"]


def _stack(owner: str, widths: Sequence[int]) -> list[nn.Module]:
    """Linear layers, each followed by a ReLU, that keep the size of the signal at the start (He et al. 2015).

    With torch's own start every layer shrinks it by 2.4, and a VAE finds no use for z for many steps.
    """
    if any(width < 1 for width in widths):
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
        hidden: widths of the layers, ReLU after each; the last is the number of features.

    Shapes:
        ``(..., *data_shape) -> (..., features)``.

    References:
        K. He, X. Zhang, S. Ren, J. Sun (2015). Delving deep into rectifiers. arXiv:1502.01852.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae.networks import DenseEncoder
        >>> DenseEncoder((1, 8, 8), hidden=[32])(torch.rand(5, 1, 8, 8)).shape
        torch.Size([5, 32])
    """

    def __init__(self, data_shape: Sequence[int], hidden: Sequence[int] = (300, 300)) -> None:
        if not hidden:
            raise ValueError("DenseEncoder: hidden needs at least one width")
        layers = _stack("DenseEncoder", [math.prod(data_shape), *hidden])
        super().__init__(nn.Flatten(-len(data_shape)), *layers)
        self.features = hidden[-1]


class DenseDecoder(nn.Sequential):
    """A multilayer perceptron from a latent vector to the parameters of a likelihood.

    Args:
        latent_dim: width of z.
        data_shape: shape of one datum.
        parameters: numbers per value of the data.
        hidden: widths of the layers, ReLU after each.

    Shapes:
        ``(..., latent_dim) -> (..., *data_shape, parameters)``.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae.networks import DenseDecoder
        >>> DenseDecoder(3, (1, 8, 8), parameters=2, hidden=[32])(torch.randn(4, 5, 3)).shape
        torch.Size([4, 5, 1, 8, 8, 2])
    """

    def __init__(
        self, latent_dim: int, data_shape: Sequence[int], parameters: int, hidden: Sequence[int] = (300, 300)
    ) -> None:
        widths = [latent_dim, *hidden]
        last = nn.Linear(widths[-1], math.prod(data_shape) * parameters)
        super().__init__(*_stack("DenseDecoder", widths), last, nn.Unflatten(-1, (*data_shape, parameters)))


class GaussianEncoder(nn.Module):
    r"""What an amortized posterior is made from: location, scale and context, all functions of the data.

    .. math:: h = f(x), \qquad \mu = W_\mu h + b_\mu, \qquad
        \sigma = \operatorname{softplus}(W_\sigma h + b_\sigma) / \log 2

    The features h are the context: each layer of a flow projects them for itself. The scale starts near 1.

    Args:
        network: from data to features; its attribute ``features`` is their number.
        latent_dim: width of z.

    Shapes:
        ``(..., *data_shape)`` -> loc ``(..., latent_dim)``, scale ``(..., latent_dim)``, context ``(..., features)``.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae.networks import DenseEncoder, GaussianEncoder
        >>> loc, scale, context = GaussianEncoder(DenseEncoder((8,), [32]), latent_dim=2)(torch.rand(5, 8))
        >>> loc.shape, context.shape
        (torch.Size([5, 2]), torch.Size([5, 32]))
    """

    def __init__(self, network: nn.Module, latent_dim: int) -> None:
        super().__init__()
        if latent_dim < 1:
            raise ValueError(f"GaussianEncoder: latent_dim must be at least 1, got {latent_dim}")
        self.latent_dim, self.context_dim = latent_dim, int(network.features)  # type: ignore[arg-type]
        self.network = network
        self.head = nn.Linear(self.context_dim, 2 * latent_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        context = self.network(x)
        loc, raw = self.head(context).chunk(2, -1)
        return loc, F.softplus(raw) / math.log(2), context
