"""Autoregressive decoders as distributions: they sum to one, draw what they score, and behave as Pyro expects."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO

from pyro_flowguides.vae import Autoregressive, DiscretizedLogisticMixture, IndependentChannels, PixelLogisticMixture
from pyro_flowguides.vae.decoders import (
    AgnosticMADE,
    DiagonalBiLSTM,
    GatedPixelCNN,
    PixelCNN,
    PixelCNNPlusPlus,
    PixelRNN,
    RowLSTM,
    WaveNet,
)

SHAPE, WIDE = (1, 2, 3), (2, 2, 2)

#: Networks over binary data so small that all of them can be listed; the same options as for any other.
NETWORKS = {
    "pixelcnn": lambda: PixelCNN(SHAPE, 1, reach=2, depth=3, features=2),
    "pixelcnn, two channels": lambda: PixelCNN(WIDE, 2, reach=2, depth=3, groups=2, features=2),
    "gated": lambda: GatedPixelCNN(WIDE, 2, filters=8, reach=2, depth=2, groups=2, features=2),
    "pixelcnn++": lambda: PixelCNNPlusPlus(WIDE, 2, filters=6, blocks=1, levels=2, features=2),
    "row lstm": lambda: PixelRNN(WIDE, 2, recurrent=RowLSTM, hidden=4, depth=2, groups=2, features=2),
    "diagonal lstm": lambda: PixelRNN(SHAPE, 1, recurrent=DiagonalBiLSTM, hidden=4, depth=2, features=2),
    "wavenet": lambda: WaveNet((1, 6), 1, dilations=[1, 2], features=2),
    "made": lambda: AgnosticMADE(SHAPE, 1, hidden_dims=[12], orderings=1, features=2),
    "ensemble of orderings": lambda: AgnosticMADE(WIDE, 2, hidden_dims=[12, 12], orderings=3, features=2),
}


def build(name):
    """At weights at which values depend on each other strongly."""
    network = NETWORKS[name]().double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
            parameter.copy_(torch.randn_like(parameter) * 2 / fan_in**0.5)
    return network


def distribution(network, batch=()):
    features = torch.randn(*batch, 2, dtype=torch.float64)
    return Autoregressive(network, IndependentChannels("bernoulli", network.shape[0]), features)


def everything(shape):
    """All binary data of a shape."""
    size = math.prod(shape)
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=size)), dtype=torch.float64).reshape(-1, *shape)


@pytest.mark.parametrize("name", NETWORKS)
def test_probabilities_of_all_data_sum_to_one(name):
    network = build(name)
    probabilities = distribution(network).log_prob(everything(network.shape)).exp()
    assert probabilities.std() > 1e-3
    torch.testing.assert_close(probabilities.sum().item(), 1.0, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", NETWORKS)
def test_draws_have_the_probabilities_they_are_scored_with(name):
    """Pearson's statistic of 4,000 draws, over all data expected five times or more and one cell for the rest."""
    network = build(name)
    p = distribution(network)
    data = everything(network.shape)
    expected, draws = 4000 * p.log_prob(data).exp(), p.sample((4000,))
    powers = 2 ** torch.arange(math.prod(network.shape) - 1, -1, -1)
    observed = (draws.flatten(1).long() @ powers).bincount(minlength=len(data)).double()
    often = expected >= 5
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    observed = torch.cat([observed[often], observed[~often].sum()[None]])
    statistic, freedom = ((observed - expected).square() / expected.clamp(min=1)).sum(), len(expected) - 1
    assert freedom >= 2
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("name", ["gated", "ensemble of orderings", "wavenet"])
def test_batches_of_features_and_values_broadcast(name):
    network = build(name)
    p = distribution(network, (4,))
    assert p.batch_shape == (4,)
    assert p.event_shape == network.shape
    x = p.sample((3,))
    assert x.shape == (3, 4, *network.shape)
    found = p.log_prob(x)
    assert found.shape == (3, 4)
    for s, b in itertools.product(range(3), range(4)):
        alone = Autoregressive(network, p.likelihood, p.features[b])
        torch.testing.assert_close(alone.log_prob(x[s, b]), found[s, b])
    torch.testing.assert_close(p.log_prob(x[0, 0]), p.expand((4,)).log_prob(x[0, :1]))
    assert p.expand((5, 4)).sample().shape == (5, 4, *network.shape)


def test_maps_of_a_batch():
    network = PixelCNN((1, 3, 4), 1, reach=1, depth=2, maps=2).double()
    maps = torch.randn(2, 3, 2, 3, 4, dtype=torch.float64)
    p = Autoregressive(network, IndependentChannels("bernoulli", 1), maps=maps)
    x = p.sample()
    assert x.shape == (2, 3, 1, 3, 4)
    alone = network(x[1, 2][None], maps=maps[1, 2][None])[0, :, :, :, None]
    torch.testing.assert_close(p.log_prob(x)[1, 2], p.likelihood.values.log_prob(alone, x[1, 2]).sum())


def test_the_ensemble_averages_its_orderings():
    network = build("ensemble of orderings")
    p, x = distribution(network), everything(network.shape)
    each = torch.stack([Autoregressive(m, p.likelihood, p.features).log_prob(x).exp() for m in network.members()])
    assert (each.std(0) > 1e-6).any()
    torch.testing.assert_close(p.log_prob(x).exp(), each.mean(0))


