"""The affine part of a guide in many dimensions: a diagonal and a few directions."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.testing import assert_close

import pyro_flowguides as fg
from pyro_flowguides.guides.autoflow import FULL_RANK_LIMIT
from pyro_flowguides.transforms import HeavyTail, LowerTriangularAffine, LowRankAffine

BEYOND = FULL_RANK_LIMIT + 1


def wide_guide(dim):
    """Return a guide that is the Gaussian of its affine part: couplings at the identity, normal tails."""

    def model():
        pyro.sample("z", dist.Normal(torch.zeros(dim), 1.0).to_event(1))

    guide = fg.AutoNICE(model, depth=1)
    guide.setup()
    with torch.no_grad():
        for part in guide.get_transform().parts:
            if isinstance(part, HeavyTail):
                part.logit.fill_(-1e4)
    return guide


@pytest.mark.parametrize(("dim", "family"), [(BEYOND - 1, LowerTriangularAffine), (BEYOND, LowRankAffine)])
def test_the_affine_part_depends_on_the_dimension(dim, family):
    affine = wide_guide(dim).get_transform().parts[-1]
    assert type(affine) is family
    assert_close(affine(torch.ones(dim)) - affine.loc, torch.full((dim,), 0.1))


@pytest.mark.parametrize("dim", [6, BEYOND], ids=["full rank", "low rank"])
def test_set_low_rank_affine(dim):
    torch.set_default_dtype(torch.float64)
    guide = wide_guide(dim)
    loc, scale = torch.randn(dim), torch.randn(dim).exp()
    directions, log_stretch = torch.linalg.qr(torch.randn(dim, 3)).Q, torch.tensor([1.0, -1.0, 2.0])
    guide.set_low_rank_affine(loc, scale, directions, log_stretch)
    stretched = torch.eye(dim) + directions * (2 * log_stretch).expm1() @ directions.mT
    expected = dist.MultivariateNormal(loc, stretched * scale * scale[:, None])
    x = loc + scale * torch.randn(5, dim)
    assert_close(guide.get_posterior().log_prob(x), expected.log_prob(x))


def test_set_affine_removes_the_stretch():
    guide = wide_guide(BEYOND)
    directions = torch.linalg.qr(torch.randn(BEYOND, 2)).Q
    guide.set_low_rank_affine(torch.ones(BEYOND), torch.ones(BEYOND), directions, torch.ones(2))
    guide.set_affine(torch.zeros(BEYOND), 2 * torch.eye(BEYOND))
    affine = guide.get_transform().parts[-1]
    assert_close(affine(torch.ones(BEYOND)), torch.full((BEYOND,), 2.0))


def test_parameters_load_into_a_fresh_guide():
    guide, fresh = wide_guide(BEYOND), wide_guide(BEYOND)
    guide.set_low_rank_affine(
        torch.ones(BEYOND), torch.ones(BEYOND), torch.linalg.qr(torch.randn(BEYOND, 2)).Q, torch.ones(2)
    )
    fresh.load_state_dict(guide.state_dict())
    x = torch.randn(3, BEYOND)
    assert torch.equal(fresh.get_posterior().log_prob(x), guide.get_posterior().log_prob(x))
