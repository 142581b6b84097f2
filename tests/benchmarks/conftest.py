"""State that programs change when a test runs them in this process, and that is restored after each test."""

import os
from collections.abc import Iterator

import pyro
import pytest
import torch


@pytest.fixture(autouse=True)
def _state() -> Iterator[None]:
    dtype, threads, environment = torch.get_default_dtype(), torch.get_num_threads(), dict(os.environ)
    yield
    pyro.clear_param_store()
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(environment)
