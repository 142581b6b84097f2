"""The Gaussian start of a flow guide: exact where it can be, harmless where it cannot."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.testing import assert_close

import pyro_flowguides as fg
from pyro_flowguides.inference.warm_start import warm_start

LOG_2PI = math.log(2 * math.pi)


@pytest.fixture(autouse=True)
def _double_precision(_fresh_state):
    torch.set_default_dtype(torch.float64)


def gaussian(loc, covariance):
    normal = torch.distributions.MultivariateNormal(loc, covariance)
    return normal.log_prob


@pytest.mark.parametrize("scales", [[1.0, 1.0, 1.0], [1e-3, 1.0, 1e3], [1e-3, 1e-3, 1e-3], [1e3, 1e3, 1e3]], ids=str)
def test_gaussian_targets_are_recovered_exactly(scales):
    sd = torch.tensor(scales)
    corr = torch.tensor([[1.0, 0.8, -0.3], [0.8, 1.0, 0.1], [-0.3, 0.1, 1.0]])
    loc, covariance = sd * torch.tensor([1.0, -2.0, 0.5]), corr * sd[:, None] * sd
    best = warm_start(gaussian(loc, covariance), torch.zeros(3))[0]
    assert_close(best.gaussian.loc / sd, loc / sd, rtol=0, atol=1e-3)
    assert_close((best.gaussian.scale_tril @ best.gaussian.scale_tril.mT) / sd[:, None] / sd, corr, rtol=0, atol=1e-6)
    assert best.elbo == pytest.approx(0.0, abs=0.3)  # log Z = 0; 128 draws


def test_candidates_are_ranked_by_their_elbo():
    """Under N(0, I) the candidate N(m, s² I) has ELBO -KL."""
    candidates = warm_start(
        gaussian(torch.zeros(2), torch.eye(2)), torch.tensor([0.5, -0.5]), num_samples=20_000, num_paths=1
    )
    plain = {candidate.origin: candidate for candidate in candidates if candidate.origin.startswith("plain")}
    assert len(plain) == 3
    for scale in (0.1, 0.3, 1.0):
        kl = 0.5 * (2 * scale**2 + 0.5 - 2) - 2 * math.log(scale)
        assert plain[f"plain start, scale {scale}"].elbo == pytest.approx(-kl, abs=0.03)
    assert [candidate.elbo for candidate in candidates] == sorted((c.elbo for c in candidates), reverse=True)


def funnel(z):
    """Neal's: the mode of its density lies where the Hessian has no meaning for the mass."""
    v, x = z[..., 0], z[..., 1:]
    log_v = -0.5 * (v / 3) ** 2 - math.log(3) - 0.5 * LOG_2PI
    return log_v + (-0.5 * x**2 * (-v[..., None]).exp() - 0.5 * v[..., None] - 0.5 * LOG_2PI).sum(-1)


def test_a_funnel_gives_a_finite_start_no_worse_than_the_plain_one():
    candidates = warm_start(funnel, torch.zeros(9))
    plain = [candidate.elbo for candidate in candidates if candidate.origin.startswith("plain")]
    assert math.isfinite(candidates[0].elbo)
    assert max(plain) <= candidates[0].elbo < 0


def test_a_hessian_that_is_not_positive_does_not_crash():
    """A saddle at the start: two modes apart along one direction."""

    def density(z):
        modes = torch.stack([-0.5 * (z - sign * torch.tensor([3.0, 0.0])).square().sum(-1) for sign in (-1, 1)])
        return modes.logsumexp(0) - math.log(2) - LOG_2PI

    best = warm_start(density, torch.zeros(2))[0]
    assert best.elbo == pytest.approx(-math.log(2), abs=0.1)  # one mode, and it says so
    assert abs(best.gaussian.loc[0]) == pytest.approx(3.0, abs=0.05)
    assert_close(best.gaussian.scale_tril, torch.eye(2), rtol=0, atol=0.02)


def test_a_mode_at_infinity_gives_a_finite_start():
    """log p(z) = z - e^z has a mode; the hard limit of a half-line does not: p rises for ever towards -inf."""

    def density(z):
        return (-torch.nn.functional.softplus(z)).sum(-1) - 1e-4 * z.square().sum(-1)

    def rising(z):
        return -torch.nn.functional.softplus(z).sum(-1)

    for target in (density, rising):
        best = warm_start(target, torch.zeros(2))[0]
        assert math.isfinite(best.elbo)
        assert best.gaussian.loc.isfinite().all()
        assert (best.gaussian.scale_tril.diagonal() > 0).all()


