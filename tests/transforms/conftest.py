"""Transforms are tested in float64 unless a test says otherwise."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _double_precision(_fresh_state):
    torch.set_default_dtype(torch.float64)
