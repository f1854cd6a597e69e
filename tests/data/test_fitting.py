"""Images reach the encoder's size in parts: the processor's own bytes, with little memory."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmprune_train.config.schema import EncoderConfig
from mmprune_train.data import fitting
from mmprune_train.data.images import image_processor

RATIOS = ("square", "pad")


def processor_of(ratio: str, side: int = 16, **settings: Any) -> Any:
    processor = image_processor(EncoderConfig(name="t", image_size=side, patch_size=8), ratio)
    return type(processor)(**{**processor.to_dict(), **settings})


SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"resample": 2},
    {"resample": 0},
    {"size": {"shortest_edge": 21}, "crop_size": {"height": 16, "width": 13}},
    {"crop_size": {"height": 21, "width": 40}},
    {"do_center_crop": False},
    {"size": {"height": 16, "width": 16}, "do_center_crop": False},
    {"size": {"height": 18, "width": 15}},
    {"do_resize": False},
)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_parts_give_the_processors_own_bytes(
    settings: dict[str, Any], ratio: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance, values = random.Random(0), np.random.default_rng(0)
    processor = processor_of(ratio, **settings)
    sizes = [(1, 1), (1, 2), (2, 1), (16, 16), (16, 40), (17, 1), (1, 150), (150, 3), (33, 200), (200, 33), (200, 7)]
    for width, height in [*sizes, *((chance.randint(1, 60), chance.randint(1, 60)) for _ in range(6))]:
        image = Image.fromarray(values.integers(0, 256, (height, width, 3), dtype=np.uint8))
        whole = processor(image, return_tensors="np")["pixel_values"][0]
        for pixels in (64, 1 << 25):
            monkeypatch.setattr(fitting, "MOST_PIXELS", pixels)
            fitted = processor(fitting.fit(processor, image), return_tensors="np")["pixel_values"][0]
            assert np.array_equal(whole, fitted), (width, height, pixels)


MEASURE = """
import sys
from pathlib import Path
from mmprune_train.config.schema import EncoderConfig
from mmprune_train.data.images import ImageReader, image_processor

def memory(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) / 1024

small, *files = map(Path, sys.argv[1:])
for ratio in ("square", "pad"):
    read = ImageReader(image_processor(EncoderConfig(name="t", image_size=336, patch_size=14), ratio))
    read(small)
    for file in files:
        open("/proc/self/clear_refs", "w").write("5")
        before = memory("VmRSS")
        read(file)
        print(ratio, file.name, round(memory("VmHWM") - before))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is Linux's")
def test_a_strip_and_a_long_panorama_take_little_memory(tmp_path: Path) -> None:
    sizes = {"small": (40, 30), "tall": (1, 4000), "wide": (4000, 1), "long": (9000, 40)}
    for name, size in sizes.items():
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    files = [str(tmp_path / f"{name}.png") for name in sizes]
    done = subprocess.run([sys.executable, "-c", MEASURE, *files], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    peaks = {" ".join(words[:-1]): int(words[-1]) for words in map(str.split, done.stdout.splitlines())}
    assert len(peaks) == 6
    assert max(peaks.values()) < 300, peaks


@pytest.mark.parametrize("ratio", RATIOS)
def test_what_would_take_long_is_told_from_its_size_alone(ratio: str) -> None:
    processor = processor_of(ratio, 336)
    for size in ((12000, 9000), (4000, 1), (1, 4000), (20000, 2000), (3000, 20000)):
        fitting.check_size(processor, *size)
    for size in ((10**8, 400), (400, 10**6)):
        with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} pixels are too long a strip"):
            fitting.check_size(processor, *size)
    unknown: Any = type("Unknown", (), {"do_pad": ratio == "pad", "size": None})()
    fitting.check_size(unknown, 4000, 4000)
    with pytest.raises(ValueError, match="too long a strip"):
        fitting.check_size(unknown, 40000, 4000)
