"""Flows whose parameters a network computes from part of the input, and the gain of that network."""

import math
from collections.abc import Collection, Mapping

import torch
from torch import nn

from pyro_flowguides.nn import MLP
from pyro_flowguides.transforms.flow import Flow, Theta

__all__ = ["FULL_GAIN", "ConditionerFlow", "set_gain"]

#: Gain at which layers start by themselves: nearly all of the conditioner's output.
FULL_GAIN = 0.99
#: The gain is the sigmoid of a parameter divided by this number, so that an optimizer changes it slowly.
GAIN_SLOWNESS = 30.0


class ConditionerFlow(Flow):
    r"""A flow whose parameters are computed from part of its input by a network, ``self.conditioner``.

    The outputs of the network are multiplied by a learned gain :math:`\gamma` between 0 and 1. The gain also limits how
    much a layer may stretch draws (:mod:`~pyro_flowguides.transforms.updates`). One step of Adam moves all weights
    behind an output at once. Far from the solution, at full gain, layers amplify each other until draws overflow. A
    small gain prevents this. An optimizer opens it slowly where the posterior needs it.

    A context shifts the biases of the network.
    """

    conditioner: MLP

    def __init__(self, input_dim: int, *, cache_size: int = 1) -> None:
        super().__init__(input_dim, cache_size=cache_size)
        self.gain = nn.Parameter(torch.zeros(()))
        self.set_gain(FULL_GAIN)

    @torch.no_grad()
    def set_gain(self, gain: float) -> None:
        """Set the gain, in (0, 1).

        Raises:
            ValueError: for another gain.
        """
        if not 0 < gain < 1:
            raise ValueError(f"set_gain: gain must lie in (0, 1), got {gain}")
        self.gain.fill_(GAIN_SLOWNESS * math.log(gain / (1 - gain)))

    def theta(self) -> Theta:
        gain, theta = (self.gain / GAIN_SLOWNESS).sigmoid(), self.conditioner.fold()
        last = self.conditioner.depth - 1
        for name in (f"weight{last}", f"bias{last}"):
            theta[name] = gain * theta[name]
        return {**theta, "gain": gain}

    def context_shifts(self) -> tuple[Mapping[str, torch.Size], Collection[str]]:
        depth = self.conditioner.depth
        shapes = {f"bias{layer}": self.conditioner.biases[layer].shape for layer in range(depth)}
        return shapes, [f"bias{depth - 1}"]


def set_gain(flow: Flow, gain: float) -> None:
    """Set the gain of all conditioners in a flow, in (0, 1)."""
    for module in flow.modules():
        if isinstance(module, ConditionerFlow):
            module.set_gain(gain)
