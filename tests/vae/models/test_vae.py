"""The VAE: exact answers, and the direct pass compared with the Pyro programs."""

import copy
import math
import pickle

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO

import pyro_flowguides as fg
from pyro_flowguides.vae import MODELS, NormalPosterior, VampPrior
from tests.conftest import seed_everything
from tests.transforms.families import randomize
from tests.vae.toys import linear_vae


@pytest.fixture(autouse=True)
def _double_precision(_fresh_state):
    torch.set_default_dtype(torch.float64)


def small(model="iafvae", shape=(1, 4, 4), **options):
    options = {"latent_dim": 3, "hidden": [16], **options}
    return MODELS[model](shape, **options)


def gated_image_vae():
    """An IAF posterior and a flow prior at random weights, on a convolutional decoder."""
    vae = MODELS["iafvae"]((1, 4, 4), latent_dim=3, network="gated", hidden=8, prior="maf")
    randomize(vae.posterior, 0.1)
    randomize(vae.prior, 0.1)
    return vae


# -- known answers -----------------------------------------------------------------------------------------------------


def test_every_draw_of_the_exact_posterior_gives_the_exact_bound():
    vae, marginal = linear_vae(NormalPosterior())
    x = marginal.sample((5,))
    elbo = vae.terms(x, num_samples=4).elbo
    torch.testing.assert_close(elbo, marginal.log_prob(x).expand(4, 5))
    torch.testing.assert_close(vae.log_likelihood(x, num_samples=1), marginal.log_prob(x))


@pytest.mark.parametrize(("num_samples", "chunk_size"), [(4000, 4000), (4000, 700), (400, 1)])
def test_importance_weights_correct_a_wrong_posterior(num_samples, chunk_size):
    flow = fg.FlowPosterior(2, 3, "iaf", depth=2, hidden_dims=[8])
    vae, marginal = linear_vae(randomize(flow, 0.04), stretch=1.5)
    x = marginal.sample((3,))
    exact = marginal.log_prob(x)
    assert (vae.terms(x, 2000).elbo.mean(0) < exact - 0.1).all()
    log_weights = vae.terms(x, num_samples).elbo
    error = (log_weights - exact).exp().std(0) / num_samples**0.5
    assert (error < 0.1).all()
    assert ((vae.log_likelihood(x, num_samples, chunk_size) - exact).abs() < 4 * error).all()


def test_the_gap_of_a_wide_posterior_is_its_divergence():
    vae, marginal = linear_vae(NormalPosterior(), stretch=1.5)
    x = marginal.sample((20,))
    gap = (marginal.log_prob(x) - vae.terms(x, 2000).elbo.mean(0)).mean()
    assert gap.item() == pytest.approx(2 * (0.5 * (1.5**2 - 1) - math.log(1.5)), abs=0.02)


# -- one model, two interfaces -----------------------------------------------------------------------------------------


def test_the_programs_score_the_same_draws_alike():
    vae, x = gated_image_vae(), torch.rand(5, 1, 4, 4)
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
    torch.testing.assert_close(kl, terms.kl[0, :, 0])


VECTORIZED = {"num_particles": 4, "vectorize_particles": True, "max_plate_nesting": 1}


@pytest.mark.parametrize("elbo", [Trace_ELBO(), Trace_ELBO(**VECTORIZED), TraceMeanField_ELBO(**VECTORIZED)])
def test_elbos_of_pyro_are_the_mean_of_the_terms(elbo):
    vae, x = gated_image_vae(), torch.rand(5, 1, 4, 4)
    seed_everything(1)
    expected = -vae.terms(x, elbo.num_particles).elbo.mean(0).sum()
    seed_everything(1)
    assert elbo.loss(vae.model, vae.guide, x) == pytest.approx(expected.item(), rel=1e-10)


def test_renyi_elbo_is_the_importance_weighted_bound():
    vae, x = gated_image_vae(), torch.rand(5, 1, 4, 4)
    seed_everything(1)
    expected = (math.log(4) - vae.terms(x, 4).elbo.logsumexp(0)).sum()
    seed_everything(1)
    actual = RenyiELBO(alpha=0, **VECTORIZED).loss(vae.model, vae.guide, x)
    assert actual == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("path_gradient", [False, True])
def test_the_gradients_are_those_of_pyro(path_gradient):
    vae, x = small(posterior_options={"path_gradient": path_gradient}), torch.rand(5, 1, 4, 4)
    randomize(vae.posterior, 0.3)
    seed_everything(1)
    direct = torch.autograd.grad(-vae.terms(x).elbo.sum(), list(vae.parameters()))
    seed_everything(1)
    loss = Trace_ELBO().differentiable_loss(vae.model, vae.guide, x)
    for actual, expected in zip(torch.autograd.grad(loss, list(vae.parameters())), direct, strict=True):
        torch.testing.assert_close(actual, expected)


