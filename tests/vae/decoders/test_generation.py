"""Generation with caches, compared with full passes of the network."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.vae.decoders.cases import CASES, build_case, generate_by_full_passes, random_context


class RecordingDraw:
    """Draws channels with noise from a seeded stream, and records the outputs of the network at every step."""

    def __init__(self, network, seed=0):
        self.channels, self.generator, self.outputs = network.shape[0], torch.Generator().manual_seed(seed), []

    def __call__(self, outputs):
        self.outputs.append(outputs.clone())
        noise = torch.randn(len(outputs), self.channels, generator=self.generator, dtype=outputs.dtype)
        return outputs[:, : self.channels].tanh() + noise


def outputs_of_step(network, step):
    """Return the indices of the outputs from which the channels of a step are drawn."""
    channels = network.shape[0]
    return [k for k in range(network.outputs) if k % channels in range(channels)[step.channels]]


@pytest.mark.parametrize("name", CASES)
def test_caches_change_nothing(name):
    """The outputs at every step agree to rounding, and so do the draws."""
    network = build_case(name)
    context = random_context(network, 3)
    cached, full = RecordingDraw(network), RecordingDraw(network)
    x = network.generate(cached, 3, **context, standardize=lambda x: 2 * x - 0.5)
    y = generate_by_full_passes(network, full, 3, **context, standardize=lambda x: 2 * x - 0.5)
    for step, one, other in zip(network.steps(), cached.outputs, full.outputs, strict=True):
        used = outputs_of_step(network, step)
        torch.testing.assert_close(one[:, used], other[:, used], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_generation_costs_at_most_one_pass_per_group_of_channels(name):
    network = build_case(name)
    context = random_context(network, 2)

    def count_flops(job):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            job()
        return counter.get_total_flops()

    one_pass = count_flops(lambda: network(torch.zeros(2, *network.shape, dtype=torch.float64), **context))
    steps_per_position = len(list(network.steps())) // math.prod(network.shape[1:])
    generation = count_flops(lambda: network.generate(RecordingDraw(network), 2, **context))
    assert 0 < generation <= steps_per_position * one_pass


@pytest.mark.parametrize("name", CASES)
def test_generated_data_have_the_outputs_of_the_parallel_pass(name):
    network = build_case(name)
    context = random_context(network, 2)
    draw = RecordingDraw(network)
    x = network.generate(draw, 2, **context)
    outputs = network(x, **context)
    for step, recorded in zip(network.steps(), draw.outputs, strict=True):
        used = outputs_of_step(network, step)
        parallel = outputs[(slice(None), used, *step.position)]
        torch.testing.assert_close(parallel, recorded[:, used], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_generation_is_deterministic_and_restores_training_mode(name):
    """Dropout is off during generation, and no gradient is recorded."""
    network = build_case(name).train()
    context = random_context(network, 2)
    first, second = (network.generate(RecordingDraw(network), 2, **context) for _ in range(2))
    assert network.training
    assert not first.requires_grad
    torch.testing.assert_close(first, second, rtol=0, atol=0)
