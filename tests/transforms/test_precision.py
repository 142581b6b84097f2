"""Autocast does not change flows: their log-determinants are never computed in bfloat16."""

import pytest
import torch
from torch.testing import assert_close

import pyro_flowguides as fg
from pyro_flowguides.flows import FLOWS


@pytest.fixture(autouse=True)
def _single_precision():
    torch.set_default_dtype(torch.float32)


def perturbed(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("name", list(FLOWS))
def test_a_flow_ignores_autocast(name):
    torch.manual_seed(0)
    flow, x = perturbed(FLOWS[name](4)), torch.randn(7, 4)
    short = x.bfloat16()
    expected = [*flow.forward_and_ladj(short.float()), *flow.inverse_and_ladj(short.float())]
    expected += flow.forward_and_score(short.float(), -short.float())
    with torch.autocast("cpu", torch.bfloat16):
        results = [*flow.forward_and_ladj(short), *flow.inverse_and_ladj(short), *flow.forward_and_score(short, -short)]
    for one, other in zip(results, expected, strict=True):
        assert one.dtype == torch.float32
        assert_close(one, other)


@pytest.mark.parametrize("path", [True, False], ids=["path", "total"])
@pytest.mark.parametrize("name", list(FLOWS))
def test_a_posterior_ignores_autocast(name, path):
    torch.manual_seed(0)
    posterior = perturbed(fg.FlowPosterior(4, 3, name, path_gradient=path))
    loc, scale, short = torch.randn(7, 4), torch.rand(7, 4) + 0.5, torch.randn(7, 3).bfloat16()
    results = []
    for enabled, context in ((False, short.float()), (True, short)):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            z, log_q = posterior.rsample_and_log_prob(loc, scale, context)
            z = z.detach()
            results.append([z, log_q, posterior(loc, scale, context).log_prob(z)])
    for one, other in zip(*results, strict=True):
        assert other.dtype == torch.float32
        assert_close(one, other, rtol=1e-4, atol=1e-4)
