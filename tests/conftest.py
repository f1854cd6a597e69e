"""Shared by all tests: two threads, no hub, no tracking service."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

# Shapes in the signatures are checked at run time, here in the tests alone.
install_import_hook("mmprune_train.pruning", "beartype.beartype")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state."""
    import torch

    torch.manual_seed(0)
