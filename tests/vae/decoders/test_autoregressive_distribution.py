"""Autoregressive networks as distributions: total probability, agreement of draws and densities, use in Pyro."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO

from pyro_flowguides.vae import (
    AgnosticMADE,
    AutoregressiveDistribution,
    DiagonalBiLSTM,
    GatedPixelCNN,
    IndependentChannels,
    PixelCNN,
    PixelCNNPlusPlus,
    PixelRNN,
    RowLSTM,
    WaveNet,
)
from tests.vae.decoders.cases import generate_by_full_passes

SHAPE, WIDE = (1, 2, 3), (2, 2, 2)

#: Networks over binary data small enough to enumerate.
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
    """Return a network in double precision with weights that make the values strongly dependent."""
    network = NETWORKS[name]().double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
            parameter.copy_(torch.randn_like(parameter) * 2 / fan_in**0.5)
    return network


def make_distribution(network, batch=()):
    features = torch.randn(*batch, 2, dtype=torch.float64)
    return AutoregressiveDistribution(network, IndependentChannels("bernoulli", network.shape[0]), features)


def all_binary_data(shape):
    """Return all binary data of a shape."""
    size = math.prod(shape)
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=size)), dtype=torch.float64).reshape(-1, *shape)


@pytest.mark.parametrize("name", NETWORKS)
def test_probabilities_sum_to_one(name):
    network = build(name)
    probabilities = make_distribution(network).log_prob(all_binary_data(network.shape)).exp()
    assert probabilities.std() > 1e-3
    torch.testing.assert_close(probabilities.sum().item(), 1.0, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", NETWORKS)
def test_draws_follow_the_density(name):
    """Pearson's statistic of 4,000 draws; data with an expected count below five share one cell."""
    network = build(name)
    p = make_distribution(network)
    data = all_binary_data(network.shape)
    expected, draws = 4000 * p.log_prob(data).exp(), p.sample((4000,))
    powers = 2 ** torch.arange(math.prod(network.shape) - 1, -1, -1)
    observed = (draws.flatten(1).long() @ powers).bincount(minlength=len(data)).double()
    frequent = expected >= 5
    expected = torch.cat([expected[frequent], expected[~frequent].sum()[None]])
    observed = torch.cat([observed[frequent], observed[~frequent].sum()[None]])
    statistic, freedom = ((observed - expected).square() / expected.clamp(min=1)).sum(), len(expected) - 1
    assert freedom >= 2
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("name", ["gated", "ensemble of orderings", "wavenet"])
def test_batches_of_features_and_values_broadcast(name):
    network = build(name)
    p = make_distribution(network, (4,))
    assert p.batch_shape == (4,)
    assert p.event_shape == network.shape
    x = p.sample((3,))
    assert x.shape == (3, 4, *network.shape)
    log_prob = p.log_prob(x)
    assert log_prob.shape == (3, 4)
    for s, b in itertools.product(range(3), range(4)):
        alone = AutoregressiveDistribution(network, p.likelihood, p.features[b])
        torch.testing.assert_close(alone.log_prob(x[s, b]), log_prob[s, b])
    torch.testing.assert_close(p.log_prob(x[0, 0]), p.expand((4,)).log_prob(x[0, :1]))
    assert p.expand((5, 4)).sample().shape == (5, 4, *network.shape)


def test_batches_of_maps():
    network = PixelCNN((1, 3, 4), 1, reach=1, depth=2, maps=2).double()
    maps = torch.randn(2, 3, 2, 3, 4, dtype=torch.float64)
    p = AutoregressiveDistribution(network, IndependentChannels("bernoulli", 1), maps=maps)
    x = p.sample()
    assert x.shape == (2, 3, 1, 3, 4)
    alone = network(x[1, 2][None], maps=maps[1, 2][None])[0, :, :, :, None]
    torch.testing.assert_close(p.log_prob(x)[1, 2], p.likelihood.values.log_prob(alone, x[1, 2]).sum())


def test_an_ensemble_averages_the_densities_of_its_orderings():
    network = build("ensemble of orderings")
    p, x = make_distribution(network), all_binary_data(network.shape)
    members = [AutoregressiveDistribution(member, p.likelihood, p.features) for member in network.members()]
    densities = torch.stack([member.log_prob(x).exp() for member in members])
    assert (densities.std(0) > 1e-6).any()
    torch.testing.assert_close(p.log_prob(x).exp(), densities.mean(0))


def test_an_ensemble_trains_one_ordering_at_a_time():
    network = build("ensemble of orderings").train()
    p, x = make_distribution(network), all_binary_data(network.shape)[5]
    values = {round(p.log_prob(x).item(), 9) for _ in range(50)}
    assert len(values) == 3


def test_in_a_pyro_program():
    """Evaluate the density in a plate, train by SVI with vectorized particles, and draw with Predictive."""
    network = PixelCNN((1, 4, 4), 1, filters=6, reach=2, depth=2, features=2)
    pixels = IndependentChannels("bernoulli", 1)

    def model(x=None):
        pyro.module("network", network)
        with pyro.plate("data", 8, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1).to_event(1))
            return pyro.sample("x", AutoregressiveDistribution(network, pixels, z), obs=x)

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


def test_errors_name_sizes_and_support():
    network, pixels = PixelCNN((1, 4, 4), 1, reach=1, depth=1), IndependentChannels("logistic", 1)
    with pytest.raises(ValueError, match="1 outputs for 1 channels, the likelihood needs 2 for 1"):
        AutoregressiveDistribution(network, pixels)
    with pytest.raises(ValueError, match="within the support"):
        AutoregressiveDistribution(network, IndependentChannels("bernoulli", 1), validate_args=True).log_prob(
            torch.full((1, 4, 4), 2.0)
        )


@pytest.mark.gpu
@pytest.mark.parametrize("name", NETWORKS)
def test_gpu_results_equal_those_of_the_cpu(name):
    """Log densities agree, and caches change nothing on the GPU either."""
    network = build(name)
    p = make_distribution(network, (3,))
    x = p.sample()
    expected, features = p.log_prob(x), p.features.cuda()
    network.cuda()
    on_gpu = AutoregressiveDistribution(network, p.likelihood, features)
    torch.testing.assert_close(on_gpu.log_prob(x.cuda()).cpu(), expected)
    assert on_gpu.sample().device.type == "cuda"

    def draw(outputs):
        return (outputs[:, : network.shape[0]] > 0).double()

    for member in network.members():
        assert torch.equal(member.generate(draw, 3, features), generate_by_full_passes(member, draw, 3, features))
