"""Errors of AutoAmortizedFlow name the site, the plate and the remedy."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_flowguides as fg
from tests.guides.hierarchies import B, M, N, Y, encoder, hierarchy, make, number, only_local
from tests.guides.zoo import F64


def refused(model, match, *args, error=ValueError, **options):
    with pytest.raises(error, match=match):
        make(model, **options)(*args or (Y,))


def test_a_missing_plate():
    with pytest.raises(ValueError, match=r"no plate 'data' with a size. Its plates: \['groups'\]"):
        fg.AutoAmortizedFlow(hierarchy, encoder(), plate="data")(Y)


def test_no_local_sites():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", len(y)):
            pyro.sample("y", dist.Normal(mu + torch.zeros(M), 1.0).to_event(1), obs=y)

    refused(model, "no latent site lies in plate 'groups'. Use AutoFlow")


def test_discrete_sites():
    def model(y):
        with pyro.plate("groups", len(y)):
            pyro.sample("k", dist.Bernoulli(0.5))

    refused(model, "discrete sample site 'k'")

    def with_global(y):
        pyro.sample("k", dist.Bernoulli(0.5))
        only_local(y)

    refused(with_global, "discrete sample site 'k'")


def test_another_subsampled_plate():
    def model(y):
        with pyro.plate("groups", len(y), subsample_size=B, dim=-1), pyro.plate("inner", 6, subsample_size=2, dim=-2):
            pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))

    refused(model, "site 'z' lies in plate 'groups' and in plate 'inner', which is subsampled too")

    def elsewhere(y):
        with pyro.plate("other", 6, subsample_size=2):
            pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        only_local(y)

    refused(elsewhere, "site 'z' lies in plate 'other', which is subsampled to 2 of 6")


def test_a_sequential_plate():
    def model(y):
        for i in pyro.plate("groups", len(y)):
            pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))

    refused(model, "sequential", error=NotImplementedError)


def test_varying_supports():
    def by_datum(y):
        with pyro.plate("groups", len(y)):
            pyro.sample("z", dist.Uniform(torch.zeros(len(y), dtype=F64), 1 + y[:, 0] ** 2))

    refused(by_datum, "support of site 'z' differs from datum to datum")

    def by_site(y):
        high = pyro.sample("high", dist.LogNormal(number(0.0), 1.0))
        with pyro.plate("groups", len(y)):
            pyro.sample("z", dist.Uniform(number(0.0), high))

    refused(by_site, "support of site 'z' depends on other latent variables")


def test_a_changing_structure():
    def model(y, wide=False):
        with pyro.plate("groups", len(y)):
            pyro.sample("z", dist.Normal(torch.zeros(3 if wide else 2, dtype=F64), 1.0).to_event(1))

    guide = make(model)
    guide(Y)
    for _ in range(2):
        with pytest.raises(ValueError, match="latent sites in plate 'groups' have other names, shapes"):
            guide(Y, wide=True)


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, y):
        return self.value


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.ones(N, 2, dtype=F64), r"shape \(5, C\).*plate 'groups', got shape \(12, 2\).*inputs="),
        (torch.ones(B, dtype=F64), r"got shape \(5,\)"),
        ((torch.ones(B, 2), torch.ones(B, 2)), "got tuple"),
        (torch.ones(B, 2), "encoder returns torch.float32, the local variables are torch.float64"),
    ],
)
def test_invalid_features(value, words):
    with pytest.raises(ValueError, match=words):
        fg.AutoAmortizedFlow(hierarchy, Constant(value), plate="groups")(Y)


def test_a_corrected_encoder_is_used():
    features = Constant(torch.ones(N, 2, dtype=F64))
    guide = fg.AutoAmortizedFlow(hierarchy, features, plate="groups")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"shape \(5, C\)"):
            guide(Y)
    features.value = torch.ones(B, 2, dtype=F64)
    assert guide(Y)["theta"].shape == (B,)


def test_features_of_another_width():
    features = Constant(torch.ones(B, 2, dtype=F64))
    guide = fg.AutoAmortizedFlow(hierarchy, features, plate="groups")
    guide(Y)
    features.value = torch.ones(B, 3, dtype=F64)
    with pytest.raises(ValueError, match="returned 3 features, and 2 when"):
        guide(Y)


def test_an_encoder_with_other_arguments():
    with pytest.raises(TypeError, match=r"could not be called with the model's arguments.*inputs="):
        fg.AutoAmortizedFlow(hierarchy, encoder(), plate="groups")(Y, torch.arange(B))


def test_invalid_options():
    with pytest.raises(ValueError, match=r"must be a torch\.nn\.Module"):
        fg.AutoAmortizedFlow(hierarchy, lambda y: y, plate="groups")
    with pytest.raises(ValueError, match="init_scale must be positive"):
        make(init_scale=0.0)
    with pytest.raises(ValueError, match="did you mean 'iaf'"):
        make(flow="iaff")
    with pytest.raises(ValueError, match="did you mean 'maf'"):
        make(global_flow="mafff")
    with pytest.raises(TypeError, match=r"AutoAmortizedFlow: unknown option 'dept', did you mean 'depth'\?"):
        make(dept=1)
    with pytest.raises(TypeError, match=r"global_options: unknown option 'dept', did you mean 'depth'\?"):
        make(global_options={"dept": 1})
    with pytest.raises(TypeError, match=r"unknown option 'plates', did you mean 'plate'\?"):
        make(plates="groups")


def test_autoflow_recommends_this_guide_for_a_subsampled_plate():
    with pytest.raises(ValueError, match="AutoAmortizedFlow"):
        fg.AutoFlow(hierarchy, "iaf")(Y)
