"""Losses: the negative bound with KL warm-up and free bits, and the negative importance-weighted bound."""

import math

import torch
from torch import Tensor, nn

from pyro_flowguides.nn.arguments import check_number
from pyro_flowguides.vae.models.vae import Terms

__all__ = ["ELBOLoss", "ImportanceWeightedLoss", "SoftFreeBitsLoss"]


def _mean_parts(terms: Terms) -> tuple[Tensor, Tensor]:
    return terms.log_likelihood.mean(), terms.kl.sum(-1).mean()


def _metrics(loss: Tensor, reconstruction: Tensor, kl: Tensor, **others: Tensor) -> dict[str, Tensor]:
    loss, reconstruction, kl = loss.detach(), reconstruction.detach(), kl.detach()
    return {"loss": loss, "elbo": reconstruction - kl, "reconstruction": reconstruction, "kl": kl, **others}


def _kl_weight(step: int, warmup_steps: int) -> float:
    return min(1.0, step / warmup_steps) if warmup_steps else 1.0


def _mean_over_processes(value: Tensor) -> Tensor:
    """Average over the processes, so that all of them decide alike."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        value = value.clone()  # the reduction is in place
        torch.distributed.all_reduce(value)
        value = value / torch.distributed.get_world_size()
    return value


def _check_not_negative(owner: str, **values: float) -> None:
    for name, value in values.items():
        check_number(owner, name, value)
        if not value >= 0:
            raise ValueError(f"{owner}: {name} must not be negative, got {value}")


class ELBOLoss(nn.Module):
    r"""The negative evidence lower bound, with linear KL warm-up and hard free bits.

    .. math::
        L = -E[\log p(x \mid z)] + \beta \sum_{g=1}^{G} \max(\lambda, \mathrm{KL}_g), \qquad
        \beta = \min(1, t / T)

    where :math:`\mathrm{KL}_g` is the divergence of group g, averaged over the batch (of all processes). Below
    :math:`\lambda` a group costs a constant, so that emptying it gains nothing. Warm-up and free bits are off by
    default.

    Args:
        warmup_steps: T, 0 for none.
        free_bits: :math:`\lambda` in nats per group, 0 for none.

    Shapes:
        ``(terms, step) -> (loss, metrics)``, all scalars. The metrics are detached: ``loss``, ``kl_weight``,
        ``reconstruction`` (the mean log-likelihood), ``kl``, and ``elbo`` = ``reconstruction`` - ``kl``. Warm-up and
        free bits affect only the loss.

    Raises:
        ValueError: if an argument is negative.

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
        _check_not_negative("ELBOLoss", warmup_steps=warmup_steps, free_bits=free_bits)
        self.warmup_steps, self.free_bits = warmup_steps, free_bits

    def forward(self, terms: Terms, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        weight = _kl_weight(step, self.warmup_steps)
        reconstruction, kl = _mean_parts(terms)
        cost = kl
        if self.free_bits:
            kl_by_group = terms.kl.flatten(0, 1).mean(0)
            above = _mean_over_processes(kl_by_group.detach()) > self.free_bits
            cost = torch.where(above, kl_by_group, self.free_bits).sum()
        loss = weight * cost - reconstruction
        return loss, _metrics(loss, reconstruction, kl, kl_weight=torch.full_like(loss, weight, requires_grad=False))


class SoftFreeBitsLoss(nn.Module):
    r"""The negative evidence lower bound with soft free bits: the weight of the divergence steers it to a target.

    .. math::
        L = -E[\log p(x \mid z)] + \gamma \beta\, \mathrm{KL}, \qquad
        \gamma \leftarrow \begin{cases}
            \gamma / (1 + r) & \mathrm{KL} < \lambda \\
            \min(1, \gamma (1 + r)) & \mathrm{KL} > (1 + \epsilon) \lambda \\
            \gamma & \text{otherwise}
        \end{cases}

    after every step in training mode. KL is the whole divergence, averaged over the batch (of all processes), and
    :math:`\beta` the warm-up of :class:`ELBOLoss`. Below the target the gradient does not vanish, unlike that of hard
    free bits. The state dict includes γ.

    Args:
        warmup_steps: T, 0 for none; γ does not change during the warm-up.
        free_bits: :math:`\lambda` in nats, for all groups together.
        rate: r.
        tolerance: ε.
        floor: lower bound of γ.

    Shapes:
        as for :class:`ELBOLoss`, like the errors; the metrics include ``gamma``.

    References:
        X. Chen et al. (2017). Variational lossy autoencoder. arXiv:1611.02731.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import MODELS, SoftFreeBitsLoss
        >>> vae = MODELS["vae"]((8,), latent_dim=2, hidden=[16])
        >>> loss_fn = SoftFreeBitsLoss(free_bits=5.0)
        >>> loss, metrics = loss_fn(vae.terms(torch.rand(5, 8)), step=10)
        >>> loss_fn.gamma < 1
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
        weight = _kl_weight(step, self.warmup_steps)
        gamma, (reconstruction, kl) = self.gamma.clone(), _mean_parts(terms)
        loss = weight * gamma * kl - reconstruction
        if self.training and weight == 1.0:
            self._adjust_gamma(_mean_over_processes(kl.detach()))
        return loss, _metrics(loss, reconstruction, kl, kl_weight=weight * gamma, gamma=gamma)

    @torch.no_grad()
    def _adjust_gamma(self, kl: Tensor) -> None:
        low, high = kl < self.free_bits, kl > (1 + self.tolerance) * self.free_bits
        factor = torch.where(low, 1 / (1 + self.rate), torch.where(high, 1 + self.rate, 1.0))
        self.gamma.mul_(factor.to(self.gamma)).clamp_(self.floor, 1.0)


class ImportanceWeightedLoss(nn.Module):
    r"""The negative importance-weighted bound, over the S draws of the terms.

    .. math:: L = -\log \frac{1}{S} \sum_{s=1}^{S} \frac{p(x, z_s)}{q(z_s \mid x)}

    Shapes:
        as for :class:`ELBOLoss`; the metrics include ``bound``, the negative of the loss.

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
        return loss, _metrics(loss, *_mean_parts(terms), bound=-loss.detach())
