"""MADE as a decoder: one set of weights for many orderings and connectivities."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_flowguides.nn.made import layer_masks
from pyro_flowguides.nn.mlp import MLP
from pyro_flowguides.vae.decoders.autoregressive_decoder import AutoregressiveNetwork, ContextProjection, GenerationStep

__all__ = ["AgnosticMADE"]


class _Member(AutoregressiveNetwork):
    """The network of one ordering, which shares the weights of the ensemble."""

    supported_spatial_dims = (1, 2)

    def __init__(self, ensemble: AgnosticMADE, degrees: Sequence[Tensor]) -> None:
        super().__init__(ensemble.shape, ensemble.outputs, ensemble.features, ensemble.maps, groups=1)
        self.net, self.context_projections = ensemble.net, ensemble.context_projections
        self.degrees = [each.to(ensemble.net.weights[0].device) for each in degrees]

    def _masked_weights(self) -> list[Tensor]:
        """Return the weights of all layers, masked for this ordering."""
        masks = layer_masks(self.degrees, self.outputs // self.shape[0])
        return [weight * mask for weight, mask in zip(self.net.weights, masks, strict=True)]

    def _bias_shifts(self, contexts: dict[nn.Module, Tensor]) -> list[Tensor]:
        """Return the terms that the context adds to the bias of every layer."""
        pairs = zip(self.context_projections, self.net.biases, strict=True)
        return [contexts[projection].flatten(1).expand(-1, len(bias)) for projection, bias in pairs]

    def evaluate(self, x: Tensor, contexts: dict[nn.Module, Tensor]) -> Tensor:
        layers = {f"weight{number}": weight for number, weight in enumerate(self._masked_weights())}
        for number, shift in enumerate(self._bias_shifts(contexts)):
            layers[f"bias{number}"] = self.net.biases[number] + shift
        return self.net.run(x.flatten(1), layers).reshape(len(x), self.outputs, *self.shape[1:])

    def steps(self) -> Iterator[GenerationStep]:
        order = torch.unravel_index(self.degrees[0].argsort(), self.shape)
        for channel, *position in torch.stack(order, 1).tolist():
            yield GenerationStep(slice(channel, channel + 1), tuple(position))

    def outputs_by_step(self, x: Tensor, contexts: dict[nn.Module, Tensor]) -> Iterator[tuple[GenerationStep, Tensor]]:
        """Iterate over the steps, computing every hidden unit once: when the inputs up to its degree are drawn."""
        weights, shifts = self._masked_weights(), self._bias_shifts(contexts)
        units_at = torch.arange(self.net.out_features, device=x.device).reshape(-1, *self.shape[1:]).movedim(0, -1)
        hidden = [x.new_zeros(len(x), width) for width in self.net.hidden_dims]

        def pre_activations(number: int, units: Tensor, inputs: Tensor) -> Tensor:
            linear = F.linear(inputs, weights[number][units], self.net.biases[number][units])
            return linear + shifts[number][:, units]

        for degree, step in enumerate(self.steps()):
            inputs = x.flatten(1)
            for number, outputs in enumerate(hidden):
                units = (self.degrees[number + 1] == degree).nonzero()[:, 0]
                outputs[:, units] = self.net.activation(pre_activations(number, units, inputs))
                inputs = outputs
            yield step, pre_activations(len(hidden), units_at[step.position], inputs)


class AgnosticMADE(AutoregressiveNetwork):
    r"""MADE whose weights serve many orderings of the pixels and many connectivities of the hidden units.

    The seed k determines ordering k and the degrees of the hidden units under it; the masks are those of
    :class:`~pyro_flowguides.nn.MADE`. In training every pass uses a random ordering, so that the weights learn to serve
    all of them. The density is the mixture

    .. math:: p(x \mid c) = \frac1K \sum_{k=1}^K \prod_i p\big(x_i \mid \theta^{(k)}_i(x_{<_k i}, c)\big)

    which :class:`~pyro_flowguides.vae.AutoregressiveDistribution` evaluates from :meth:`members`. ``orderings=1`` gives
    plain MADE in raster order. Every value, channels included, is a step of its own. The context shifts the
    pre-activations of every layer.

    Cost: one pass per ordering for the density. :meth:`generate` computes each hidden unit once, when the inputs that
    it may read are drawn: the arithmetic of one pass for a whole draw, in one small step per value.

    Args:
        outputs: number of parameters per position, a multiple of the channels; output k belongs to channel
            ``k % channels``.
        hidden_dims: widths of the hidden layers.
        orderings: K.
        activation: elementwise nonlinearity.

    The other arguments and the shapes are those of :class:`AutoregressiveNetwork`.

    References:
        M. Germain, K. Gregor, I. Murray, H. Larochelle (2015). MADE: masked autoencoder for distribution estimation.
        arXiv:1502.03509. B. Uria, I. Murray, H. Larochelle (2014). A deep and tractable density estimator.
        arXiv:1310.1757.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import AgnosticMADE
        >>> net = AgnosticMADE((1, 4, 4), outputs=1, hidden_dims=[32], orderings=8, features=3)
        >>> net(torch.zeros(5, 1, 4, 4), features=torch.randn(5, 3)).shape, len(net.eval().members())
        (torch.Size([5, 1, 4, 4]), 8)
    """

    supported_spatial_dims = (1, 2)

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
        self.orderings = orderings
        self.net = MLP(math.prod(shape), hidden_dims, outputs * math.prod(shape[1:]), activation)
        projections = nn.ModuleList(
            ContextProjection(features, 0, width, spatial_dims=1) for width in [*hidden_dims, self.net.out_features]
        )
        self.context_projections = cast("Sequence[ContextProjection]", projections)

    def member(self, number: int) -> AutoregressiveNetwork:
        """Return the network of one ordering, which shares all weights with the others."""
        size = math.prod(self.shape)
        generator = torch.Generator().manual_seed(number)
        first = torch.arange(size) if self.orderings == 1 else torch.randperm(size, generator=generator)
        hidden = [torch.randint(0, size, (width,), generator=generator) for width in self.net.hidden_dims]
        return _Member(self, [first + 1, *hidden]).train(self.training)

    def members(self) -> Sequence[AutoregressiveNetwork]:
        """Return the networks of all orderings or, in training, of a random one."""
        if self.training:
            return [self.member(int(torch.randint(self.orderings, ())))]
        return [self.member(number) for number in range(self.orderings)]

    def steps(self) -> Iterator[GenerationStep]:
        return self.members()[0].steps()

    def evaluate(self, x: Tensor, contexts: dict[nn.Module, Tensor]) -> Tensor:
        return self.members()[0].evaluate(x, contexts)

    def outputs_by_step(self, x: Tensor, contexts: dict[nn.Module, Tensor]) -> Iterator[tuple[GenerationStep, Tensor]]:
        return self.members()[0].outputs_by_step(x, contexts)
