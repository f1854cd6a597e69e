"""Shards that are damaged, name other files or were left half written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from features.counted import Counted, assert_same, flip_a_byte

from mmprune_train.storage.atomic import unused_name
from mmprune_train.storage.locks import held


def cut_off(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-10])


def cut_off_list(shard: Path) -> None:
    listing = shard.with_suffix(".json")
    listing.write_text(listing.read_text()[:-20])


def flip_in_list(shard: Path) -> None:
    """Another image, or another number of tokens: each is valid, and would shift what comes after."""
    listing = shard.with_suffix(".json")
    shard_of = json.loads(listing.read_text())
    shard_of["kept"][0] += 1
    listing.write_text(json.dumps(shard_of))


def swapped_images(shard: Path) -> None:
    listing = shard.with_suffix(".json")
    listing.write_text(listing.read_text().replace(json.loads(listing.read_text())["images"][0], "0" * 64))


@pytest.mark.parametrize("damage", [cut_off, flip_a_byte, Path.unlink, cut_off_list, flip_in_list, swapped_images])
def test_a_damaged_shard_is_told_and_its_images_are_encoded_again(
    damage: Callable[[Path], None], images: dict[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counted, root = Counted(), tmp_path / "cache"
    features, report = counted.fill(root, images)
    before = features.read(list(images))
    before = replace(before, chosen=before.chosen.clone())  # not the file itself
    shards = sorted(Path(report.folder).glob("*.safetensors"))
    assert len(shards) > 1
    inside = len(json.loads(shards[0].with_suffix(".json").read_text())["images"])
    damage(shards[0])
    counted.images = 0
    features, report = counted.fill(root, images)
    assert counted.images == report.encoded == inside < 7
    assert "is damaged" in capsys.readouterr().err
    assert_same(features.read(list(images)), before)
    assert counted.fill(root, images)[1].encoded == 0
    assert "damaged" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["/ABSOLUTE", "../model.safetensors", "b.safetensors"])
def test_a_list_names_no_file_but_its_own(name: str, images: dict[Path, str], tmp_path: Path) -> None:
    counted, root = Counted(), tmp_path / "cache"
    folder = Path(counted.fill(root, images)[1].folder)
    name = str(tmp_path / "model.safetensors") if name == "/ABSOLUTE" else name
    foreign = folder / name
    foreign.write_bytes(b"weights")
    shard = {"name": name, "bytes": 1, "sha256": "0" * 64, "images": ["0" * 64], "kept": [1]}
    (folder / "a.json").write_text(json.dumps(shard))
    assert counted.fill(root, images)[1].encoded == 0
    assert not (folder / "a.json").exists()
    assert foreign.read_bytes() == b"weights"


def test_what_a_stopped_process_left_is_deleted_unless_another_writes_there(
    images: dict[Path, str], tmp_path: Path
) -> None:
    counted, root = Counted(), tmp_path / "cache"
    folder = Path(counted.fill(root, images)[1].folder)
    name, others = unused_name(), "0" * 32
    left = [folder / f".{name}.safetensors.tmp", folder / f"{name}.safetensors", root / f".images.json.{name}.tmp"]
    of_another_machine = [folder / f".{others}.safetensors.tmp", folder / f"{others}.safetensors"]
    for path in (*left, *of_another_machine):
        path.write_bytes(b"half")
    with held(folder, together=True):
        counted.fill(root, images)
        assert all(path.exists() for path in left[:2])
    counted.fill(root, images)
    assert not any(path.exists() for path in left) and all(path.exists() for path in of_another_machine)
    for path in of_another_machine:
        os.utime(path, (0, 0))
    counted.fill(root, images)
    assert not any(path.exists() for path in of_another_machine)
