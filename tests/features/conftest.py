"""Images for the feature cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import SIDE


@pytest.fixture
def images(tmp_path: Path) -> dict[Path, str]:
    """Seven different noise images, each asked for by a sample of its number."""
    generator = torch.Generator().manual_seed(0)
    paths = [tmp_path / "images" / f"{number}.png" for number in range(7)]
    paths[0].parent.mkdir()
    for path in paths:
        noise = torch.randint(0, 256, (SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(path)
    return {path: f"sample {number}" for number, path in enumerate(paths)}
