"""Transforms are tested in float64 by default."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _double_precision(_fresh_state):
    torch.set_default_dtype(torch.float64)
