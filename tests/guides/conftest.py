"""Fixtures of the guides' tests: a clean parameter store, a fixed seed and Pyro's validation."""

import pyro
import pytest

from tests.guides.zoo import KINDS, make_guide


@pytest.fixture(autouse=True)
def _validated():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    with pyro.validation_enabled(True):
        yield
    pyro.clear_param_store()


@pytest.fixture(params=KINDS)
def make(request):
    """Return ``make(model, **options)``, which builds a small guide of one kind."""

    def make_kind(model, **options):
        return make_guide(request.param, model, **options)

    make_kind.kind = request.param
    return make_kind
