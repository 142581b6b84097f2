"""What is minimized: the negative bound with KL warm-up and free bits, or the importance-weighted bound."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pyro_flowguides.vae.models.base import Terms

__all__ = ["ELBOLoss", "ImportanceWeightedLoss", "SoftFreeBitsLoss"]


def _means(terms: Terms) -> tuple[Tensor, Tensor]:
    """The log-likelihood and the whole divergence, means over draws and data."""
    return terms.log_likelihood.mean(), terms.kl.sum(-1).mean()


def _metrics(loss: Tensor, reconstruction: Tensor, kl: Tensor, **more: Tensor) -> dict[str, Tensor]:
    """In nats, detached."""
    loss, reconstruction, kl = loss.detach(), reconstruction.detach(), kl.detach()
    return {"loss": loss, "elbo": reconstruction - kl, "reconstruction": reconstruction, "kl": kl, **more}


def _over_processes(mean: Tensor) -> Tensor:
    """The mean over all processes of a distributed training step, so that all take the same decision."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        mean = mean.clone()  # the reduction is in place
        torch.distributed.all_reduce(mean)
        mean = mean / torch.distributed.get_world_size()
    return mean


def _check_not_negative(owner: str, **values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{owner}: {name} must not be negative, got {value}")


class ELBOLoss(nn.Module):
    r"""The negative evidence lower bound, with linear KL warm-up and hard free bits.

    .. math::
        L = -E[\log p(x \mid z)] + \beta \sum_{g=1}^{G} \max(\lambda, \mathrm{KL}_g), \qquad
        \beta = \min(1, t / T)

    where :math:`\mathrm{KL}_g` is the mean over the batch (of all processes) of the divergence of group g. Below
    :math:`\lambda` a group costs a constant, so that nothing is gained by emptying it. Warm-up and free bits are off by
    default.

    Args:
        warmup_steps: T, 0 for none.
        free_bits: :math:`\lambda` in nats per group, 0 for none.

    Shapes:
        ``objective(terms, step) -> (loss, metrics)``, scalars; the metrics are detached tensors: ``loss``, ``elbo``
        = ``reconstruction`` - ``kl``, ``reconstruction`` = the mean log-likelihood (all without warm-up and free bits,
        except the loss) and ``kl_weight``.

    References:
        S. Bowman et al. (2016). Generating sentences from a continuous space. arXiv:1511.06349.
        D. Kingma et al. (2016). Improving variational inference with inverse autoregressive flow. arXiv:1606.04934.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import MODELS, ELBOLoss
        >>> vae = MODELS["vae"]((8,), latent_dim=2, hidden=[16])
        >>> loss, metrics = ELBOLoss(warmup_steps=100)(vae.terms(torch.rand(5, 8)), step=10)
        >>> round(metrics["kl_weight"].item(), 2)
        0.1
    """

    def __init__(self, warmup_steps: int = 0, free_bits: float = 0.0) -> None:
        super().__init__()
        _check_not_negative("Objective", warmup_steps=warmup_steps, free_bits=free_bits)
        self.warmup_steps, self.free_bits = warmup_steps, free_bits

    def forward(self, terms: Terms, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        weight = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        reconstruction, kl = _means(terms)
        loss = weight * (self._with_free_bits(terms) if self.free_bits else kl) - reconstruction
        return loss, _metrics(loss, reconstruction, kl, kl_weight=torch.full_like(loss, weight, requires_grad=False))

    def _with_free_bits(self, terms: Terms) -> Tensor:
        kl = terms.kl.flatten(0, 1).mean(0)
        paid = _over_processes(kl.detach()) > self.free_bits
        return torch.where(paid, kl, self.free_bits).sum()


class SoftFreeBitsLoss(nn.Module):
    r"""The negative evidence lower bound with soft free bits: a weight of the divergence that follows a target.

    .. math::
        L = -E[\log p(x \mid z)] + \gamma \beta\, \mathrm{KL}, \qquad
        \gamma \leftarrow \begin{cases}
            \gamma / (1 + r) & \mathrm{KL} < \lambda \\
            \min(1, \gamma (1 + r)) & \mathrm{KL} > (1 + \epsilon) \lambda \\
            \gamma & \text{otherwise}
        \end{cases}

    after every step in training mode, with KL the mean over the batch (of all processes) of the whole divergence. The
    gradient does not vanish below the target, as it does for hard free bits. γ is saved in the state dict.

    Args:
        warmup_steps: those of :class:`ELBOLoss`; γ does not change while the warm-up lasts.
        free_bits: :math:`\lambda` in nats, of all groups together.
        rate: r.
        tolerance: ε.
        floor: γ stays above it.

    Shapes:
        as for :class:`ELBOLoss`; the metrics include ``gamma``.

    References:
        X. Chen et al. (2017). Variational lossy autoencoder. arXiv:1611.02731.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import MODELS, SoftFreeBitsLoss
        >>> vae = MODELS["vae"]((8,), latent_dim=2, hidden=[16])
        >>> objective = SoftFreeBitsLoss(free_bits=5.0)
        >>> loss, metrics = objective(vae.terms(torch.rand(5, 8)), step=10)
        >>> objective.gamma < 1
        tensor(True)
    """

    gamma: Tensor

    def __init__(
        self,
        warmup_steps: int = 0,
        free_bits: float = 0.0,
        *,
        rate: float = 0.01,
        tolerance: float = 0.05,
        floor: float = 1e-4,
    ) -> None:
        super().__init__()
        options = {"warmup_steps": warmup_steps, "free_bits": free_bits, "rate": rate, "tolerance": tolerance}
        _check_not_negative("SoftFreeBitsLoss", **options, floor=floor)
        self.warmup_steps, self.free_bits = warmup_steps, free_bits
        self.rate, self.tolerance, self.floor = rate, tolerance, floor
        self.register_buffer("gamma", torch.ones(()))

    def forward(self, terms: Terms, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        weight = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        gamma, (reconstruction, kl) = self.gamma.clone(), _means(terms)
        loss = weight * gamma * kl - reconstruction
        if self.training and weight == 1.0:
            self._update(_over_processes(kl.detach()))
        return loss, _metrics(loss, reconstruction, kl, kl_weight=weight * gamma, gamma=gamma)

    @torch.no_grad()
    def _update(self, kl: Tensor) -> None:
        low, high = kl < self.free_bits, kl > (1 + self.tolerance) * self.free_bits
        factor = torch.where(low, 1 / (1 + self.rate), torch.where(high, 1 + self.rate, 1.0))
        self.gamma.mul_(factor.to(self.gamma)).clamp_(self.floor, 1.0)


class ImportanceWeightedLoss(nn.Module):
    r"""The negative importance-weighted bound over the S draws of the terms.

    .. math:: L = -\log \frac{1}{S} \sum_{s=1}^{S} \frac{p(x, z_s)}{q(z_s \mid x)}

    Shapes:
        as for :class:`ELBOLoss`; the metrics include ``bound``, which the loss negates.

    References:
        Y. Burda, R. Grosse, R. Salakhutdinov (2016). Importance weighted autoencoders. arXiv:1509.00519.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import MODELS, ImportanceWeightedLoss
        >>> vae = MODELS["vae"]((8,), latent_dim=2, hidden=[16])
        >>> loss, metrics = ImportanceWeightedLoss()(vae.terms(torch.rand(5, 8), num_samples=10), step=0)
        >>> metrics["bound"] >= metrics["elbo"]
        tensor(True)
    """

    def forward(self, terms: Terms, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        loss = math.log(len(terms.log_likelihood)) - terms.elbo.logsumexp(0).mean()
        return loss, _metrics(loss, *_means(terms), bound=-loss.detach())
