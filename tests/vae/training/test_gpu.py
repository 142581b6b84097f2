"""Every flow and model on a GPU, as posterior and as prior: training steps and all inspections."""

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from pyro_flowguides.flows import FLOWS
from pyro_flowguides.vae import LIKELIHOODS, MODELS, NETWORKS, ELBOLoss

pytestmark = pytest.mark.gpu


def take_steps_and_inspect(vae, x):
    vae, x = vae.to("cuda"), x.to("cuda")
    vae.initialize(x)
    optimizer = torch.optim.Adamax(vae.parameters(), lr=2e-3)
    for step in range(2):
        loss, metrics = ELBOLoss(warmup_steps=10, free_bits=0.1)(vae.terms(x, num_samples=2), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.isfinite()
    assert metrics["elbo"].device.type == "cuda"
    assert vae.log_likelihood(x, num_samples=4, chunk_size=3).isfinite().all()
    assert vae.sample(2).shape == (2, *vae.data_shape)
    assert vae.reconstruct(x).shape == x.shape
    assert vae.active_units(x).shape == (vae.latent_dim,)


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("model", ["vae", "iafvae"])
def test_models_and_flows(model, flow):
    posterior = {"posterior": flow} if model == "vae" else {}
    take_steps_and_inspect(MODELS[model]((1, 8, 8), latent_dim=4, prior=flow, **posterior), torch.rand(6, 1, 8, 8))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_networks_and_likelihoods(likelihood, network):
    shape = (3, 8, 8)
    x = torch.rand(6, *shape) if likelihood == "bernoulli" else torch.randint(0, 256, (6, *shape))
    take_steps_and_inspect(MODELS["vae"](shape, likelihood=likelihood, latent_dim=4, network=network), x)


@pytest.mark.parametrize("model", MODELS)
def test_every_model_with_its_defaults(model):
    take_steps_and_inspect(MODELS[model]((1, 8, 8), likelihood="bernoulli", latent_dim=4), torch.rand(6, 1, 8, 8))


def test_a_vamp_prior():
    vae = MODELS["vae"]((6,), latent_dim=3, posterior="normal", prior="vamp", prior_options={"components": 5})
    take_steps_and_inspect(vae, torch.rand(6, 6))


@pytest.mark.parametrize("model", MODELS)
def test_as_pyro_programs(model):
    vae = MODELS[model]((1, 8, 8), likelihood="bernoulli", latent_dim=4).to("cuda")
    x = torch.rand(6, 1, 8, 8, device="cuda")
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    assert SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), elbo).step(x) > 0


@pytest.mark.parametrize("model", MODELS)
def test_in_mixed_precision(model):
    vae = MODELS[model]((1, 8, 8), likelihood="bernoulli", latent_dim=4).to("cuda")
    x = torch.rand(6, 1, 8, 8, device="cuda")
    vae.initialize(x)
    with torch.autocast("cuda", torch.bfloat16):
        terms = vae.terms(x, num_samples=2)
    assert {part.dtype for part in terms} == {torch.float32}
    (-terms.elbo.mean()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in vae.parameters())
