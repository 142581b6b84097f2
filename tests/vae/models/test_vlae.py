"""The variational lossy autoencoder: a correct bound, Pyro programs, the published recipe, and a z that is used."""

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO

from pyro_flowguides.flows import FLOWS
from pyro_flowguides.transforms import MaskedAutoregressive
from pyro_flowguides.vae import (
    DECODERS,
    MODELS,
    VLAE,
    AutoregressiveDistribution,
    ELBOLoss,
    Settings,
    load_images,
    load_model,
    train,
)
from tests.transforms.families import randomize

SMALL = {"latent_dim": 4, "network": "mlp", "hidden": [16]}
PRIOR = {"prior_options": {"hidden_dims": [16]}}


def vlae(shape=(1, 4, 4), **options):
    return MODELS["vlae"](shape, **{**SMALL, **PRIOR, **options})


def bits(*shape):
    return torch.rand(shape).round()


# -- the bound ---------------------------------------------------------------------------------------------------------


def test_the_published_recipe():
    """Four mean-only steps of 640 × 3 units, read in one pass; four maps; six 3×3 convolutions of 12 filters."""
    vae = MODELS["vlae"]((1, 28, 28))
    assert vae.latent_dim == 64
    steps = list(vae.prior.flow.parts)
    assert len(steps) == 4
    for step in steps:
        assert isinstance(step, MaskedAutoregressive)
        assert step.cheap_direction == "inverse"
        assert step.conditioner.hidden_dims == (640, 640, 640)
        assert step.conditioner.activation is torch.nn.functional.relu
    _, ladj = vae.prior.flow.inverse_and_ladj(torch.randn(3, 64))
    assert torch.equal(ladj, torch.zeros(3))
    assert vae.network.maps == 4
    assert vae.network.reach == 6
    assert vae.network.first.out_channels == 12


def test_without_maps_it_is_the_autoregressive_model_alone():
    """z says nothing: the log likelihood is that of the network, whatever z."""
    vae = vlae(maps=0)
    x = bits(5, 1, 4, 4)
    expected = AutoregressiveDistribution(vae.network, vae.pixels).log_prob(x)
    torch.testing.assert_close(vae.terms(x, 3).log_likelihood, expected.expand(3, 5))


def test_the_likelihood_of_every_draw_is_that_of_its_own_z():
    vae = vlae()
    x = bits(5, 1, 4, 4)
    terms = vae.terms(x, 3)
    for s in range(3):
        expected = torch.stack([vae.observation(terms.z[s, b]).log_prob(x[b]) for b in range(5)])
        torch.testing.assert_close(terms.log_likelihood[s], expected)
    assert terms.log_likelihood.std(0).min() > 0


def test_terms_are_those_of_the_pyro_programs():
    vae = vlae(posterior="iaf")
    randomize(vae.prior, 0.1)
    x = bits(5, 1, 4, 4)
    guide = poutine.trace(vae.guide).get_trace(x)
    model = poutine.trace(poutine.replay(vae.model, trace=guide)).get_trace(x)
    z = guide.nodes["z"]["value"]
    assert model.nodes["x"]["fn"].event_shape == (1, 4, 4)
    torch.testing.assert_close(vae.conditional_log_prob(z, x).sum(), model.nodes["x"]["fn"].log_prob(x).sum())
    expected = vae.conditional_log_prob(z, x) + vae.prior_distribution().log_prob(z) - vae.posterior_at(x).log_prob(z)
    torch.testing.assert_close(model.log_prob_sum() - guide.log_prob_sum(), expected.sum(), rtol=1e-4, atol=1e-3)


def test_plain_svi():
    pyro.set_rng_seed(1)
    vae, x = vlae(posterior="iaf"), bits(20, 1, 4, 4)
    elbo = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 5e-3}), elbo)
    before = {name: parameter.clone() for name, parameter in vae.named_parameters()}
    losses = [svi.step(x) for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])
    assert all(not torch.equal(parameter, before[name]) for name, parameter in vae.named_parameters())


