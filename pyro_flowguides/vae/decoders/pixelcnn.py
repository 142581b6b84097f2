"""PixelCNNs of masked convolutions: one stack of residual blocks, or two gated stacks without a blind spot."""

from collections.abc import Iterator, Sequence
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from pyro_flowguides.vae.decoders.autoregressive_decoder import AutoregressiveNetwork, ContextProjection, GenerationStep
from pyro_flowguides.vae.decoders.causal_conv import MaskedConv2d, PaddedConv2d, shift_down, split_reach
from pyro_flowguides.vae.decoders.image_networks import CachedWindow, MapRegion, TwoStackNetwork

__all__ = ["GatedPixelCNN", "PixelCNN"]


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

    The arguments ``features``, ``maps``, ``groups`` and the shapes are those of :class:`AutoregressiveNetwork`.

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
        self, shape: Sequence[int], outputs: int, *, filters: int = 12, reach: int = 6, depth: int = 10, **options: int
    ) -> None:
        super().__init__(shape, outputs, **options)
        first, *others = split_reach("PixelCNN", reach, depth)
        self.reach = reach
        self.first = MaskedConv2d(shape[0], filters, first, first, first, groups=self.groups, strict=True)
        self.context_projection = ContextProjection(self.features, self.maps, filters, reach=first)
        self.blocks = nn.ModuleList(_Block(filters, each, self.groups) for each in others)
        self.last = MaskedConv2d(filters, outputs, groups=self.groups)

    def _outputs(self, x: Tensor, region: MapRegion) -> Tensor:
        """Return the outputs in a region of the image."""
        h = region.apply_to_map(self.first, x) + region.context(self.context_projection)
        for block in self.blocks:
            h = block(h, region)
        return region.apply(self.last, F.elu(h))

    def evaluate(self, x: Tensor, contexts: dict[nn.Module, Tensor]) -> Tensor:
        return self._outputs(x, MapRegion(contexts))

    def outputs_by_step(self, x: Tensor, contexts: dict[nn.Module, Tensor]) -> Iterator[tuple[GenerationStep, Tensor]]:
        pixel = CachedWindow(len(x), self.shape[1:], contexts)
        for step in self.steps():
            yield step, self._outputs(x, pixel.move_to_pixel(*step.position))[..., 0, 0]


def _gate(h: Tensor) -> Tensor:
    signal, gate = h.chunk(2, 1)
    return signal.tanh() * gate.sigmoid()


class _GatedLayer(nn.Module):
    """One gated layer of both stacks; the first layer reads the image, the others read features."""

    def __init__(
        self, channels: int, filters: int, reach: int, features: int, maps: int, groups: int, *, first: bool
    ) -> None:
        super().__init__()
        # The first layer reads the image shifted down by one row, so that its kernel covers one row less above.
        self.vertical_conv = PaddedConv2d(channels, 2 * filters, reach - first, reach, reach)
        self.horizontal_conv = MaskedConv2d(channels, 2 * filters, 0, reach, groups=groups, strict=first)
        self.vertical_to_horizontal = nn.Conv2d(2 * filters, 2 * filters, 1)
        self.mix = MaskedConv2d(filters, filters, groups=groups)
        self.vertical_context_projection = None if first else ContextProjection(features, maps, 2 * channels)
        self.context_projection = ContextProjection(features, maps, 2 * filters)

    def vertical(self, v: Tensor, region: MapRegion) -> Tensor:
        """Return the vertical stack after this layer, before its gate."""
        if self.vertical_context_projection is None:
            return region.apply_to_map(self.vertical_conv, v)
        return region.apply(self.vertical_conv, _gate(v + region.context(self.vertical_context_projection)))

    def horizontal(self, h: Tensor, above: Tensor, region: MapRegion) -> Tensor:
        """Return the residual of the horizontal stack."""
        reads_image = self.vertical_context_projection is None
        across = (region.apply_to_map if reads_image else region.apply)(self.horizontal_conv, h)
        return region.apply(self.mix, _gate(across + region.crop(above) + region.context(self.context_projection)))


class GatedPixelCNN(TwoStackNetwork[list[Tensor]]):
    r"""Gated PixelCNN: convolutions with multiplicative gates in two stacks.

    .. math::
        y = \tanh(W_f * x + V_f c) \odot \sigma(W_g * x + V_g c)

    The vertical stack v reads all columns of the rows strictly above. The horizontal stack h is residual and reads the
    current row to the left and, through a 1×1 convolution in every layer, v: together all earlier pixels within reach.
    Every layer reads the context c.

    A pixel (i, j) reads exactly the columns j − reach … j + reach of the rows i − reach … i − 1, and the columns
    j − reach … j − 1 of row i: there is no blind spot. ``reach`` is split over ``depth`` layers as evenly as possible.

    Cost: that of :class:`AutoregressiveNetwork`. :meth:`generate` evaluates the vertical stack once per row, for the
    whole row, and the horizontal stack once per pixel.

    Args:
        filters: channels of the hidden layers, a multiple of ``groups``.
        reach: total reach, in pixels.
        depth: number of gated layers.

    The arguments ``features``, ``maps``, ``groups`` and the shapes are those of :class:`AutoregressiveNetwork`.

    References:
        A. van den Oord, N. Kalchbrenner, O. Vinyals, L. Espeholt, A. Graves, K. Kavukcuoglu (2016). Conditional image
        generation with PixelCNN decoders. arXiv:1606.05328.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import GatedPixelCNN
        >>> net = GatedPixelCNN((3, 8, 8), outputs=3 * 256, filters=12, reach=3, depth=2, features=5, groups=3)
        >>> net(torch.zeros(2, 3, 8, 8), features=torch.randn(2, 5)).shape
        torch.Size([2, 768, 8, 8])
    """

    def __init__(
        self, shape: Sequence[int], outputs: int, *, filters: int = 36, reach: int = 6, depth: int = 6, **options: int
    ) -> None:
        super().__init__(shape, outputs, **options)
        self._check_width("filters", filters)
        self.reach = reach
        sizes = self.features, self.maps, self.groups
        layers = nn.ModuleList(
            _GatedLayer(shape[0] if i == 0 else filters, filters, each, *sizes, first=i == 0)
            for i, each in enumerate(split_reach("GatedPixelCNN", reach, depth))
        )
        self.layers = cast("Sequence[_GatedLayer]", layers)
        self.hidden = MaskedConv2d(filters, filters, groups=self.groups)
        self.last = MaskedConv2d(filters, outputs, groups=self.groups)

    def vertical(self, x: Tensor, region: MapRegion) -> list[Tensor]:
        """Return what each layer of the horizontal stack reads from the vertical stack."""
        v, above = shift_down(x), []
        for layer in self.layers:
            v = layer.vertical(v, region)
            above.append(layer.vertical_to_horizontal(v))
        return above

    def horizontal(self, x: Tensor, above: list[Tensor], region: MapRegion) -> Tensor:
        first, *others = self.layers
        h = first.horizontal(x, above[0], region)
        for layer, features in zip(others, above[1:], strict=True):
            h = h + layer.horizontal(h, features, region)
        return region.apply(self.last, F.relu(region.apply(self.hidden, F.relu(h))))
