"""A small PixelCNN: masked convolutions in residual blocks, for decoders with a small window."""

from collections.abc import Iterator, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from pyro_flowguides.vae.decoders.autoregressive_network import AutoregressiveNetwork, ContextProjection, GenerationStep
from pyro_flowguides.vae.decoders.causal_conv import MaskedConv2d, split_reach
from pyro_flowguides.vae.decoders.image_networks import CachedWindow, FullMap, MapRegion

__all__ = ["PixelCNN"]


class _Block(nn.Module):
    """A residual block of a masked convolution and a 1×1 convolution, both with mask B."""

    def __init__(self, filters: int, reach: int, groups: int) -> None:
        super().__init__()
        self.conv = MaskedConv2d(filters, filters, reach, reach, reach, groups=groups)
        self.mix = MaskedConv2d(filters, filters, groups=groups)

    def forward(self, h: Tensor, region: MapRegion) -> Tensor:
        return h + region.apply(self.mix, F.elu(region.apply(self.conv, F.elu(h))))


class PixelCNN(AutoregressiveNetwork):
    r"""Masked convolutions in residual blocks: the decoder of the variational lossy autoencoder.

    .. math::
        h_1 = A(x) + C(c), \qquad h_{l+1} = h_l + B'_l\, \mathrm{elu}(B_l\, \mathrm{elu}(h_l)), \qquad
        \theta = B\, \mathrm{elu}(h_L)

    The first layer has mask A, the others have mask B. The context c = (features, maps) enters the first layer; the
    maps enter through a convolution as wide as that of the image, as if they were concatenated with it.

    ``reach`` is split over ``depth`` layers; the default gives six masked 3×3 convolutions followed by four 1×1 blocks.
    A pixel (i, j) reads the columns j − reach … j − 1 of row i, and the columns j − reach … j + d of row i − d, for
    d = 1 … reach. Pixels further to the right are the blind spot of masked convolutions, which :class:`GatedPixelCNN`
    does not have.

    Cost: that of :class:`AutoregressiveNetwork`. :meth:`generate` takes a few small matrix products per layer and
    pixel, and O(depth · filters · H · W) memory per image.

    Args:
        filters: channels of the hidden layers, a multiple of ``groups``.
        reach: total reach, in pixels.
        depth: number of layers.

    The other arguments and the shapes are those of :class:`AutoregressiveNetwork`.

    References:
        X. Chen et al. (2017). Variational lossy autoencoder. arXiv:1611.02731.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import PixelCNN
        >>> net = PixelCNN((1, 8, 8), outputs=1, reach=2, depth=3, maps=4)
        >>> net(torch.zeros(5, 1, 8, 8), maps=torch.randn(5, 4, 8, 8)).shape
        torch.Size([5, 1, 8, 8])
    """

    def __init__(
        self,
        shape: Sequence[int],
        outputs: int,
        *,
        filters: int = 12,
        reach: int = 6,
        depth: int = 10,
        features: int = 0,
        maps: int = 0,
        groups: int = 1,
    ) -> None:
        super().__init__(shape, outputs, features, maps, groups)
        first, *others = split_reach("PixelCNN", reach, depth)
        self.reach = reach
        self.first = MaskedConv2d(shape[0], filters, first, first, first, groups=groups, strict=True)
        self.context_projection = ContextProjection(features, maps, filters, reach=first)
        self.blocks = nn.ModuleList(_Block(filters, each, groups) for each in others)
        self.last = MaskedConv2d(filters, outputs, groups=groups)

    def _outputs(self, x: Tensor, region: MapRegion) -> Tensor:
        """Return the outputs in a region of the image."""
        h = region.apply_to_map(self.first, x) + region.context(self.context_projection)
        for block in self.blocks:
            h = block(h, region)
        return region.apply(self.last, F.elu(h))

    def evaluate(self, x: Tensor, contexts: dict[nn.Module, Tensor]) -> Tensor:
        return self._outputs(x, FullMap(contexts))

    def outputs_by_step(self, x: Tensor, contexts: dict[nn.Module, Tensor]) -> Iterator[tuple[GenerationStep, Tensor]]:
        pixel = CachedWindow(len(x), self.shape[1:], contexts)
        for step in self.steps():
            yield step, self._outputs(x, pixel.move_to_pixel(*step.position))[..., 0, 0]
