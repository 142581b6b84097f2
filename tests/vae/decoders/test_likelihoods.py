"""Likelihoods: total probability, agreement of moments and draws, stable gradients."""

import pyro.distributions as dist
import pytest
import torch

from pyro_flowguides.vae import LIKELIHOODS, Bernoulli, DiscretizedLogisticMixture
from pyro_flowguides.vae.decoders.likelihoods import get_likelihood

PIXELS = [name for name in LIKELIHOODS if name != "bernoulli"]


@pytest.fixture(autouse=True)
def _double_precision(_fresh_state):
    torch.set_default_dtype(torch.float64)


def random_params(likelihood, *shape, scale=2.0):
    return scale * torch.randn(*shape, likelihood.parameters_per_value)


@pytest.mark.parametrize("scale", [0.1, 2.0, 20.0])
@pytest.mark.parametrize("name", PIXELS)
def test_the_256_probabilities_sum_to_one(name, scale):
    likelihood = get_likelihood(name)
    params = random_params(likelihood, 7, scale=scale)[:, None].expand(7, 256, -1)
    total = likelihood.log_prob(params, torch.arange(256)).exp().sum(-1)
    torch.testing.assert_close(total, torch.ones(7), rtol=1e-10, atol=0)


def test_bernoulli_equals_that_of_pyro():
    logits, x = 3 * torch.randn(5, 4), torch.randint(0, 2, (5, 4)).to(torch.get_default_dtype())
    torch.testing.assert_close(Bernoulli().log_prob(logits[..., None], x), dist.Bernoulli(logits=logits).log_prob(x))


def test_intensities_give_the_expected_log_probability_of_bits():
    logits, x = torch.tensor([1.5]), 0.3
    bits = Bernoulli().log_prob(logits[:, None], torch.tensor([[0.0], [1.0]]))
    intensity = Bernoulli().log_prob(logits[:, None], torch.tensor([x]))
    torch.testing.assert_close(intensity, (1 - x) * bits[0] + x * bits[1])


def test_discretized_logistic_is_a_difference_of_cumulative_probabilities():
    likelihood = get_likelihood("logistic")
    params = torch.tensor([0.2, -1.0])
    scale = (7 * torch.tensor(-1.0 / 7).tanh()).exp()
    x = torch.tensor([0.0, 17.0, 128.0, 200.0, 255.0])
    ends = torch.stack([x - 0.5, x + 0.5]) / 127.5 - 1
    cdf = ((ends - 0.2) / scale).sigmoid()
    cdf[0, 0], cdf[1, -1] = 0, 1
    torch.testing.assert_close(likelihood.log_prob(params, x).exp(), cdf[1] - cdf[0])


