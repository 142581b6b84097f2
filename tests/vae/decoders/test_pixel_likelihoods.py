"""Likelihoods of whole pixels: agreement with the likelihoods of single values, total probability, and draws."""

import pytest
import torch

from pyro_flowguides.vae import DiscretizedLogisticMixture, IndependentChannels, PixelLogisticMixture


def test_with_one_channel_it_is_the_mixture_of_a_single_value():
    pixels, values = PixelLogisticMixture(1, components=4), DiscretizedLogisticMixture(4)
    params = torch.randn(6, 12, 256, dtype=torch.float64)
    x = torch.arange(256).expand(6, 1, 256)
    expected = values.log_prob(params.movedim(1, -1), x[:, 0])
    torch.testing.assert_close(pixels.log_prob(params, x), expected)


def test_two_channels_sum_to_one_and_are_dependent():
    pixels = PixelLogisticMixture(2, components=3)
    params = torch.randn(1, pixels.outputs, 1, dtype=torch.float64)
    params[:, 9:15] = -2  # log scales
    params[:, 15:] = 3  # coefficients
    grid = torch.cartesian_prod(torch.arange(256), torch.arange(256)).T[None]
    p = pixels.log_prob(params.expand(-1, -1, 65536), grid).exp().reshape(256, 256)
    torch.testing.assert_close(p.sum().item(), 1.0, rtol=1e-9, atol=0)
    values = torch.arange(256, dtype=torch.float64)
    conditional_mean = p @ values / p.sum(1)
    assert conditional_mean[200] > conditional_mean[60] + 20


def test_draws_of_two_channels_follow_the_density():
    """First and second moments of 20,000 draws are within five standard errors of those of the density."""
    pixels = PixelLogisticMixture(2, components=2)
    params = torch.randn(1, pixels.outputs, 1, dtype=torch.float64)
    params[:, 6:10], params[:, 10:] = -1.5, 2.0
    grid = torch.cartesian_prod(torch.arange(256), torch.arange(256)).T[None]
    p = pixels.log_prob(params.expand(-1, -1, 65536), grid).exp()[0]
    draws = pixels.draw(params[..., 0].expand(20000, -1))
    a, b = grid[0].double()
    for statistic in (lambda a, b: a, lambda a, b: b, lambda a, b: a * b, lambda a, b: a**2, lambda a, b: b**2):
        mean = (p * statistic(a, b)).sum()
        deviation = (p * (statistic(a, b) - mean) ** 2).sum().sqrt()
        assert (statistic(*draws.T).mean() - mean).abs() < 5 * deviation / 20000**0.5


def test_values_and_gradients_are_finite_far_from_the_locations():
    pixels = PixelLogisticMixture(3, components=2)
    params = (15 * torch.randn(40, pixels.outputs, 1)).requires_grad_()
    x = torch.tensor([0, 255, 128])[None, :, None].expand(40, 3, 1)
    value = pixels.log_prob(params, x)
    value.sum().backward()
    assert value.isfinite().all()
    assert params.grad.isfinite().all()


def test_sizes_must_be_positive():
    with pytest.raises(ValueError, match="PixelLogisticMixture: components must be at least 1, got 0"):
        PixelLogisticMixture(3, components=0)


def test_independent_channels_sum_the_likelihoods_of_the_channels():
    """Output k belongs to channel k % C."""
    pixels = IndependentChannels("logistic", channels=3)
    params, x = torch.randn(2, pixels.outputs, 4, 5), torch.randint(0, 256, (2, 3, 4, 5))
    channels = [pixels.values.log_prob(params[:, c::3].movedim(1, -1), x[:, c]) for c in range(3)]
    torch.testing.assert_close(pixels.log_prob(params, x), torch.stack(channels, 1))
