"""Masks of causal convolutions, and their weight normalization."""

import pytest
import torch

from pyro_flowguides.vae import MaskedConv2d
from pyro_flowguides.vae.decoders.causal_conv import WeightNormMaskedConv2d


@pytest.mark.parametrize("strict", [True, False])
def test_masks_of_three_channels(strict):
    """Red comes before green before blue, and only mask B includes the channel itself; outputs cycle through colors."""
    layer = MaskedConv2d(3, 6, 1, 1, 1, groups=3, strict=strict)
    center = layer.mask[:, :, -1, 1]
    expected = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 0]], dtype=torch.bool) | (not strict) * torch.eye(3).bool()
    assert torch.equal(center, expected.repeat(2, 1))
    assert layer.mask[:, :, 0].all()
    assert layer.mask[:, :, -1, 0].all()
    assert not layer.mask[:, :, -1, 2].any()


def test_weight_normalization_applies_to_the_masked_filters():
    """The gains are the norms of the filters, and weights under the mask have no effect."""
    layer = WeightNormMaskedConv2d(2, 3, 1, 1, 1, strict=True).double()
    with torch.no_grad():
        layer.gain.copy_(torch.tensor([0.5, 1.0, 2.0]))
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    before = layer(x)
    with torch.no_grad():
        layer.weight.masked_fill_(~layer.mask, 1e3)
    weight = layer.effective_weight()
    torch.testing.assert_close(weight.flatten(1).norm(dim=1), layer.gain)
    assert (weight[~layer.mask] == 0).all()
    torch.testing.assert_close(layer(x), before)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 0))
    torch.testing.assert_close(before, torch.nn.functional.conv2d(padded, weight, layer.bias))
