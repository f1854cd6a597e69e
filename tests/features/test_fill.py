"""The feature cache gives back what the encoder left of an image."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from features.counted import Counted, assert_same, encoded, flip_a_byte
from PIL import Image
from tiny import SIDE

from mmprune_train.errors import UserError
from mmprune_train.features.content import INDEX
from mmprune_train.packed.patches import Patches
from mmprune_train.workers import Ranks

DOWN = {"name": "downsample", "vision": {"knee": {"count": 5}}}
RANKED = {"name": "x", "vision": {"order": "rank", "knee": {"method": "fixed_count", "count": 4}}}

WITH_CLS = {"name": "visionzip", "vision": {"knee": {"count": 3}, "merge_args": {"count": 2}}}


@pytest.mark.parametrize("pruner", ["none", "twostage", "prumerge", WITH_CLS, DOWN, RANKED], ids=str)
def test_the_cache_holds_what_stage_1_left(pruner: object, images: dict[Path, str], tmp_path: Path) -> None:
    counted = Counted(pruner)
    features, report = counted.fill(tmp_path / "cache", images)
    paths = list(images)
    expected = encoded(counted.model, paths)
    assert_same(features.read(paths), expected)
    assert_same(features.read(paths[::-2]), expected.take([6, 4, 2, 0]))
    assert [features.kept(path) for path in paths] == expected.kept.sum(1).tolist()
    none = features.read([])
    assert none.chosen.shape == (0, 32) and none.kept.shape == (0, 9) and none.indices == []
    assert report.images == report.encoded == 7 and report.dense_bytes == 7 * 9 * 32 * 4
    folder = Path(report.folder)
    assert report.bytes == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert not list(folder.glob(".*")), "nothing half-written"


def test_other_processes_read_it_too(images: dict[Path, str], tmp_path: Path) -> None:
    features, _ = Counted().fill(tmp_path / "cache", images)
    first = features.read(list(images))
    assert_same(pickle.loads(pickle.dumps(features)).read(list(images)), first)


def test_an_image_is_known_by_its_content(images: dict[Path, str], tmp_path: Path) -> None:
    counted, root = Counted(), tmp_path / "cache"
    features, _ = counted.fill(root, images)
    before = features.read(list(images))
    moved = dict.fromkeys((shutil.copy(path, tmp_path / f"new{path.name}") for path in images), "sample")
    moved |= dict.fromkeys((shutil.copy(path, tmp_path / f"again{path.name}") for path in images), "sample")
    counted.images = 0
    features, report = counted.fill(root, moved)
    assert counted.images == report.encoded == 0 and report.images == 7
    assert_same(features.read(list(moved)[:7]), before)
    assert_same(features.read(list(moved)[7:]), before)
    first, second = list(images)[:2]
    shutil.copy(second, first)  # another image under the old name
    features, report = counted.fill(root, images)
    assert counted.images == 0
    assert_same(features.read([first]), before.take([1]))
    Image.new("RGB", (SIDE, SIDE), "red").save(first)
    features, report = counted.fill(root, images)
    assert counted.images == report.encoded == 1 and report.images == 8
    assert_same(features.read([first]), encoded(counted.model, [first]))


def test_files_that_have_not_changed_are_not_read_again(
    images: dict[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted, root = Counted(), tmp_path / "cache"
    counted.fill(root, images)
    from mmprune_train.features import content

    read = []
    monkeypatch.setattr(content, "sha256_of", lambda path: read.append(path))
    counted.fill(root, images)
    assert read == []
    (root / INDEX).write_text('{"cut of')
    monkeypatch.undo()
    assert counted.fill(root, images)[1].encoded == 0, "a damaged index costs time, not features"


def test_other_settings_are_encoded_anew_beside_the_old_ones(images: dict[Path, str], tmp_path: Path) -> None:
    one, other, root = Counted("twostage"), Counted("none"), tmp_path / "cache"
    kept = one.fill(root, images)[0].read(list(images))
    dense, report = other.fill(root, images)
    assert other.images == 7 and len(dense.read(list(images)).chosen) == 63 > len(kept.chosen)
    told = json.loads((Path(report.folder) / "settings.json").read_text())
    assert told["stage_1"].startswith("off") and told["dtype"] == "float32"
    one.images = 0
    assert_same(one.fill(root, images)[0].read(list(images)), kept)
    assert one.images == 0


def test_an_interrupted_fill_goes_on_where_it_was(images: dict[Path, str], tmp_path: Path) -> None:
    counted, root = Counted(), tmp_path / "cache"
    select = counted.model.select_patches

    def dying(pixels: torch.Tensor) -> Patches:
        if counted.images == 4:
            raise KeyboardInterrupt
        return select(pixels)

    counted.model.select_patches = dying
    with pytest.raises(KeyboardInterrupt):
        counted.fill(root, images)
    counted.model.select_patches = select
    counted.images = 0
    features, report = counted.fill(root, images)
    assert counted.images == report.encoded == 3
    assert_same(features.read(list(images)), encoded(counted.model, list(images)))


def test_a_slow_fill_writes_before_a_shard_is_full(
    images: dict[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmprune_train.features import shards

    monkeypatch.setattr(shards.ShardWriter.__init__, "__defaults__", (shards.SHARD_BYTES, 0.0))
    _, report = Counted().fill(tmp_path / "cache", images, shard_bytes=1 << 20)
    assert len(list(Path(report.folder).glob("*.safetensors"))) == 4, "one a chunk"


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (Path.unlink, r"sample 5: image .*5\.png is missing"),
        (lambda path: path.write_bytes(b"no image"), r"sample 5: image .*5\.png cannot be read"),
        (lambda path: (path.unlink(), path.mkdir()), r"sample 5: image .*5\.png cannot be read \(a folder"),
        (lambda path: (path.unlink(), os.mkfifo(path)), r"sample 5: image .*5\.png cannot be read \(a pipe, not"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_is_named_with_its_sample(
    harm: Callable[[Path], None], words: str, workers: int, images: dict[Path, str], tmp_path: Path
) -> None:
    path = list(images)[5]
    harm(path)
    with pytest.raises(UserError, match=words):
        Counted().fill(tmp_path / "cache", images, num_workers=workers)


class Threads:
    """Ranks as threads of this process."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.values: list[Any] = [None] * world
        self.barrier = threading.Barrier(world, timeout=60)

    def ranks(self, rank: int) -> Ranks:
        def exchange(value: Any) -> list[Any]:
            self.values[rank] = value
            self.barrier.wait()
            found = list(self.values)
            self.barrier.wait()
            return found

        return Ranks(rank, self.world, exchange)

    def run(self, work: Callable[[Ranks], Any]) -> list[Any]:
        """What each rank returns or raises."""
        results: list[Any] = [None] * self.world

        def one(rank: int) -> None:
            try:
                results[rank] = work(self.ranks(rank))
            except UserError as error:
                results[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def test_ranks_share_the_work_and_all_read_all(images: dict[Path, str], tmp_path: Path) -> None:
    models = [Counted(), Counted(), Counted()]
    found = Threads(3).run(lambda ranks: models[ranks.rank].fill(tmp_path / "cache", images, ranks=ranks))
    assert sorted(model.images for model in models) == [2, 2, 3]
    expected = encoded(models[0].model, list(images))
    for features, report in found:
        assert_same(features.read(list(images)), expected)
        assert report.encoded == report.images == 7
    flip_a_byte(next(Path(report.folder).glob("*.safetensors")))
    for model in models:
        model.images = 0
    found = Threads(3).run(lambda ranks: models[ranks.rank].fill(tmp_path / "cache", images, ranks=ranks))
    assert 0 < sum(model.images for model in models) < 7
    for features, _ in found:
        assert_same(features.read(list(images)), expected)


def test_a_bad_image_stops_every_rank(images: dict[Path, str], tmp_path: Path) -> None:
    list(images)[5].write_bytes(b"no image")
    models = [Counted(), Counted()]
    found = Threads(2).run(lambda ranks: models[ranks.rank].fill(tmp_path / "cache", images, ranks=ranks))
    assert all(isinstance(error, UserError) and "sample 5" in str(error) for error in found)
    images.pop(list(images)[5])
    again = Counted()
    again.fill(tmp_path / "cache", images)
    assert again.images < 6, "what was encoded before it stays"


def test_a_folder_that_cannot_be_written_is_a_users_mistake(images: dict[Path, str], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="trainer.feature_cache_dir"):
        Counted().fill(tmp_path / "cache", images)


@pytest.mark.parametrize(("pruner", "value"), [("none", torch.nan), ("twostage", torch.nan), ("none", torch.inf)])
def test_features_that_are_not_finite_are_not_kept(
    pruner: str, value: float, images: dict[Path, str], tmp_path: Path
) -> None:
    counted = Counted(pruner)
    encode = counted.model.encode_images

    def spoiled(pixels: torch.Tensor) -> Any:
        if counted.images == 2:  # the second chunk
            pixels[1, 0, 0, 0] = value
        return encode(pixels)

    counted.model.encode_images = spoiled
    named = r"features of .*3.png are NaN or infinite.*encoder.image_std"
    told = named if pruner == "none" else "scores row 1 holds NaN"
    with pytest.raises(UserError, match=told):
        counted.fill(tmp_path / "cache", images)
