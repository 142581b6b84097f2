"""MADE as a decoder: one set of weights for many orderings and connectivities."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_flowguides.nn.made import layer_masks
from pyro_flowguides.nn.mlp import MLP
from pyro_flowguides.vae.decoders.autoregressive_network import (
    AutoregressiveNetwork,
    Canvas,
    ContextProjection,
    Draw,
    Step,
)

__all__ = ["AgnosticMADE"]


class _Member(AutoregressiveNetwork):
    """The network of one ordering, with the weights of the whole."""

    spaces = (1, 2)

    def __init__(self, network: AgnosticMADE, degrees: Sequence[Tensor]) -> None:
        super().__init__(network.shape, network.outputs, network.features, network.maps, groups=1)
        self.net, self.given = network.net, network.given
        self.degrees = [each.to(network.net.weights[0].device) for each in degrees]

    def _folded(self) -> dict[str, Tensor]:
        folded = self.net.fold()
        for layer, mask in enumerate(layer_masks(self.degrees, self.outputs // self.shape[0])):
            folded[f"weight{layer}"] = folded[f"weight{layer}"] * mask
        return folded

    def _shifts(self, contexts: dict[nn.Module, Tensor]) -> list[Tensor]:
        """What the context adds to every bias."""
        return [contexts[projection].flatten(1) for projection in self.given]

    def evaluate(self, x: Tensor, contexts: dict[nn.Module, Tensor]) -> Tensor:
        folded = self._folded()
        for layer, shift in enumerate(self._shifts(contexts)):
            folded[f"bias{layer}"] = folded[f"bias{layer}"] + shift
        return self.net.run(x.flatten(1), folded).reshape(len(x), self.outputs, *self.shape[1:])

    def _order(self) -> list[int]:
        """The values, numbered through, in the order in which they are drawn."""
        return self.degrees[0].argsort().tolist()

    def steps(self) -> Iterator[Step]:
        index = torch.arange(math.prod(self.shape)).reshape(self.shape)
        for value in self._order():
            channel, *position = (index == value).nonzero()[0].tolist()
            yield slice(channel, channel + 1), tuple(position)

    def _fill(self, canvas: Canvas, draw: Draw, contexts: dict[nn.Module, Tensor]) -> None:
        """Every hidden unit is computed once, when the inputs up to its degree are known."""
        size, folded, shifts = len(canvas.values), self._folded(), self._shifts(contexts)
        hidden = [canvas.inputs.new_zeros(size, width) for width in self.net.hidden_dims]
        places = math.prod(self.shape[1:])
        for degree, (value, step) in enumerate(zip(self._order(), self.steps(), strict=True)):
            before = canvas.inputs.flatten(1)
            for layer, after in enumerate(hidden):
                units = (self.degrees[layer + 1] == degree).nonzero()[:, 0]
                after[:, units] = self.net.activation(self._units(layer, units, before, folded, shifts))
                before = after
            units = torch.arange(value % places, self.net.out_features, places, device=before.device)
            canvas.put(step, draw(self._units(len(hidden), units, before, folded, shifts)))

    @staticmethod
    def _units(layer: int, units: Tensor, before: Tensor, folded: dict[str, Tensor], shifts: list[Tensor]) -> Tensor:
        """The pre-activations of some units of a layer."""
        linear = F.linear(before, folded[f"weight{layer}"][units], folded[f"bias{layer}"][units])
        return linear + (shifts[layer][:, units] if shifts[layer].shape[-1] > 1 else shifts[layer])


class AgnosticMADE(AutoregressiveNetwork):
    r"""MADE whose weights serve many orderings of the pixels and many connectivities of the hidden units.

    Ordering k and the degrees of the hidden units under it are drawn once from the seed k; its masks are those of
    :class:`MADE`. In training every pass uses an ordering at random, so that the weights must serve all of them. The
    density of the whole is the mixture

    .. math:: p(x \mid c) = \frac1K \sum_{k=1}^K \prod_i p\big(x_i \mid \theta^{(k)}_i(x_{<_k i}, c)\big)

    which :class:`~pyro_flowguides.vae.Autoregressive` evaluates from :meth:`members`. With ``orderings=1`` the order
    is raster order: plain MADE. Every value, channels included, is a step of its own. The context shifts the
    pre-activations of every layer.

    Cost: one pass per ordering for the density. :meth:`generate` computes each hidden unit once, when the inputs that
    it may read are known: the arithmetic of one pass for a whole draw, in one small step per value.

    Args:
        shape: ``(channels, height, width)`` or ``(channels, length)``.
        outputs: numbers per position, a multiple of the channels; output k belongs to channel ``k % channels``.
        hidden_dims: widths of the hidden layers.
        orderings: K.
        features: global features.
        activation: elementwise nonlinearity.

    Shapes:
        x ``(B, *shape)`` -> ``(B, outputs, *space)``.

    Raises:
        ValueError: if ``outputs`` is not a multiple of the channels or ``orderings`` is not positive.

    References:
        M. Germain, K. Gregor, I. Murray, H. Larochelle (2015). MADE: masked autoencoder for distribution estimation.
        arXiv:1502.03509. B. Uria, I. Murray, H. Larochelle (2014). A deep and tractable density estimator.
        arXiv:1310.1757.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae.decoders import AgnosticMADE
        >>> net = AgnosticMADE((1, 4, 4), outputs=1, hidden_dims=[32], orderings=8, features=3)
        >>> net(torch.zeros(5, 1, 4, 4), features=torch.randn(5, 3)).shape, len(net.eval().members())
        (torch.Size([5, 1, 4, 4]), 8)
    """

    spaces = (1, 2)

    def __init__(
        self,
        shape: Sequence[int],
        outputs: int,
        *,
        hidden_dims: Sequence[int] = (500,),
        orderings: int = 16,
        features: int = 0,
        activation: Callable[[Tensor], Tensor] = F.relu,
    ) -> None:
        super().__init__(shape, outputs, features, maps=0, groups=1)
        if outputs % shape[0] or orderings < 1:
            raise ValueError(
                f"AgnosticMADE: outputs must be a multiple of the channels {shape[0]} and orderings at least 1, "
                f"got outputs {outputs}, orderings {orderings}"
            )
        size = math.prod(shape)
        self.orderings = orderings
        self.net = MLP(size, hidden_dims, outputs * math.prod(shape[1:]), activation)
        widths = [*hidden_dims, self.net.out_features]
        self.given = nn.ModuleList(ContextProjection(features, 0, width, space=1) for width in widths)

    def member(self, number: int) -> AutoregressiveNetwork:
        """The network of one ordering, sharing all weights."""
        size = math.prod(self.shape)
        generator = torch.Generator().manual_seed(number)
        first = torch.arange(size) if self.orderings == 1 else torch.randperm(size, generator=generator)
        hidden = [torch.randint(0, size, (width,), generator=generator) for width in self.net.hidden_dims]
        member = _Member(self, [first + 1, *hidden])
        return member.train(self.training)

    def members(self) -> Sequence[AutoregressiveNetwork]:
        """Of the mixture: all orderings, or in training one at random."""
        if self.training:
            return [self.member(int(torch.randint(self.orderings, ())))]
        return [self.member(number) for number in range(self.orderings)]

    def steps(self) -> Iterator[Step]:
        return self.members()[0].steps()

    def evaluate(self, x: Tensor, contexts: dict[nn.Module, Tensor]) -> Tensor:
        return self.members()[0].evaluate(x, contexts)

    def _fill(self, canvas: Canvas, draw: Draw, contexts: dict[nn.Module, Tensor]) -> None:
        self.members()[0]._fill(canvas, draw, contexts)
