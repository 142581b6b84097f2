"""From a plain Pyro VAE to an IAF posterior in three changed lines, on the digits of scikit-learn.

python examples/vae_three_lines.py
"""

from __future__ import annotations

import argparse

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from sklearn.datasets import load_digits
from torch import Tensor, nn

import pyro_flowguides as fg

PIXELS, LATENT, HIDDEN = 64, 8, 128


class Encoder(nn.Module):
    """Encoder to the location and scale of a diagonal Gaussian."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.ELU(), nn.Linear(HIDDEN, HIDDEN), nn.ELU())
        self.loc, self.raw_scale = nn.Linear(HIDDEN, LATENT), nn.Linear(HIDDEN, LATENT)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        hidden = self.trunk(x)
        return self.loc(hidden), nn.functional.softplus(self.raw_scale(hidden))


class PlainVAE(nn.Module):
    """A VAE as usually written in Pyro."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.decoder = nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.ELU(), nn.Linear(HIDDEN, PIXELS))

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(*self.encoder(x)).to_event(1))


class ContextEncoder(Encoder):
    """The same encoder, which also returns its last hidden layer as context."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        hidden = self.trunk(x)
        return self.loc(hidden), nn.functional.softplus(self.raw_scale(hidden)), hidden  # changed line 1


class FlowVAE(PlainVAE):
    """The same VAE with an IAF posterior."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = ContextEncoder()
        self.posterior = fg.FlowPosterior(LATENT, HIDDEN, "iaf")  # changed line 2

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", self.posterior(*self.encoder(x)))  # changed line 3


def digits() -> tuple[Tensor, Tensor]:
    """Load binary images of 8 × 8 pixels: 1,500 for training and 297 for testing."""
    pixels = torch.as_tensor(load_digits().data > 7, dtype=torch.get_default_dtype())
    pixels = pixels[torch.randperm(len(pixels))]
    return pixels[:1500], pixels[1500:]


def train(vae: PlainVAE, data: Tensor, epochs: int, batch_size: int = 100) -> None:
    """Maximize the ELBO by plain SVI."""
    steps = epochs * (len(data) // batch_size)
    optimizer = pyro.optim.ClippedAdam({"lr": 3e-3, "lrd": 0.05 ** (1 / steps)})
    svi = SVI(vae.model, vae.guide, optimizer, Trace_ELBO())
    for _ in range(epochs):
        for batch in torch.randperm(len(data)).split(batch_size):
            svi.step(data[batch])


@torch.no_grad()
def evaluate(vae: PlainVAE, data: Tensor, num_particles: int = 200) -> tuple[float, float]:
    """Estimate the ELBO and, by importance weighting, log p(x), in nats per image."""
    options = {"num_particles": num_particles, "vectorize_particles": True, "max_plate_nesting": 1}
    bounds = Trace_ELBO(**options), RenyiELBO(alpha=0, **options)
    elbo, log_p = (-bound.loss(vae.model, vae.guide, data) / len(data) for bound in bounds)
    return elbo, log_p


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pyro.set_rng_seed(arguments.seed)
    training, test = digits()

    print("posterior             ELBO   log p(x)   gap, in nats per test image")
    for name, kind in {"diagonal Gaussian": PlainVAE, "IAF": FlowVAE}.items():
        pyro.clear_param_store()
        pyro.set_rng_seed(arguments.seed)
        vae = kind()
        train(vae, training, arguments.epochs)
        elbo, log_p = evaluate(vae, test)
        print(f"{name:18s} {elbo:8.2f}   {log_p:8.2f}   {log_p - elbo:4.2f}")


if __name__ == "__main__":
    main()
