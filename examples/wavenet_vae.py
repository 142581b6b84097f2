"""A VAE for time series with a WaveNet decoder: what its latent vector encodes of a neuron's membrane potential.

The recording (12,000 values, from matplotlib's sample data) is cut into pieces of 96 values and quantized to 256
levels. The WaveNet predicts each value from the last 16 values. The latent vector encodes what this window does not
show: the level and the speed at which it rises. It does not encode when the neuron fires, because it is constant over a
piece, and a causal convolution of constant features does not depend on time.

python examples/wavenet_vae.py --output wavenet_vae.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.cbook
import matplotlib.pyplot as plt
import numpy as np
import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from pyro_flowguides.vae import MODELS, VLAE, AutoregressiveDistribution

LENGTH, STRIDE, LATENT_DIM = 96, 8, 8
#: Receptive field 16.
DECODER = {"dilations": [1, 2, 4, 8], "residual": 24, "hidden": 24, "skip": 32}


def recording() -> tuple[Tensor, Tensor]:
    """Load training pieces from the first three quarters of the active phase, and test pieces from the last quarter."""
    path = str(matplotlib.cbook.get_sample_data("membrane.dat", asfileobj=False))
    series = torch.from_numpy(np.fromfile(path, np.float32))[1200:11000]
    levels = ((series - series.min()) / (series.max() - series.min()) * 255).round()
    border = 3 * len(levels) // 4
    train, test = levels[:border].unfold(0, LENGTH, STRIDE), levels[border:].unfold(0, LENGTH, LENGTH // 2)
    return train[:, None].contiguous(), test[:, None].contiguous()


def build(features: int) -> VLAE:
    """Build the model. With ``features=0``, the WaveNet ignores the latent vector."""
    vae = MODELS["vlae"](
        (1, LENGTH),
        likelihood="logistic_mixture",
        latent_dim=LATENT_DIM,
        network="mlp",
        hidden=[128],
        decoder="wavenet",
        decoder_options={**DECODER, "features": features},
        prior_options={"hidden_dims": [64]},
    )
    assert isinstance(vae, VLAE)
    return vae


def train(vae: VLAE, data: Tensor, steps: int) -> None:
    """Maximize the ELBO by plain SVI."""
    pyro.clear_param_store()
    svi = SVI(vae.model, vae.guide, pyro.optim.ClippedAdam({"lr": 1.5e-3, "lrd": 0.1 ** (1 / steps)}), Trace_ELBO())
    for step in range(steps):
        loss = svi.step(data[torch.randint(len(data), (64,))]) / 64
        if step % 100 == 0:
            print(f"step {step:5d}  −ELBO {loss:8.2f} nats per piece")


def draw(path: Path, vae: VLAE, test: Tensor) -> None:
    """Plot pieces of the test data, and three series decoded from the latent vector of each."""
    pieces = test[:: max(len(test) // 5, 1)][:5]
    series = vae.decompress(pieces, 3)
    figure, axes = plt.subplots(1, len(pieces), figsize=(14, 2.4), sharey=True, layout="constrained")
    for column, ax in enumerate(axes):
        ax.plot(series[:, column, 0].T, color="C0", alpha=0.5, linewidth=1)
        ax.plot(pieces[column, 0], color="k", linewidth=1.5)
    axes[0].set_ylabel("level")
    figure.suptitle("black: recording; blue: three draws given its latent vector")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--output", type=Path, default=Path("wavenet_vae.png"))
    arguments = parser.parse_args()
    data, test = recording()

    for name, features in {"WaveNet alone": 0, "WaveNet VAE": LATENT_DIM}.items():
        pyro.set_rng_seed(0)
        vae = build(features)
        train(vae, data, arguments.steps)
        with torch.no_grad():
            terms = vae.terms(test, 10)
            nll = -vae.log_likelihood(test, 200, 20) if features else -_wavenet_log_prob(vae, test)
        kl = terms.kl.sum(-1).mean()
        print(f"{name}: test −log p(x) {nll.mean() / LENGTH:.3f} nats per value, KL {kl:.2f} nats per piece")
    draw(arguments.output, vae, test)
    print(f"Plot: {arguments.output}")


def _wavenet_log_prob(vae: VLAE, x: Tensor) -> Tensor:
    """Return the exact log density of a WaveNet that ignores z."""
    return AutoregressiveDistribution(vae.network, vae.pixels).log_prob(x)


if __name__ == "__main__":
    main()
