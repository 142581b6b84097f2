"""Competitors of speed.py in a training step of a VAE: the package, Pyro's SVI, and a loop written by hand."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from speed_torch import DEVICE
from speed_workers import Job
from torch import Tensor
from torch.nn import functional as F

from pyro_flowguides import FlowPosterior
from pyro_flowguides.vae import MODELS, VAE, ELBOLoss

DATA_SHAPE, LATENT_DIM, LEARNING_RATE = (1, 28, 28), 64, 1e-3
pyro.enable_validation(False)
# The modules that an optimizer loads at first use are no part of the first step.
torch.optim.Adam([torch.zeros(1, requires_grad=True)], fused=True)


def ours(vae: VAE, x: Tensor) -> Callable[[], float]:
    optimizer, loss_fn = torch.optim.Adam(vae.parameters(), lr=LEARNING_RATE), ELBOLoss()

    def step() -> float:
        loss, _ = loss_fn(vae.terms(x), step=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def by_hand(vae: VAE, x: Tensor) -> Callable[[], float]:
    """Take the same step in plain torch: the modules of the VAE, with every formula written out."""
    optimizer = torch.optim.Adam(vae.parameters(), lr=LEARNING_RATE)
    flow = vae.posterior.flow if isinstance(vae.posterior, FlowPosterior) else None

    def step() -> float:
        loc, scale, context = vae.encoder(x)
        noise = torch.randn_like(loc)
        z = loc + scale * noise
        log_q = -(0.5 * noise * noise + scale.log()).sum(-1)
        if flow is not None:
            z, ladj = flow.condition(context).forward_and_ladj(z)
            log_q = log_q - ladj
        log_p = -0.5 * (z * z).sum(-1)
        logits = vae.decoder(z)[..., 0]
        reconstruction = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        loss = (reconstruction + (log_q - log_p).sum()) / len(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def by_svi(vae: VAE, x: Tensor) -> Callable[[], float]:
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": LEARNING_RATE}), Trace_ELBO())
    return lambda: svi.step(x)


LOOPS = {"by hand": by_hand, "ours": ours, "Pyro SVI": by_svi}


def training_step(posterior: str, batch: int, loop: str, compiling: bool = False) -> Job:
    """Train an MLP VAE with default flows, compiled as ``--compile`` does it."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    x = (torch.rand(batch, *DATA_SHAPE) < 0.2).float().to(DEVICE)
    vae = MODELS["vae"](DATA_SHAPE, latent_dim=LATENT_DIM, posterior=posterior).to(DEVICE)
    if compiling:
        torch.compiler.reset()  # forget what was compiled for other batch sizes, which a training run never sees
        vae.terms = torch.compile(vae.terms)  # type: ignore[method-assign]
    return Job(LOOPS[loop](vae, x))
