"""``python -m pyro_flowguides.vae``: train a VAE from the command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from pyro_flowguides.vae.training.command_line import parse_settings
from pyro_flowguides.vae.training.loop import TrainingDivergedError, train
from pyro_flowguides.vae.training.report import Summary
from pyro_flowguides.vae.training.settings import Settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, print the results, and return the exit status: 0, or 1 after an error with a message."""
    settings = parse_settings(arguments)
    try:
        summary = train(settings)
    except (OSError, ValueError, ImportError, TrainingDivergedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("NODE_RANK", "0") == "0":
        print(_describe(settings, summary))
    return 0


def _describe(settings: Settings, summary: Summary) -> str:
    test, weighted = summary["test"], summary.get("iw_log_likelihood")
    lines = [
        f"{summary['epochs']} epochs in {summary['seconds']:.0f} s ({summary['reason']}); best epoch "
        f"{summary['best_epoch']}",
        f"test ELBO {test['elbo']:.2f} nats per image (reconstruction {test['reconstruction']:.2f}, KL "
        f"{test['kl']:.2f}), {test['bits_per_dim']:.3f} bits/dim",
    ]
    if weighted:
        lines.append(
            f"importance-weighted log-likelihood {weighted['mean']:.2f} ± {weighted['standard_error']:.2f} "
            f"({weighted['images']} images, {weighted['num_samples']} draws each)"
        )
    lines.append(f"written to {settings.output}: summary.json, metrics.csv, best.pt, last.pt and pictures")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