def test_decompressions_differ_only_in_what_z_leaves_open():
    vae = vlae()
    with torch.no_grad():
        for parameter in vae.network.context_projection.parameters():
            parameter.mul_(100)
    x = bits(6, 1, 4, 4)
    draws = vae.decompress(x, 40)
    assert draws.shape == (40, 6, 1, 4, 4)
    means = draws.mean(0).flatten(1)
    assert means.std(0).mean() > 0.1  # data differ by their z
    assert vae.mean(vae.sample_posterior(x)[0]).shape == x.shape
    assert vae.decompress(x, 2).unique().tolist() == [0.0, 1.0]


# -- everything by name ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("likelihood", ["bernoulli", "logistic_mixture"])
def test_every_decoder(decoder, likelihood):
    """Grey and color: every parameter is reached by the gradient, and the model generates."""
    shape = (2, 9) if decoder == "wavenet" else (3, 4, 4)
    vae = vlae(shape, decoder=decoder, likelihood=likelihood, posterior="planar")
    assert isinstance(vae, VLAE)
    x = bits(4, *shape) if likelihood == "bernoulli" else torch.randint(0, 256, (4, *shape))
    vae.initialize(x)
    for part in (vae.posterior, vae.prior):
        randomize(part, 0.1)
    if decoder == "made":  # the only network whose last layer starts at zero
        randomize(vae.network, 0.1)
    loss, _ = ELBOLoss()(vae.terms(x, num_samples=2), step=0)
    loss.backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert vae.sample(2).shape == (2, *shape)
    assert vae.reconstruct(x).shape == x.shape
    assert vae.log_likelihood(x, num_samples=6, chunk_size=4).isfinite().all()


@pytest.mark.parametrize("flow", FLOWS)
def test_every_flow_as_posterior_and_as_prior(flow):
    vae = vlae(posterior=flow, prior=flow, prior_options={})
    terms = vae.terms(bits(3, 1, 4, 4), 2)
    assert terms.elbo.shape == (2, 3)
    assert terms.elbo.isfinite().all()


def test_a_latent_image():
    vae = MODELS["spatial_vlae"]((3, 8, 12), latent_dim=2 * 6, hidden=8, **PRIOR)
    x = torch.randint(0, 256, (4, 3, 8, 12))
    vae.initialize(x)
    assert vae.terms(x, 2).z.shape == (2, 4, 12)
    assert vae.network.outputs == 100
    assert vae.sample(2).shape == (2, 3, 8, 12)
    vae.terms(x).elbo.sum().backward()
    assert all(parameter.grad is not None for parameter in vae.parameters())


def test_a_pixel_of_the_latent_image_acts_where_it_is():
    """Changing the latent pixel of the upper left corner leaves the maps in the lower right as they are."""
    vae = MODELS["spatial_vlae"]((1, 64, 64), latent_dim=256, hidden=4, **PRIOR).double()
    z = torch.randn(1, 256, dtype=torch.float64)
    moved = z.clone()
    moved[:, 0] += 1
    change = (vae.decoder(moved) - vae.decoder(z)).abs().amax((0, 1, 4))
    assert change[0, 0] > 0
    assert change[40:, 40:].max() == 0


def test_errors():
    with pytest.raises(ValueError, match="unknown decoder 'cnn'; known decoders: pixelcnn, gated_pixelcnn"):
        vlae(decoder="cnn")
    with pytest.raises(ValueError, match="latent_dim must be a multiple of 4, got 6"):
        MODELS["spatial_vlae"]((1, 8, 8), latent_dim=6)
    with pytest.raises(ValueError, match='the network is "resnet"'):
        MODELS["spatial_vlae"]((1, 8, 8), latent_dim=4, network="mlp")
    vae = vlae()
    with pytest.raises(ValueError, match=r"network reads 4 maps, the decoder is missing"):
        VLAE(vae.encoder, None, vae.network, vae.pixels, vae.posterior, vae.prior, data_shape=(1, 4, 4))
    with pytest.raises(NotImplementedError, match="no parameters given z alone"):
        vae.decode(torch.zeros(4))