def test_the_ensemble_trains_one_ordering_at_a_time():
    network = build("ensemble of orderings").train()
    p, x = distribution(network), everything(network.shape)[5]
    values = {round(p.log_prob(x).item(), 9) for _ in range(50)}
    assert len(values) == 3


def test_in_a_pyro_program():
    """Scored in a plate, drawn by Predictive, trained by SVI with vectorized particles."""
    network = PixelCNN((1, 4, 4), 1, filters=6, reach=2, depth=2, features=2)
    pixels = IndependentChannels("bernoulli", 1)

    def model(x=None):
        pyro.module("network", network)
        with pyro.plate("data", 8, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1).to_event(1))
            return pyro.sample("x", Autoregressive(network, pixels, z), obs=x)

    def guide(x=None):
        loc = pyro.param("loc", torch.zeros(8, 2))
        with pyro.plate("data", 8, dim=-1):
            pyro.sample("z", dist.Normal(loc, 1).to_event(1))

    x = (torch.arange(16).reshape(1, 1, 4, 4) % 3 == torch.arange(8).reshape(8, 1, 1, 1) % 3).float()
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), elbo)
    losses = [svi.step(x) for _ in range(120)]
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
    draws = Predictive(model, guide=guide, num_samples=3)()["x"]
    assert draws.shape == (3, 8, 1, 4, 4)
    assert ((draws == 0) | (draws == 1)).all()


def test_errors():
    network, pixels = PixelCNN((1, 4, 4), 1, reach=1, depth=1), IndependentChannels("logistic", 1)
    with pytest.raises(ValueError, match="1 outputs for 1 channels, the likelihood needs 2 for 1"):
        Autoregressive(network, pixels)
    with pytest.raises(ValueError, match="within the support"):
        Autoregressive(network, IndependentChannels("bernoulli", 1), validate_args=True).log_prob(
            torch.full((1, 4, 4), 2.0)
        )


# -- mixtures over whole pixels ----------------------------------------------------------------------------------------


def test_one_channel_is_the_mixture_of_a_value():
    pixels, values = PixelLogisticMixture(1, components=4), DiscretizedLogisticMixture(4)
    numbers = torch.randn(6, 12, 256, dtype=torch.float64)
    x = torch.arange(256).expand(6, 1, 256)
    expected = values.log_prob(numbers.movedim(1, -1), x[:, 0])
    torch.testing.assert_close(pixels.log_prob(numbers, x), expected)


def test_two_channels_sum_to_one_and_depend_on_each_other():
    pixels = PixelLogisticMixture(2, components=3)
    numbers = torch.randn(1, pixels.outputs, 1, dtype=torch.float64)
    numbers[:, 9:15] = -2  # log scales
    numbers[:, 15:] = 3  # coefficients
    grid = torch.cartesian_prod(torch.arange(256), torch.arange(256)).T[None]
    p = pixels.log_prob(numbers.expand(-1, -1, 65536), grid).exp().reshape(256, 256)
    torch.testing.assert_close(p.sum().item(), 1.0, rtol=1e-9, atol=0)
    values = torch.arange(256, dtype=torch.float64)
    rows = p / p.sum(1, keepdim=True)
    assert (rows @ values)[200] > (rows @ values)[60] + 20


def test_draws_of_two_channels_follow_the_density():
    """Means, spreads and correlation of 20,000 draws, within five standard errors of those of the density."""
    pixels = PixelLogisticMixture(2, components=2)
    numbers = torch.randn(1, pixels.outputs, 1, dtype=torch.float64)
    numbers[:, 6:10], numbers[:, 10:] = -1.5, 2.0
    grid = torch.cartesian_prod(torch.arange(256), torch.arange(256)).T[None]
    p = pixels.log_prob(numbers.expand(-1, -1, 65536), grid).exp()[0]
    draws = pixels.draw(numbers[..., 0].expand(20000, -1))
    a, b = grid[0].double()
    for statistic in (lambda a, b: a, lambda a, b: b, lambda a, b: a * b, lambda a, b: a**2, lambda a, b: b**2):
        mean = (p * statistic(a, b)).sum()
        deviation = (p * (statistic(a, b) - mean) ** 2).sum().sqrt()
        assert (statistic(*draws.T).mean() - mean).abs() < 5 * deviation / 20000**0.5


def test_values_and_gradients_are_finite_far_out():
    pixels = PixelLogisticMixture(3, components=2)
    numbers = (15 * torch.randn(40, pixels.outputs, 1)).requires_grad_()
    x = torch.tensor([0, 255, 128])[None, :, None].expand(40, 3, 1)
    value = pixels.log_prob(numbers, x)
    value.sum().backward()
    assert value.isfinite().all()
    assert numbers.grad.isfinite().all()


def test_bad_sizes():
    with pytest.raises(ValueError, match="channels, components >= 1"):
        PixelLogisticMixture(3, components=0)


# -- elsewhere ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_on_a_gpu(name):
    """Scores as on the CPU; caches change nothing there either."""
    network = build(name)
    p = distribution(network, (3,))
    x = p.sample()
    expected, features = p.log_prob(x), p.features.cuda()
    network.cuda()
    there = Autoregressive(network, p.likelihood, features)
    torch.testing.assert_close(there.log_prob(x.cuda()).cpu(), expected)
    assert there.sample().device.type == "cuda"

    def draw(numbers):
        return (numbers[:, : network.shape[0]] > 0).double()

    for member in network.members():
        assert torch.equal(member.generate(draw, 3, features), member.generate_by_full_passes(draw, 3, features))
