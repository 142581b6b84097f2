"""A flow posterior in one changed line: robust regression in an ordinary Pyro program.

python examples/regression.py --guide AutoNormal
python examples/regression.py --guide AutoIAF
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import pyro_flowguides as fg


def model(x: Tensor, y: Tensor) -> None:
    """A line with Student-t noise of unknown degrees of freedom. Intercept and slope are strongly correlated."""
    intercept = pyro.sample("intercept", dist.Normal(0.0, 10.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 10.0))
    scale = pyro.sample("scale", dist.HalfNormal(2.0))
    df = pyro.sample("df", dist.Gamma(2.0, 0.1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.StudentT(df, intercept + slope * x, scale), obs=y)


def simulate(size: int = 40) -> tuple[Tensor, Tensor]:
    """Simulate points on a line with intercept 1 and slope 0.8, far from x = 0. One in ten is an outlier."""
    x = 5 + 3 * torch.rand(size)
    noise = 0.3 * torch.randn(size)
    noise[::10] += 4 * torch.randn(len(noise[::10]))
    return x, 1 + 0.8 * x + noise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guide", choices=["AutoNormal", "AutoIAF"], default="AutoIAF")
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    x, y = simulate()

    guides: dict[str, Callable[..., AutoNormal | fg.AutoFlow]] = {"AutoNormal": AutoNormal, "AutoIAF": fg.AutoIAF}
    guide = guides[arguments.guide](model)  # the one changed line

    optimizer = pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.02 ** (1 / arguments.steps)})
    svi = SVI(model, guide, optimizer, Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1))
    for step in range(arguments.steps):
        loss = svi.step(x, y)
        if step % 500 == 0:
            print(f"step {step:5d}  ELBO {-loss:8.2f}")

    print(fg.diagnose(model, guide, x, y))
    for name, values in guide.quantiles([0.05, 0.5, 0.95], x, y).items():
        low, middle, high = values.flatten().tolist()
        print(f"{name:10s} {middle:7.3f}  (90% interval {low:7.3f} to {high:7.3f})")


if __name__ == "__main__":
    main()
