"""Averages of the weights over the training steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["EMA"]


class EMA:
    r"""An exponential moving average of a module's parameters (Polyak averaging with forgetting).

    .. math:: \bar\theta_t = d_t \bar\theta_{t-1} + (1 - d_t) \theta_t, \qquad
        d_t = \min\left(d, \frac{t}{t + 9}\right)

    The smaller factor in the first steps lets the average forget the start. Buffers are not averaged. Averages are kept
    on the device and in the precision of the parameters.

    Args:
        module: its parameters' present values are the start.
        decay: d, in [0, 1).

    References:
        B. Polyak, A. Juditsky (1992). Acceleration of stochastic approximation by averaging. SIAM J. Control Optim. 30.

    Example:
        >>> import torch
        >>> from pyro_flowguides.vae import EMA
        >>> net = torch.nn.Linear(2, 1)
        >>> ema = EMA(net, decay=0.99)
        >>> ema.update(net)
        >>> with ema.applied(net):
        ...     y = net(torch.ones(2))
    """

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA: decay must lie in [0, 1), got {decay}")
        self.decay, self.steps = decay, 0
        self.averages = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}

    def _pairs(self, module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        parameters = {name: parameter.data for name, parameter in module.named_parameters()}
        if parameters.keys() != self.averages.keys():
            raise ValueError(
                f"EMA: the module's parameters are not those averaged so far; they differ in "
                f"{sorted(parameters.keys() ^ self.averages.keys())}"
            )
        return [self.averages[name] for name in parameters], list(parameters.values())

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take one more value of the parameters into the average."""
        averages, parameters = self._pairs(module)
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 9))
        torch._foreach_lerp_(averages, parameters, 1 - decay)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Within this context the module has the averaged parameters; its own come back afterwards."""
        averages, parameters = self._pairs(module)
        own = [parameter.clone() for parameter in parameters]
        _assign(module, averages)
        try:
            yield
        finally:
            _assign(module, own)

    def state_dict(self) -> dict[str, Any]:
        """Averages and number of updates; the tensors are those in use, not copies."""
        return {"steps": self.steps, "averages": self.averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state, copied to where the averages are."""
        if state["averages"].keys() != self.averages.keys():
            raise ValueError("EMA: the state was saved for other parameters")
        self.steps = state["steps"]
        for name, average in self.averages.items():
            average.copy_(state["averages"][name])


@torch.no_grad()
def _assign(module: nn.Module, values: list[Tensor]) -> None:
    for parameter, value in zip(module.parameters(), values, strict=True):
        parameter.copy_(value)