def test_a_mixture_of_equal_components_equals_the_component():
    single, mixture = get_likelihood("logistic"), DiscretizedLogisticMixture(components=3)
    x, (loc, raw) = torch.arange(256), (0.3, -2.0)
    params = torch.tensor([0.1, 0.5, -2.0] + [loc] * 3 + [raw] * 3)
    torch.testing.assert_close(mixture.log_prob(params, x), single.log_prob(torch.tensor([loc, raw]), x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["logistic", "logistic_mixture"])
def test_far_and_narrow_logistics_have_finite_values_and_gradients(name, dtype):
    likelihood = get_likelihood(name)
    locs = torch.tensor([-1e3, -1.0, 0.0, 1.0, 1e3]).to(dtype)
    raws = torch.tensor([-1e3, -7.0, 0.0, 7.0, 1e3]).to(dtype)
    pairs = torch.cartesian_prod(locs, raws)
    copies = likelihood.parameters_per_value // 3 or 1
    logits = [torch.zeros(len(pairs), copies, dtype=dtype)] if name == "logistic_mixture" else []
    params = torch.cat([*logits, pairs[:, :1].expand(-1, copies), pairs[:, 1:].expand(-1, copies)], -1)
    params = params[:, None].repeat(1, 4, 1).requires_grad_()
    value = likelihood.log_prob(params, torch.tensor([0, 1, 127, 255]))
    assert value.isfinite().all()
    (gradient,) = torch.autograd.grad(value.sum(), params)
    assert gradient.isfinite().all()


def test_the_gradient_does_not_vanish_far_from_the_location():
    """Where both ends of the interval are in one tail, the log mass is linear in the location: slope 1 at scale 1."""
    likelihood = get_likelihood("logistic")
    params = torch.tensor([30.0, 0.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(likelihood.log_prob(params, torch.tensor(127.0)), params)
    torch.testing.assert_close(gradient[0], torch.tensor(-1.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", PIXELS)
def test_the_mean_is_the_probability_weighted_sum_of_the_values(name):
    likelihood = get_likelihood(name)
    params = random_params(likelihood, 6)
    values = torch.arange(256, dtype=params.dtype)
    probabilities = likelihood.log_prob(params[:, None].expand(6, 256, -1), values).exp()
    torch.testing.assert_close(likelihood.mean(params), probabilities @ values)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_draws_have_the_stated_mean_and_support(name):
    likelihood = get_likelihood(name)
    params = random_params(likelihood, 3, scale=0.7)
    draws = likelihood.distribution(params).sample((20_000,))
    assert likelihood.support.check(draws).all()
    error = draws.std(0) / 20_000**0.5
    assert ((draws.mean(0) - likelihood.mean(params)).abs() < 4.5 * error).all()


@pytest.mark.parametrize("name", PIXELS)
def test_draws_follow_the_probabilities(name):
    likelihood = get_likelihood(name)
    params = random_params(likelihood, 1, scale=1.0)[0]
    draws = likelihood.sample(params.expand(40_000, -1)).long()
    frequencies = torch.bincount(draws, minlength=256)[[0, 100, 128, 255]] / 40_000
    p = likelihood.log_prob(params, torch.tensor([0, 100, 128, 255])).exp()
    assert ((frequencies - p).abs() < 4.5 * (p * (1 - p) / 40_000).sqrt() + 1e-4).all()


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_as_a_pyro_distribution(name):
    likelihood = get_likelihood(name)
    params, x = random_params(likelihood, 5, 3), torch.ones(5, 3)
    d = likelihood.distribution(params).to_event(1)
    assert (d.batch_shape, d.event_shape) == ((5,), (3,))
    torch.testing.assert_close(d.log_prob(x), likelihood.log_prob(params, x).sum(-1))
    wide = likelihood.distribution(params).expand([2, 5, 3])
    torch.testing.assert_close(wide.log_prob(x), likelihood.log_prob(params, x).expand(2, 5, 3))
    torch.testing.assert_close(d.mean, likelihood.mean(params))
    with pytest.raises(ValueError, match="support"):
        d.log_prob(torch.full((5, 3), 256.5))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
@pytest.mark.parametrize("name", PIXELS)
def test_pixels_of_any_dtype(name, dtype):
    likelihood = get_likelihood(name)
    params, x = random_params(likelihood, 6), torch.tensor([0, 1, 100, 128, 254, 255])
    torch.testing.assert_close(likelihood.log_prob(params, x.to(dtype)), likelihood.log_prob(params, x))


@pytest.mark.parametrize(("name", "x"), [("bernoulli", [0.0, 7.0]), ("bernoulli", [float("nan")]), ("logistic", [0.5])])
def test_wrong_data_raise_an_error_with_the_remedy(name, x):
    with pytest.raises(ValueError, match=r"the data must be .* by 255"):
        get_likelihood(name).check(torch.tensor(x))


def test_unknown_names_and_wrong_sizes():
    with pytest.raises(ValueError, match="known likelihoods: bernoulli"):
        get_likelihood("gaussian")
    with pytest.raises(ValueError, match="components"):
        DiscretizedLogisticMixture(0)