@pytest.mark.parametrize("network", ["resnet", "gated"])
def test_every_convolutional_encoder_and_decoder(network):
    vae = MODELS["vlae"]((1, 28, 28), latent_dim=4, network=network, **PRIOR)
    x = bits(3, 1, 28, 28)
    vae.initialize(x)
    vae.terms(x).elbo.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in vae.parameters())


def test_the_training_program(tmp_path):
    """The program trains it, continues an interrupted run, and saves the model and its pictures."""
    pytest.importorskip("lightning_fabric")
    pytest.importorskip("sklearn")

    def run(folder, epochs):
        network = {"hidden": [16], "decoder_options": {"filters": 4, "reach": 1, "depth": 2}}
        model = {"model": "vlae", "latent_dim": 4, "posterior": "normal", "prior": "maf", "model_options": network}
        fit = {"epochs": epochs, "batch_size": 200, "optimizer": "adamax", "free_bits": 0.64, "warmup": 0}
        machine = {"accelerator": "cpu", "progress": False, "tensorboard": False, "iw_images": 5, "num_iw_samples": 10}
        prior = {"prior_options": {"hidden_dims": [16]}}
        return train(Settings(**model, **prior, **fit, **machine, output=str(tmp_path / folder)))

    run("stopped", 1)
    stopped, whole = run("stopped", 2), run("whole", 2)
    assert stopped["epochs"] == whole["epochs"] == 2
    assert stopped["test"] == whole["test"]
    vae, _ = load_model(tmp_path / "whole" / "best.pt")
    assert isinstance(vae, VLAE)
    assert vae.network.reach == 1
    for picture in ("samples.png", "reconstructions.png"):
        assert (tmp_path / "whole" / picture).stat().st_size > 100


@pytest.mark.parametrize("decoder", ["pixelcnn++"])
@pytest.mark.skipif(torch.__version__ < (2, 5), reason="its compiler fails")
def test_a_training_step_compiles_to_one_graph(decoder):
    vae, x = vlae(decoder=decoder, decoder_options={"filters": 4}), bits(3, 1, 4, 4)
    vae.eval()
    torch._dynamo.reset()
    compiled = torch.compile(vae.terms, backend="eager", fullgraph=True)
    pyro.set_rng_seed(1)
    actual = compiled(x).elbo
    torch._dynamo.reset()
    pyro.set_rng_seed(1)
    torch.testing.assert_close(actual, vae.terms(x).elbo)


@pytest.mark.parametrize("decoder", [name for name in DECODERS if name != "wavenet"])
def test_sixteen_bits(decoder):
    """Densities in mixed precision are close to those in single precision, and draws are binary."""
    vae, x = vlae(decoder=decoder).eval(), bits(3, 1, 4, 4)
    z = torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        actual, drawn = vae.conditional_log_prob(z, x), vae.generate(z)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, vae.conditional_log_prob(z, x), rtol=0, atol=0.2)
    assert set(drawn.unique().tolist()) <= {0.0, 1.0}


# -- z is used ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_published_recipe_uses_z():
    """The recipe at 8×8, with window and free bits scaled with the image. After a short training z carries well over
    twice the free bits, and the likelihood of a digit falls if it is decoded from the z of another."""
    pytest.importorskip("sklearn")
    images = load_images("digits")
    train, test = (images.train >= 8).float(), (images.test >= 8).float()
    free_bits = 0.01 * 64
    prior, decoder = {"hidden_dims": (64,) * 3}, {"reach": 2}
    vae = MODELS["vlae"](
        (1, 8, 8), latent_dim=16, network="mlp", hidden=[200], prior_options=prior, decoder_options=decoder
    )
    vae.initialize(train[:100])
    optimizer, loss_fn = torch.optim.Adamax(vae.parameters(), lr=2e-3), ELBOLoss(free_bits=free_bits)
    for step in range(350):
        loss, _ = loss_fn(vae.terms(train[torch.randint(len(train), (50,))]), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        terms = vae.terms(test, 5)
        of_another = vae.conditional_log_prob(terms.z.roll(1, 1), test)
    assert terms.kl.mean() > 2.2 * free_bits
    assert (terms.log_likelihood - of_another).mean() > 4
