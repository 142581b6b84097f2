"""The hierarchical ResNet-IAF: its autoregressive steps, its densities, and the programs made of them."""

import copy
import math

import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO

from pyro_flowguides.vae import MODELS, ConvIAF, ELBOLoss
from pyro_flowguides.vae.models.ladder import Gaussian
from tests.conftest import seed_everything
from tests.transforms.families import jacobian, randomize


@pytest.fixture(autouse=True)
def _double_precision(_fresh_state):
    torch.set_default_dtype(torch.float64)


orders = pytest.mark.parametrize("reverse", [False, True], ids=["raster", "reversed"])
EVENT = torch.Size((3, 4, 5))


def step(reverse, scale=0.2):
    return randomize(ConvIAF(3, context_channels=2, width=7, reverse=reverse), scale)


@orders
def test_a_step_is_autoregressive(reverse):
    """In the stated order the Jacobian is lower triangular, and depends on the preceding coordinate."""
    iaf, x, context = step(reverse), torch.randn(2, *EVENT), torch.randn(2, 2, 4, 5)

    def flat(v):  # jacobian() sends copies of the batch through
        return iaf(v.unflatten(-1, EVENT), context.expand(*v.shape[:-1], 2, 4, 5))[0].flatten(-3)

    j = jacobian(flat, x.flatten(1))
    order = iaf.rank(EVENT).argsort()
    j = j[:, order][:, :, order]
    assert (j.triu(1) == 0).all()
    assert (j.diagonal(dim1=-2, dim2=-1) > 0).all()
    below = j.diagonal(-1, dim1=-2, dim2=-1).reshape(-1)
    assert (below[torch.arange(len(below)) % 15 != 14] != 0).float().mean() > 0.95  # within a row of 5 pixels
    _, log_scale = iaf(x, context)
    torch.testing.assert_close(log_scale.flatten(1).sum(-1), torch.linalg.slogdet(j).logabsdet)


@orders
def test_a_step_inverts(reverse):
    iaf, x, context = step(reverse), 2 * torch.randn(2, 3, *EVENT), torch.randn(2, 3, 2, 4, 5)
    y, log_scale = iaf(x, context)
    back, inverse_log_scale = iaf.inverse(y, context)
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(inverse_log_scale, log_scale, rtol=1e-8, atol=1e-8)


@orders
def test_a_step_starts_at_the_identity_and_reads_its_context_everywhere(reverse):
    x, context = torch.randn(2, *EVENT), torch.randn(2, 2, 4, 5)
    y, log_scale = ConvIAF(3, 2, 7, reverse=reverse)(x, context)
    torch.testing.assert_close(y, x)
    assert log_scale.abs().max() == 0
    iaf = step(reverse)
    assert ((iaf(x, context + 1)[1] - iaf(x, context)[1]).abs() > 0).all()


@orders
def test_the_context_acts_near_its_pixel(reverse):
    """Against the order, it affects only its 3 × 3 window."""
    iaf, x, context = step(reverse), torch.zeros(1, 3, 9, 9), torch.zeros(1, 2, 9, 9)
    context[..., 4, 4] = 1
    changed = (iaf(x, context)[1] != iaf(x, torch.zeros_like(context))[1])[0].any(0)
    places = changed.flip((0, 1)) if reverse else changed
    assert places[4, 4]
    assert places[3, 3]
    assert not places[:3].any()
    assert not places[3, :3].any()


def test_gaussians():
    gaussian = Gaussian.from_statistics(torch.randn(2, 6, 4, 5))
    z = gaussian.draw(torch.randn(2, 3, 4, 5))
    expected = torch.distributions.Normal(gaussian.loc, gaussian.log_scale.exp()).log_prob(z)
    torch.testing.assert_close(gaussian.log_prob(z), expected)


# -- the model ---------------------------------------------------------------------------------------------------------

SHAPE = (3, 8, 6)


def small(shape=SHAPE, **options):
    options = {"likelihood": "logistic", "latent_dim": 2, "hidden": 6, "scales": 2, "layers": 2, **options}
    vae = MODELS["hierarchical"](shape, **options)
    x = torch.randint(0, 256, (4, *shape))
    vae.initialize(x)
    for name, parameter in vae.named_parameters():
        if ".steps." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return vae, x


def test_shapes_and_groups():
    vae, x = small()
    terms = vae.terms(x, num_samples=3)
    assert vae.latent_dim == 2 * (4 * 3 + 4 * 3 + 2 * 2 + 2 * 2)
    assert terms.z.shape == (3, 4, vae.latent_dim)
    assert terms.kl.shape == (3, 4, 4 * 2)
    assert terms.log_likelihood.shape == (3, 4)


