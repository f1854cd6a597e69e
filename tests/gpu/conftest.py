"""What a CPU cannot show. `MMPRUNE_TEST_DEVICE=cpu` runs as much of it as a CPU can, to see that the tests run."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    """The GPU, or what `MMPRUNE_TEST_DEVICE` names."""
    chosen = torch.device(os.environ.get("MMPRUNE_TEST_DEVICE", "cuda"))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return chosen