def test_the_path_gradient_of_the_exact_posterior_is_zero():
    posterior = fg.FlowPosterior(2, 3, "planar", depth=2, path_gradient=True)
    for parameter in posterior.parameters():
        torch.nn.init.zeros_(parameter)  # planar layers with u = 0 are the identity
    vae, marginal = linear_vae(posterior)
    loss = vae.terms(marginal.sample((5,))).elbo.sum()
    gradients = torch.autograd.grad(loss, list(posterior.parameters()), allow_unused=True)
    assert max(g.abs().max().item() for g in gradients if g is not None) < 1e-10


# -- as Pyro programs --------------------------------------------------------------------------------------------------


def train(vae, x, steps=3):
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    return [svi.step(x) for _ in range(steps)]


def snapshot(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def changed_parameters(module, before):
    return {name for name, parameter in module.named_parameters() if not torch.equal(parameter, before[name])}


def test_svi_trains_encoder_flow_decoder_and_prior():
    vae, x = small(prior="realnvp"), torch.rand(5, 1, 4, 4)
    randomize(vae, 0.1)
    before = snapshot(vae)
    train(vae, x)
    assert changed_parameters(vae, before) == before.keys()


def test_two_models_of_one_process_are_independent():
    first, second, x = small(), small(), torch.rand(5, 1, 4, 4)
    train(first, x)
    trained, start = snapshot(first), snapshot(second)
    train(second, x)
    assert changed_parameters(first, trained) == set()
    assert changed_parameters(second, start)
    copied = copy.deepcopy(second)
    trained = snapshot(second)
    train(copied, x)
    assert changed_parameters(second, trained) == set()
    assert changed_parameters(copied, trained)


def test_frozen_parameters_stay():
    vae, x = small(), torch.rand(5, 1, 4, 4)
    vae.decoder.requires_grad_(False)
    before = snapshot(vae)
    train(vae, x)
    changed = changed_parameters(vae, before)
    assert any(name.startswith("encoder") for name in changed)
    assert not any(name.startswith("decoder") for name in changed)


def test_values_of_a_loaded_store_reach_a_new_model(tmp_path):
    vae, x = small(), torch.rand(5, 1, 4, 4)
    train(vae, x)
    pyro.get_param_store().save(str(tmp_path / "store.pt"))
    pyro.clear_param_store()
    pyro.get_param_store().load(str(tmp_path / "store.pt"))
    fresh = small()
    fresh.guide(x)
    poutine.trace(fresh.guide).get_trace(x)
    assert changed_parameters(fresh, snapshot(vae)) == set()


def test_the_decoder_predicts_with_pyros_tools():
    vae, x = gated_image_vae(), torch.rand(5, 1, 4, 4)
    predict = Predictive(poutine.uncondition(vae.model), guide=vae.guide, num_samples=6, parallel=True)
    assert predict(x)["x"].shape == (6, 5, 1, 4, 4)


def test_pickle_and_state_dict():
    vae, x = small(), torch.rand(5, 1, 4, 4)
    again = pickle.loads(pickle.dumps(vae))
    other = small()
    other.load_state_dict(vae.state_dict())
    for module in (again, other):
        seed_everything(1)
        actual = module.terms(x).elbo
        seed_everything(1)
        torch.testing.assert_close(actual, vae.terms(x).elbo)


@pytest.mark.parametrize("model", ["iafvae", "hierarchical", "vlae"])
@pytest.mark.parametrize("likelihood", ["bernoulli", "logistic_mixture"])
def test_mixed_precision_computes_densities_in_single_precision(model, likelihood):
    torch.set_default_dtype(torch.float32)
    vae = MODELS[model]((1, 8, 8), likelihood=likelihood, latent_dim=2)
    x = torch.rand(5, 1, 8, 8) if likelihood == "bernoulli" else torch.randint(0, 256, (5, 1, 8, 8))
    vae.initialize(x)
    seed_everything(1)
    single = vae.terms(x)
    seed_everything(1)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = vae.terms(x)
    assert {part.dtype for part in mixed} == {torch.float32}
    torch.testing.assert_close(mixed.log_likelihood, single.log_likelihood, rtol=0.01, atol=0)
    values = mixed.log_likelihood.detach()
    assert (values != values.bfloat16().float()).any()


# -- inspection --------------------------------------------------------------------------------------------------------


def test_active_units_are_those_that_vary_with_the_data():
    vae, marginal = linear_vae(NormalPosterior())
    vae.encoder.to_mean[:, 1] = 0
    vae.encoder.scale[:] = torch.tensor([0.3, 1.0])
    x = marginal.sample((200,))
    assert vae.active_units(x, num_samples=4).tolist() == [True, False]
    variance = (x @ vae.encoder.to_mean)[:, 0].var().item()
    assert vae.active_units(x, threshold=0.8 * variance).tolist() == [True, False]
    assert vae.active_units(x, threshold=1.2 * variance).tolist() == [False, False]
    with pytest.raises(ValueError, match="at least 2"):
        vae.active_units(x[:1])


def test_samples_of_the_linear_model_have_its_covariance():
    vae, marginal = linear_vae(NormalPosterior())
    draws = vae.sample(20_000)
    torch.testing.assert_close(draws.mT.cov(), marginal.covariance_matrix, atol=0.1, rtol=0)


def test_reconstructions_are_means_at_posterior_draws():
    vae, marginal = linear_vae(NormalPosterior(), stretch=1e-6)
    x = marginal.sample((5,))
    expected = x @ vae.encoder.to_mean @ vae.decoder[0].weight.mT
    torch.testing.assert_close(vae.reconstruct(x), expected, atol=1e-4, rtol=0)


def test_traversals_move_one_coordinate():
    vae, marginal = linear_vae(NormalPosterior(), stretch=1e-6)
    x = marginal.sample((5,))
    grid = vae.traverse(x, dims=[1, 0], values=[-2.0, 0.0, 2.0])
    assert grid.shape == (5, 2, 3, 3)
    z = x @ vae.encoder.to_mean
    z[:, 1] = 2.0
    torch.testing.assert_close(grid[:, 0, 2], z @ vae.decoder[0].weight.mT, atol=1e-4, rtol=0)
    slope = (grid[:, :, 2] - grid[:, :, 0]) / 4
    torch.testing.assert_close(slope, vae.decoder[0].weight.mT[[1, 0]].expand(5, 2, 3), atol=1e-5, rtol=0)


# -- initialization ----------------------------------------------------------------------------------------------------


def test_initialization_does_not_change_plain_networks():
    vae = small()
    before = snapshot(vae)
    vae.initialize(torch.rand(5, 1, 4, 4))
    assert changed_parameters(vae, before) == set()


def test_initialization_starts_pseudo_inputs_at_data():
    vae, x = small("vae", prior="vamp", prior_options={"components": 4}, posterior="normal"), torch.rand(6, 1, 4, 4)
    vae.initialize(x)
    assert isinstance(vae.prior, VampPrior)
    distance = (vae.prior.pseudo_inputs[:, None] - x).flatten(2).abs().amax(-1)
    assert (distance.amin(1) <= 0.021).all()
    assert len(set(distance.argmin(1).tolist())) == 4


@pytest.mark.parametrize("depth", [1, 4, 8])
def test_an_iaf_posterior_starts_with_the_deviation_of_the_encoder(depth):
    vae = small(latent_dim=16, hidden=[64], posterior_options={"depth": depth})
    x = torch.rand(4, 1, 4, 4)
    _, scale, _ = vae.encoder(x)
    draws = vae.sample_posterior(x, 5000)
    torch.testing.assert_close(draws.std(0), scale, rtol=0.06, atol=0)


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 4, 4), (5, 1, 4, 5), (1, 4, 4), (5, 16)])
@pytest.mark.parametrize("method", ["terms", "model", "guide", "initialize", "log_likelihood", "reconstruct"])
def test_data_of_a_wrong_shape_are_refused(method, shape):
    with pytest.raises(ValueError, match=r"expected data of shape \(B, 1, 4, 4\)"):
        getattr(small(), method)(torch.rand(*shape))


def test_data_out_of_range_are_refused():
    x = 255 * torch.rand(5, 1, 4, 4)
    with pytest.raises(ValueError, match="divide 8-bit pixels by 255"):
        small().initialize(x)
    with pytest.raises(ValueError, match="whole numbers"):
        small(likelihood="logistic").log_likelihood(x)
    with pytest.raises(ValueError, match="num_samples"):
        small().log_likelihood(x, num_samples=0)


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (lambda vae, x: vae.terms(x, 0), ValueError, "VAE: num_samples must be at least 1, got 0"),
        (lambda vae, x: vae.terms(x, 1.5), TypeError, "VAE: num_samples must be a whole number, got 1.5"),
        (lambda vae, x: vae.terms("x"), TypeError, "VAE: x must be a tensor, got 'x'"),
        (lambda vae, x: vae.sample(0), ValueError, "VAE: num_samples must be at least 1, got 0"),
        (lambda vae, x: vae.sample_posterior(x, -1), ValueError, "VAE: num_samples must be at least 1, got -1"),
    ],
)
def test_wrong_uses_are_named(use, error, message):
    with pytest.raises(error, match=message):
        use(MODELS["vae"]((6,), latent_dim=2, hidden=[4]), torch.rand(3, 6))
