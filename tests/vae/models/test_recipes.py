"""Every model, network, likelihood, posterior and prior by name: it runs, and every parameter is trained."""

import pytest
import torch

from pyro_flowguides.flows import FLOWS
from pyro_flowguides.vae import IAFVAE, LIKELIHOODS, MODELS, NETWORKS, VAE, ELBOLoss
from tests.conftest import seed_everything
from tests.transforms.families import randomize


def data(likelihood, *shape):
    return torch.rand(shape) if likelihood == "bernoulli" else torch.randint(0, 256, shape)


def check_everything_learns(vae, x):
    """A finite loss whose gradient reaches every parameter (random weights: some layers start at zero)."""
    vae.initialize(x)
    for part in (vae.posterior, vae.prior):
        randomize(part, 0.1)
    loss, _ = ELBOLoss()(vae.terms(x, num_samples=2), step=0)
    assert loss.isfinite()
    loss.backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name
    assert vae.sample(2).shape == (2, *vae.data_shape)
    assert vae.reconstruct(x).shape == x.shape


@pytest.mark.parametrize("flow", ["normal", *FLOWS])
def test_every_posterior(flow):
    vae = MODELS["vae"]((6,), latent_dim=3, hidden=[8], posterior=flow)
    check_everything_learns(vae, torch.rand(4, 6))


@pytest.mark.parametrize("flow", ["normal", "vamp", *FLOWS])
def test_every_prior(flow):
    vae = MODELS["vae"]((6,), latent_dim=3, hidden=[8], posterior="normal", prior=flow)
    check_everything_learns(vae, torch.rand(4, 6))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_every_network_and_likelihood(likelihood, network):
    shape, options = (2, 5, 4), {"hidden": [8]} if network == "mlp" else {"hidden": 8}
    vae = MODELS["vae"](shape, likelihood=likelihood, latent_dim=3, posterior="normal", network=network, **options)
    check_everything_learns(vae, data(likelihood, 4, *shape))


@pytest.mark.parametrize("model", MODELS)
def test_every_model_with_its_defaults(model):
    vae = MODELS[model]((1, 8, 8), likelihood="bernoulli", latent_dim=4)
    x = torch.rand(4, 1, 8, 8)
    vae.initialize(x)
    terms = vae.terms(x, num_samples=2)
    assert isinstance(vae, VAE)
    assert terms.log_likelihood.shape == (2, 4)
    assert terms.kl.shape[:2] == (2, 4)
    assert terms.z.shape == (2, 4, vae.latent_dim)
    assert vae.log_likelihood(x, num_samples=3).shape == (4,)


@pytest.mark.parametrize("model", ["iafvae", "hierarchical"])
@pytest.mark.skipif(torch.__version__ < (2, 5), reason="its compiler fails")
def test_a_training_step_compiles_to_one_graph(model):
    options = {
        "iafvae": {"hidden": [8], "prior": "maf", "prior_options": {"depth": 1}, "posterior_options": {"depth": 1}},
        "hierarchical": {"hidden": 4, "scales": 1, "layers": 1},
    }[model]
    vae = MODELS[model]((1, 4, 4), likelihood="bernoulli", latent_dim=2, **options)
    x = torch.rand(4, 1, 4, 4)
    vae.initialize(x)
    torch._dynamo.reset()
    compiled = torch.compile(vae.terms, backend="eager", fullgraph=True)
    seed_everything(1)
    actual = compiled(x).elbo
    torch._dynamo.reset()
    seed_everything(1)
    torch.testing.assert_close(actual, vae.terms(x).elbo)
    actual.mean().backward()
    assert all(parameter.grad is not None for parameter in vae.parameters())


def test_the_iaf_vae_has_gated_steps():
    vae = MODELS["iafvae"]((6,), posterior_options={"depth": 2})
    assert isinstance(vae, IAFVAE)
    assert [part.flow.update for part in vae.posterior.flow.parts] == ["gated", "gated"]
    orders = [part.flow.conditioner.order.tolist() for part in vae.posterior.flow.parts]
    assert orders[0] == orders[1][::-1]
    affine = MODELS["iafvae"]((6,), posterior_options={"update": "affine"})
    assert affine.posterior.flow.parts[0].flow.update == "affine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"posterior": "gaussian"}, "unknown posterior 'gaussian'; known posteriors: normal, planar"),
        ({"prior": "gaussian"}, "unknown prior 'gaussian'; known priors: normal, vamp, planar"),
        ({"network": "cnn"}, "unknown network 'cnn'; known networks: mlp"),
        ({"likelihood": "gaussian"}, "unknown likelihood 'gaussian'"),
        ({"latent_dim": 0}, "latent_dim must be at least 1"),
        ({"hidden": []}, "at least one width"),
        ({"hidden": [0]}, "widths must be positive"),
        ({"posterior": "normal", "posterior_options": {"depth": 3}}, "no options"),
        ({"prior_options": {"depth": 3}}, "no options"),
        ({"network": "gated"}, r"data_shape must be \(channels, height, width\)"),
    ],
)
def test_impossible_models_are_explained(options, message):
    with pytest.raises(ValueError, match=message):
        MODELS["vae"]((6,), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"posterior": "planar"}, "the posterior must be 'iaf' or 'normal'"),
        ({"prior": "maf"}, "the prior must be 'normal'"),
        ({"network": "mlp"}, "the network must be 'resnet'"),
        ({"prior_options": {"depth": 2}}, "no options"),
        ({"posterior": "normal", "posterior_options": {"steps": 2}}, "no options"),
        ({"posterior_options": {"steps": -1}}, "steps must be at least 0, got -1"),
        ({"scales": 0}, "scales must be at least 1, got 0"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"posterior_options": {"step_width": 2}}, "width must be at least the 4 channels"),
    ],
)
def test_impossible_hierarchical_models_are_explained(options, message):
    with pytest.raises(ValueError, match=message):
        MODELS["hierarchical"]((1, 8, 8), **{"latent_dim": 4, "hidden": 8, **options})


def test_the_iaf_vae_refuses_another_posterior():
    with pytest.raises(ValueError, match='the model "vae"'):
        MODELS["iafvae"]((6,), posterior="planar")