def test_candidates_win_where_the_density_is_finite():
    def density(z):
        inside = (z < 2).all(-1)
        return torch.where(inside, -0.5 * (z / 0.1).square().sum(-1), -torch.inf)

    best = warm_start(density, torch.full((2,), 0.5))[0]
    assert_close(best.gaussian.loc, torch.zeros(2), rtol=0, atol=1e-3)
    assert_close(best.gaussian.scale_tril, 0.1 * torch.eye(2), rtol=0, atol=1e-3)


def test_a_density_without_second_derivatives_still_gets_a_start():
    best = warm_start(lambda z: -torch.cdist(z, torch.zeros(1, 2)).square().sum(-1), torch.ones(2))[0]
    assert best.origin.startswith("plain")
    assert math.isfinite(best.elbo)


def test_draws_depend_on_the_seed_alone():
    target = gaussian(torch.ones(2), torch.eye(2))
    before = torch.get_rng_state()
    runs = [warm_start(target, torch.zeros(2), seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    elbos = [[candidate.elbo for candidate in run] for run in runs]
    assert elbos[0] == elbos[1] != elbos[2]


# -- in a fit ----------------------------------------------------------------------------------------------------------


def bent(dim):
    """A flow that no affine map equals, frozen far from the identity."""
    torch.manual_seed(1)
    flow = fg.flows.planar(dim, depth=2)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.normal_()
    return flow


def skewed():
    """The image of a standard normal under :func:`bent`."""
    normal = dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1)
    pyro.sample("z", dist.TransformedDistribution(normal, [bent(2).requires_grad_(False).with_cache(0)]))


def scaled():
    a = pyro.sample("a", dist.Normal(5.0, 1e-3))
    pyro.sample("b", dist.Normal(1e3 * a, 1e3))


def first_step(model, guide, **options):
    """Fit for one step, whose estimate of the bound is that of the start."""
    return fg.fit(model, guide, steps=1, num_particles=1000, progress=False, **options)


def test_the_guide_starts_at_the_posterior():
    cold, warm = (
        first_step(scaled, fg.AutoFlow(scaled, "planar", depth=1), warm_start=warm_start)
        for warm_start in (False, True)
    )
    assert cold.start == ""
    assert cold.elbo_history[0] < -10
    assert "Laplace" in warm.start
    assert warm.elbo_history[0] == pytest.approx(0.0, abs=0.05)


def test_a_guide_that_is_better_than_every_gaussian_is_left_alone():
    """No Gaussian has a higher bound than the posterior itself."""
    guide = fg.AutoFlow(skewed, bent)
    guide()
    guide.set_affine(torch.zeros(2), torch.eye(2))
    with torch.no_grad():
        guide.get_transform().parts[1].logit.fill_(-1e4)  # normal tails
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    result = first_step(skewed, guide, lr=1e-9)
    assert result.start == ""
    assert result.elbo_history[0] == pytest.approx(0.0, abs=1e-9)
    for name, value in guide.state_dict().items():
        assert_close(value, before[name], rtol=0, atol=1e-9)


@pytest.mark.slow
def test_many_dimensions_start_from_a_diagonal_with_a_few_directions():
    """Beyond the full-rank limit: correlated coordinates of very different scales, found without a dense Hessian."""
    dim, generator = 400, torch.Generator().manual_seed(0)
    loadings = torch.randn(dim, 3, generator=generator)
    scale = 10 ** torch.linspace(-2, 2, dim)
    target = dist.LowRankMultivariateNormal(scale * loadings[:, 0], scale[:, None] * loadings, scale**2)

    def model():
        pyro.sample("z", target)

    result = fg.fit(model, fg.AutoNICE(model, depth=1, hidden_dims=[4]), steps=1, num_particles=2, progress=False)
    assert result.start.startswith("low-rank Laplace")
    assert -1.0 < result.diagnosis.elbo < 0.3  # log Z = 0; a diagonal alone is hundreds of nats off
