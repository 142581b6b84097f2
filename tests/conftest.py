"""What all tests share: one thread, a fixed seed, a clean global state; GPU tests only where there is a GPU."""

import random

import numpy as np
import pyro
import pytest
import torch

torch.set_num_threads(1)


def seed_everything(seed: int) -> None:
    """What ``pyro.set_rng_seed`` does, without the traceback that torch formats for every device that is not there."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  it is the global state that Pyro and libraries draw from
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _fresh_state():
    dtype = torch.get_default_dtype()
    pyro.clear_param_store()
    pyro.enable_validation(True)  # benchmarks, which some tests import, turn it off
    seed_everything(0)
    yield
    torch.set_default_dtype(dtype)
    pyro.clear_param_store()
