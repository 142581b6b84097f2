"""The low-rank affine map: its Gaussian density, and how it is set."""

import pytest
import torch
from torch.testing import assert_close

from pyro_flowguides.transforms import LowRankAffine

DIM, RANK = 7, 3


@pytest.fixture
def pieces():
    loc, scale = torch.randn(DIM), torch.randn(DIM).exp()
    directions = torch.linalg.qr(torch.randn(DIM, 2)).Q
    return loc, scale, directions, torch.tensor([1.5, -2.0])


def test_starts_exactly_at_the_diagonal_affine_map():
    loc, scale, x = torch.randn(DIM), torch.randn(DIM).exp(), torch.randn(5, DIM)
    flow = LowRankAffine(DIM, RANK, loc, scale)
    y, ladj = flow.forward_and_ladj(x)
    assert torch.equal(y, loc + scale.log().exp() * x)
    assert torch.equal(ladj, scale.log().sum().expand(5))


def test_has_the_gaussian_density_to_which_it_is_set(pieces):
    """There are fewer directions than columns: nothing is stretched along the others."""
    loc, scale, directions, log_stretch = pieces
    flow = LowRankAffine(DIM, RANK)
    torch.nn.init.normal_(flow.log_stretch)
    flow.assign(*pieces)
    root = scale.diag() @ (torch.eye(DIM) + directions @ (2 * log_stretch).expm1().diag() @ directions.mT)
    target = torch.distributions.MultivariateNormal(loc, root @ scale.diag())
    y = torch.randn(6, DIM)
    x, ladj = flow.inverse_and_ladj(y)
    log_q = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(-1) - ladj
    assert_close(log_q, target.log_prob(y), rtol=1e-10, atol=1e-10)


def test_without_directions_it_is_diagonal(pieces):
    loc, scale, directions, log_stretch = pieces
    flow = LowRankAffine(DIM, RANK)
    flow.assign(*pieces)
    flow.assign(loc, scale, directions[:, :0], log_stretch[:0])
    assert_close(flow(torch.ones(DIM)), loc + scale)


@pytest.mark.parametrize("rank", [0, DIM + 1])
def test_rank_out_of_range(rank):
    with pytest.raises(ValueError, match=rf"rank must lie in 1\.\.{DIM}, got {rank}"):
        LowRankAffine(DIM, rank)


def test_refuses_wrong_shapes_scales_and_directions(pieces):
    loc, scale, directions, log_stretch = pieces
    flow = LowRankAffine(DIM, RANK)
    with pytest.raises(ValueError, match=r"K at most 3, got \(7,\), \(7,\), \(7, 4\), \(4,\)"):
        flow.assign(loc, scale, torch.linalg.qr(torch.randn(DIM, 4)).Q, torch.zeros(4))
    with pytest.raises(ValueError, match="of shapes"):
        flow.assign(loc[:-1], scale, directions, log_stretch)
    with pytest.raises(ValueError, match="scale must be positive"):
        flow.assign(loc, -scale, directions, log_stretch)
    with pytest.raises(ValueError, match="orthonormal"):
        flow.assign(loc, scale, 1.001 * directions, log_stretch)
