"""The feature cache gives back what the encoder left of an image, and never what belongs to other settings."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import SIDE, VISION, packed, tiny_llava

from mmprune_train.config.compose import load_pruner
from mmprune_train.config.schema import EncoderConfig
from mmprune_train.data.images import ImageReader, image_processor
from mmprune_train.errors import UserError
from mmprune_train.features import settings as settings_module
from mmprune_train.features.content import INDEX
from mmprune_train.features.fill import Report, fill
from mmprune_train.features.ranks import Ranks
from mmprune_train.features.settings import feature_settings, folder_name
from mmprune_train.features.store import ImageFeatures
from mmprune_train.model.llava import PackedLlava
from mmprune_train.pruning import Pruner
from mmprune_train.pruning.patches import Patches
from mmprune_train.storage.files import unused_name
from mmprune_train.storage.folders import held

ENCODER = EncoderConfig(name="tiny", image_size=SIDE, patch_size=8)
READER = ImageReader(image_processor(ENCODER, "square"))


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


class Counted:
    """A tiny model that counts the images it encodes."""

    def __init__(self, pruner: object = "twostage", vision: str = "clip") -> None:
        self.model = packed(tiny_llava(vision), pruner).requires_grad_(False)
        self.model.vision_chunk = 2
        self.images = 0
        encode = self.model.encode_images

        def counting(pixels: torch.Tensor) -> Any:
            self.images += len(pixels)
            return encode(pixels)

        self.model.encode_images = counting

    def fill(self, root: Path, images: dict[Path, str], **more: Any) -> tuple[ImageFeatures, Report]:
        dtype = torch.float32
        settings = feature_settings(self.model, READER.processor.to_dict(), dtype)
        more = {"shard_bytes": 1500, **more}  # a few images of a few hundred bytes
        return fill(self.model, settings, "tiny", root, images, READER, dtype, torch.device("cpu"), **more)


def assert_same(found: Patches, expected: Patches) -> None:
    torch.testing.assert_close(found.chosen, expected.chosen, rtol=0, atol=1e-6)
    assert torch.equal(found.kept, expected.kept)
    for a, b in zip(found.entering, expected.entering, strict=True):
        assert a.tolist() == b.tolist()
    assert torch.equal(found.order.sort(1).values, expected.order.sort(1).values), "every patch has its place"


def encoded(model: PackedLlava, paths: list[Path]) -> Patches:
    """All images in one pass, without the cache."""
    return PackedLlava.select_patches(model, torch.stack([READER(path) for path in paths]))


RANKED = {"name": "x", "vision": {"order": "rank", "knee": {"method": "fixed_count", "count": 4}}}


@pytest.mark.parametrize("pruner", ["none", "twostage", "prumerge", "visionzip", RANKED], ids=str)
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


def change_weights(model: PackedLlava) -> None:
    with torch.no_grad():
        next(model.hf.model.vision_tower.parameters()).view(-1)[0] += 1e-3


def change_projector(model: PackedLlava) -> None:
    with torch.no_grad():
        model.hf.model.multi_modal_projector.linear_1.weight[0, 0] += 1e-3


def with_pruner(**vision: Any) -> Callable[[PackedLlava], None]:
    def change(model: PackedLlava) -> None:
        model.pruner = Pruner(load_pruner({"name": "x", "vision": vision}))

    return change


def key(
    model: PackedLlava,
    encoder: EncoderConfig = ENCODER,
    aspect: str = "square",
    dtype: Any = torch.float32,
    upright: bool = True,
) -> str:
    return folder_name("tiny", feature_settings(model, image_processor(encoder, aspect, upright).to_dict(), dtype))


@pytest.mark.parametrize(
    "change",
    [
        change_weights,
        with_pruner(score="cls_cosine"),
        with_pruner(layer=0),
        with_pruner(knee={"method": "max_chord"}),
        with_pruner(knee={"min_tokens": 3}),
        with_pruner(selection="max_min"),
        with_pruner(merge="nearest"),
        with_pruner(order="rank"),
        with_pruner(enabled=False),
        lambda model: setattr(model.config, "vision_feature_layer", -1),
        lambda model: setattr(model.config, "vision_feature_select_strategy", "full"),
        lambda model: setattr(model.hf.model.vision_tower.config, "hidden_act", "gelu"),
    ],
)
def test_a_changed_model_or_stage_1_misses(change: Callable[[PackedLlava], None]) -> None:
    model = packed(tiny_llava(), {"name": "x"})
    before = key(model)
    change(model)
    assert key(model) != before


def test_changed_preparation_precision_and_format_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed(tiny_llava(), "twostage")
    keys = [
        key(model),
        key(model, replace(ENCODER, image_size=32)),
        key(model, replace(ENCODER, image_mean=[0.5, 0.5, 0.5])),
        key(model, replace(ENCODER, image_std=[0.5, 0.5, 0.5])),
        key(model, aspect="pad"),
        key(model, upright=False),
        key(model, dtype=torch.bfloat16),
    ]
    monkeypatch.setattr(settings_module, "FORMAT", settings_module.FORMAT + 1)
    keys.append(key(model))
    monkeypatch.setattr(settings_module, "version", lambda name: "0")
    keys.append(key(model))
    assert len(set(keys)) == 9


def test_the_projector_counts_where_stage_1_looks_through_it_and_only_there() -> None:
    for pruner, counts in (("twostage", False), ("divprune", True)):
        model = packed(tiny_llava(), pruner)
        before = key(model)
        change_projector(model)
        assert (key(model) != before) == counts


def test_a_changed_function_of_the_users_misses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    source = tmp_path / "my_score_of_features.py"
    source.write_text("def score(view):\n    return view.patches.norm(dim=-1)\n")
    model = packed(tiny_llava(), {"name": "x", "vision": {"score": "my_score_of_features:score"}})
    before = key(model)
    assert key(model) == before
    source.write_text("def score(view):\n    return -view.patches.norm(dim=-1)\n")
    assert key(model) != before


def test_what_happens_after_stage_1_does_not_count() -> None:
    one = packed(tiny_llava(), "twostage")
    other = packed(tiny_llava(), {"name": "y", "vision": {"positions": "original"}, "language": {"layer": 1}})
    assert key(one) == key(other)


@pytest.mark.parametrize("vision", list(VISION))
def test_a_saved_and_loaded_encoder_is_the_same(vision: str, tmp_path: Path) -> None:
    """The second stage starts from the first one's folder."""
    from transformers import LlavaForConditionalGeneration

    hf = tiny_llava(vision)
    pruner = {"name": "x", "vision": {"score": "pooled_cosine"}}
    before = key(packed(hf, pruner))
    hf.save_pretrained(tmp_path)
    assert key(packed(LlavaForConditionalGeneration.from_pretrained(tmp_path), pruner)) == before


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


def cut_off(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-10])


def flip_a_byte(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[-30] ^= 1
    shard.write_bytes(bytes(data))


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