@pytest.mark.parametrize("shape", [(1, 5, 7), (1, 28, 28), (3, 9, 4)])
@pytest.mark.parametrize("steps", [0, 2])
def test_any_image_and_every_parameter_learns(shape, steps):
    posterior = {"posterior_options": {"steps": steps}} if steps else {"posterior": "normal"}
    vae, x = small(shape, **posterior)
    loss, _ = ELBOLoss(free_bits=0.01)(vae.terms(x), step=0)
    loss.backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert vae.sample(2).shape == (2, *shape)
    assert vae.reconstruct(x).shape == x.shape
    grid = vae.traverse(x[:2], dims=[0, 3], values=[-1.0, 1.0])
    assert grid.shape == (2, 2, 2, *shape)


def test_draws_and_other_values_are_scored_alike():
    vae, x = small(posterior_options={"steps": 2})
    q = vae.posterior_at(x)
    z = q.rsample((3,))
    torch.testing.assert_close(q.log_prob(z.clone()), q.log_prob(z))
    p = vae.prior_distribution().expand([4])
    z = p.rsample((3,))
    torch.testing.assert_close(p.log_prob(z.clone()), p.log_prob(z))


def test_the_prior_density_is_that_of_its_draws():
    """A draw is a map of noise; its density is that of the noise divided by the determinant of the Jacobian."""
    vae, _ = small((1, 4, 4), latent_dim=1, layers=2, scales=1, hidden=3)
    prior = vae.prior_distribution()

    def from_noise(noise):
        parts = iter(noise.split(vae.decoder.latent_dims, -1))

        def choose(index, layer, state):
            return state.prior.draw(next(parts).unflatten(-1, layer.event)), None

        return vae.decoder.descend(noise.shape[0], choose)[1]

    noise = torch.randn(1, vae.latent_dim)
    z = from_noise(noise)
    j = torch.autograd.functional.jacobian(lambda e: from_noise(e)[0], noise)[:, 0]
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(noise).sum(-1) - torch.linalg.slogdet(j).logabsdet
    torch.testing.assert_close(prior.log_prob(z), expected)


def test_groups_are_layers_and_channels():
    """A shift of the prior mean of one channel of the lowest layer changes the divergence of one group."""
    vae, x = small()
    lowest = vae.decoder.layers[-1]
    seed_everything(1)
    before = vae.terms(x).kl
    with torch.no_grad():
        lowest.first.bias[1] += 10  # channel 1 of the locations of the prior
    seed_everything(1)
    changed = (vae.terms(x).kl - before).abs().amax((0, 1)) > 1e-9
    assert changed.tolist() == [False] * 7 + [True]


def test_the_programs_score_the_same_draws_alike():
    vae, x = small()
    seed_everything(1)
    terms = vae.terms(x)
    seed_everything(1)
    guide = poutine.trace(vae.guide).get_trace(x)
    model = poutine.trace(poutine.replay(vae.model, trace=guide)).get_trace(x)
    guide.compute_log_prob()
    model.compute_log_prob()
    torch.testing.assert_close(guide.nodes["z"]["value"], terms.z[0])
    torch.testing.assert_close(model.nodes["x"]["log_prob"], terms.log_likelihood[0])
    kl = guide.nodes["z"]["log_prob"] - model.nodes["z"]["log_prob"]
    torch.testing.assert_close(kl, terms.kl[0].sum(-1))


def test_vectorized_particles():
    vae, x = small()
    options = {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 1}
    seed_everything(1)
    elbo = vae.terms(x, 3).elbo
    seed_everything(1)
    assert Trace_ELBO(**options).loss(vae.model, vae.guide, x) == pytest.approx(-elbo.mean(0).sum().item())
    seed_everything(1)
    expected = (math.log(3) - elbo.logsumexp(0)).sum()
    assert RenyiELBO(alpha=0, **options).loss(vae.model, vae.guide, x) == pytest.approx(expected.item())


def test_copies_have_their_own_prior():
    vae, x = small()
    other = copy.deepcopy(vae)
    z = vae.sample_prior(2)
    randomize(other.decoder, 0.3)
    assert not torch.allclose(other.prior_distribution().log_prob(z), vae.prior_distribution().log_prob(z))
    fresh, _ = small()
    fresh.load_state_dict(vae.state_dict())
    torch.testing.assert_close(fresh.prior_distribution().log_prob(z), vae.prior_distribution().log_prob(z))
    assert fresh.log_likelihood(x, num_samples=3).shape == (4,)
