"""easy-vqa in LLaVA's format, and finding the files of a data set."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mmprune_train.config.schema import DataConfig, SplitConfig
from mmprune_train.data import easy_vqa
from mmprune_train.data.easy_vqa import captions_of, prepare
from mmprune_train.data.image_folder import ImageFolder
from mmprune_train.data.records import read_annotations
from mmprune_train.data.sources import data_root, prepare_data, split_files
from mmprune_train.errors import UserError
from mmprune_train.storage.checksums import write_list


def test_captions_say_what_the_answers_say_and_no_more() -> None:
    questions = [
        ("what color is the circle?", "red", 0),
        ("what is the blue shape?", "triangle", 1),
        ("is there a teal shape?", "yes", 2),
        ("is there not a gray shape in the image?", "no", 3),
        ("is no rectangle present?", "no", 3),
        ("does the image not contain a circle?", "no", 4),
        ("is there a red shape?", "no", 5),
        ("is no circle present?", "yes", 5),
    ]
    assert captions_of(questions) == {
        0: "a red circle",
        1: "a blue triangle",
        2: "a teal shape",
        3: "a gray rectangle",
        4: "a circle",
    }


def test_contradicting_answers_are_an_error() -> None:
    with pytest.raises(UserError, match="image 4 contradict"):
        captions_of([("what color is the shape?", "red", 4), ("what color is the circle?", "blue", 4)])


def test_the_root_is_the_users_or_a_folder_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMPRUNE_CACHE", str(tmp_path))
    assert data_root(DataConfig(name="x")) == tmp_path / "data" / "x"
    assert data_root(DataConfig(name="x", root="/some/where")) == Path("/some/where")


def test_missing_files_name_the_key_and_how_to_get_them(tmp_path: Path) -> None:
    split = SplitConfig(annotations="a.json", images="images")
    data = DataConfig(name="x", root=str(tmp_path), pretrain=split, how_to_get="download it")
    with pytest.raises(UserError, match=r"data\.pretrain\.annotations: .*a\.json is missing; .*download it"):
        split_files(data, "pretrain")
    (tmp_path / "a.json").touch()
    with pytest.raises(UserError, match=r"data\.pretrain\.images: .*images is missing; download it"):
        split_files(data, "pretrain")
    (tmp_path / "images").mkdir()
    assert split_files(data, "pretrain") == (tmp_path / "a.json", ImageFolder(tmp_path / "images"))
    with pytest.raises(UserError, match=r"data\.evaluate\.annotations is not set; name a file in LLaVA's format"):
        split_files(data, "evaluate")


@pytest.mark.parametrize("root", ["/dev/null", "{file}", "{file}/in", "x" * 300, "a\0b"])
def test_a_root_that_is_no_folder_is_told(root: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    split = SplitConfig(annotations="a.json", images="images")
    with pytest.raises(UserError, match=r"data\.pretrain\.annotations: .*a\.json is .*; set data\.root") as caught:
        split_files(DataConfig(name="x", root=root.format(file=tmp_path / "file"), pretrain=split), "pretrain")
    assert len(str(caught.value).splitlines()) == 1


def test_only_built_in_sources_are_prepared(tmp_path: Path) -> None:
    assert prepare_data(DataConfig(name="x")) is None
    with pytest.raises(UserError, match="'easy-vqa' is unknown; choose one of easy_vqa"):
        prepare_data(DataConfig(name="x", root=str(tmp_path), source="easy-vqa"))


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"data\.root: .* already holds other files"):
        prepare(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """What `prepare` has written, of two pictures."""
    root = tmp_path / "easy_vqa"
    for number, split in enumerate(("train", "test")):
        (root / "images" / split).mkdir(parents=True)
        Image.new("RGB", (8, 8), (9 * number, 0, 0)).save(root / "images" / split / "0.png")
    (root / "evaluate.json").write_text("[\n\n]\n")
    (root / "manifest.json").write_text(json.dumps({"format": easy_vqa.FORMAT}))
    write_list(root)
    return root


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


@pytest.mark.parametrize("harm", [flip, cut, Path.unlink])
@pytest.mark.parametrize(
    "name", ["images/train/0.png", "images/test/0.png", "evaluate.json", "manifest.json", "checksums.json"]
)
def test_damage_to_prepared_data_and_pictures_is_told(name: str, harm: Callable[[Path], None], prepared: Path) -> None:
    assert prepare(prepared)["format"] == easy_vqa.FORMAT
    harm(prepared / name)
    with pytest.raises(UserError, match=r"delete .*easy_vqa and run `task=prepare` again|already holds other files"):
        prepare(prepared)


def test_a_folder_of_an_earlier_version_is_taken_as_it_is(prepared: Path) -> None:
    (prepared / "checksums.json").unlink()
    (prepared / "manifest.json").write_text(json.dumps({"format": easy_vqa.FORMAT, "sha256": {}}))
    assert prepare(prepared) == {"format": easy_vqa.FORMAT, "sha256": {}}


@pytest.mark.network
def test_easy_vqa_is_written_once_with_the_official_splits(tmp_path: Path) -> None:
    root = tmp_path / "easy_vqa"
    manifest = prepare(root)
    counts = {"pretrain": 3961, "instruct": 38575, "instruct_balanced": 20336, "instruct_open": 10168}
    counts |= {"instruct_conversations": 4000, "evaluate": 9673, "train_images": 4000, "test_images": 1000}
    assert manifest["counts"] == counts
    merged = read_annotations(root / "instruct_conversations.json", root / "images").records
    assert sum(len(record.turns) for record in merged) == 38575
    assert {record.turns[0].question.count("<image>") for record in merged} == {1}
    assert not any("<image>" in turn.question for record in merged for turn in record.turns[1:])
    test = read_annotations(root / "evaluate.json", root / "images").records
    assert test[0].turns[0].question == "<image>\nwhat is the red shape?" and test[0].turns[0].answer == "triangle"
    assert sum(record.kind == "yes_no" for record in test) == 7136
    assert all(path.is_file() for record in test for path in record.images)
    assert {path.parent.name for record in test for path in record.images} == {"test"}
    written = (root / "instruct.json").stat().st_mtime_ns
    assert prepare(root) == manifest and (root / "instruct.json").stat().st_mtime_ns == written
    (root / "instruct.json").write_text(json.dumps([]))
    with pytest.raises(UserError, match=r"changed or lost a file \(instruct\.json has .* bytes\); delete"):
        prepare(root)
