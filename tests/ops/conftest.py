"""Fixtures that run each test on every available device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(params=["cpu", "cuda"], autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Make tensors on this device by default."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    torch.set_default_device(request.param)
    torch.manual_seed(0)
    yield request.param
    torch.set_default_device(None)
