"""Public benchmarks read from miniatures in their official layout: what is asked, and what is known of the answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from evaluation.answered import saying
from evaluation.miniatures import TASKS, TEN, WRITERS, picture, put, write_all

from mmprune_train.config.task_schema import BENCHMARKS as NAMES
from mmprune_train.data.images import read_image
from mmprune_train.errors import NotHere, UserError
from mmprune_train.evaluation.benchmarks.declared import BENCHMARKS
from mmprune_train.evaluation.benchmarks.load import load
from mmprune_train.evaluation.benchmarks.run import answers, numbers
from mmprune_train.evaluation.generate import load_images

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("eval"))


def test_every_benchmark_of_the_config_is_declared_and_has_a_miniature() -> None:
    assert list(BENCHMARKS) == list(NAMES) == list(WRITERS)


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("vqav2", f"What colour is it, 0?{SHORT}"),
        ("gqa", f"Is it 0?{SHORT}"),
        (
            "vizwiz",
            "What is this? and what color is it?\n"
            f"When the provided information is insufficient, respond with 'Unanswerable'.{SHORT}",
        ),
        ("scienceqa", f"Context: Select the better estimate.\nWhich one, 0?\nA. this\nB. that{LETTER}"),
        ("textvqa", f"What is the brand of this camera 0?\nReference OCR token: DAKOTA, DIGITAL{SHORT}"),
        ("pope", f"Is there a random 0 in the image?{SHORT}"),
        ("mme", f"Is it a existence?{SHORT}"),
        ("mmbench", f'A picture is shown.\nWhich colour\tis "it"?\nA. red\nB. green\nC. blue{LETTER}'),
        ("mmbench_cn", "看图。\n什么颜色？\nA. red\nB. green\nC. blue\n请直接回答选项字母。"),
        ("seed", f"What is it, 0?\nA. a0\nB. b0\nC. c0\nD. d0{LETTER}"),
        ("mmvet", "What is x in the equation?"),
        ("refcoco", "Please provide the bounding box coordinate of the region this sentence describes: a man"),
    ],
)
def test_the_prompt_is_the_one_that_llava_was_measured_with(name: str, prompt: str, root: Path) -> None:
    item = load(name, root).items[0]
    assert item.prompt == prompt
    assert item.question.text == "<image>\n" * len(item.images) + prompt
    own = load(name, root, prompt="Say: {question}").items[0].prompt
    assert own.startswith("Say: ") and own.removeprefix("Say: ").splitlines()[0] in prompt
    with pytest.raises(UserError, match=rf"evaluate.prompts.{name}: there is no {{question}}"):
        load(name, root, prompt="What?")


@pytest.mark.parametrize("name", NAMES)
def test_every_picture_can_be_read_and_ids_are_unique(name: str, root: Path) -> None:
    items = load(name, root).items
    assert len({item.id for item in items}) == len(items) >= 5
    for item in items:
        assert all(image.size in ((48, 40), (80, 40)) for image in load_images(item.question, read_image))


def test_answers_kinds_and_groups(root: Path) -> None:
    assert load("vqav2", root).items[0].answers == tuple(TEN)
    assert [item.kind for item in load("gqa", root).items[:3]] == ["verify", "query", "choose"]
    assert [(i.answers, i.kind, len(i.images)) for i in load("scienceqa", root).items[:2]] == [
        (("A",), "text", 0),
        (("B",), "image", 1),
    ]
    pairs = load("mme", root).items
    assert [item.kind for item in pairs[::4]] == list(TASKS)
    assert [(i.answers[0], i.group) for i in pairs[:2]] == [("yes", "existence/0"), ("no", "existence/0")]
    rotated = [(i.id, i.group, i.answers[0], i.options["A"]) for i in load("mmbench", root).items[:3]]
    assert rotated == [("0", "0", "A", "red"), ("1000000", "0", "C", "green"), ("2000000", "0", "B", "blue")]
    assert [i.kind for i in load("seed", root).items[:2]] == ["Scene Understanding", "Instance Identity"]


def test_server_scored_splits_have_no_answers(root: Path) -> None:
    test = load("vqav2", root, split="test-dev")
    assert [item.id for item in test.items] == ["10", "11", "12"] and test.others == (13, 14)
    assert all(not item.answers for item in (*test.items, *load("vizwiz", root, split="test").items))
    assert (
        numbers(answers(test.items, BENCHMARKS["vqav2"].metric, saying(lambda q: "red")), BENCHMARKS["vqav2"].metric)
        == {}
    )
    with pytest.raises(UserError, match="there is no split test-std; one of val, test-dev, test"):
        load("vqav2", root, split="test-std")


@pytest.mark.parametrize(
    ("name", "split"),
    [("gqa", "testdev_balanced"), ("textvqa", "val"), ("mme", "test"), ("seed", "image"), ("mmvet", "test")],
)
def test_a_split_that_is_not_there_is_refused(name: str, split: str, root: Path) -> None:
    assert load(name, root, split=split).items == load(name, root).items
    told = f"evaluate.splits.{name}=other: there is no such split in the files of {name}; it has {split}$"
    with pytest.raises(UserError, match=told):
        load(name, root, split="other")


def test_a_line_ends_at_a_line_feed_alone(tmp_path: Path) -> None:
    """JSON and plain text may hold what Unicode calls a line or paragraph separator."""
    odd = "Is\u2028there\x85a\u2029hat?"
    WRITERS["pope"](tmp_path)
    WRITERS["mme"](tmp_path)
    row = json.dumps({"question_id": 0, "image": "COCO_val2014_0.jpg", "text": odd, "label": "no"}, ensure_ascii=False)
    (tmp_path / "pope/coco/coco_pope_random.json").write_text(f"{row}\r\n{row}", encoding="utf-8", newline="")
    text = tmp_path / "MME/MME_Benchmark_release_version/OCR/0.txt"
    text.write_text(f"{odd}\tYes\r\nIs it?\tNo\r\n", encoding="utf-8", newline="")
    items = load("pope", tmp_path, split="random").items
    assert [item.prompt for item in items] == [odd + SHORT] * 2 and items[1].where.endswith("line 2")
    assert [i.prompt for i in load("mme", tmp_path).items if i.group == "OCR/0"] == [odd + SHORT, "Is it?" + SHORT]


def test_the_folder_may_be_named_from_elsewhere(root: Path) -> None:
    assert load("pope", root / "gqa" / "..").items[0].answers == ("yes",)


def test_textvqa_without_ocr_tokens(root: Path) -> None:
    assert load("textvqa", root, ocr_tokens=False).items[0].prompt == f"What is the brand of this camera 0?{SHORT}"


def test_boxes_are_read_in_three_layouts_and_told_in_either_frame(root: Path) -> None:
    found = {item.kind: item for item in load("refcoco", root).items}
    assert {kind: item.extra["box"] for kind, item in found.items()} == {
        "refcoco_val": (0.125, 0.375, 0.625, 0.625),
        "refcoco+_testA": (0.125, 0.375, 0.625, 0.625),
        "refcocog_test": (0.125, 0.375, 0.625, 0.625),
    }
    item = load("refcoco", root, box_frame="image").items[0]
    assert item.extra["box"] == (0.125, 0.25, 0.625, 0.75) and item.answers == ("[0.125, 0.250, 0.625, 0.750]",)
    assert [item.kind for item in load("refcoco", root, split="testA").items] == ["refcoco+_testA"]


def test_two_files_of_one_set_and_split_are_refused(tmp_path: Path) -> None:
    WRITERS["refcoco"](tmp_path)
    home = tmp_path / "refcoco"
    (home / "REC_refcoco_unc_val.jsonl").write_bytes((home / "refcoco_val.jsonl").read_bytes())
    with pytest.raises(UserError, match="refcoco_val.jsonl: REC_refcoco_unc_val.jsonl has refcoco_val, too; keep one"):
        load("refcoco", tmp_path)
    assert [item.kind for item in load("refcoco", tmp_path, split="testA").items] == ["refcoco+_testA"]


def test_refcoco_as_it_is_published(tmp_path: Path) -> None:
    picture(tmp_path / "refcoco/images/COCO_train2014_7.jpg", size=(40, 80))
    home = tmp_path / "refcoco/refcoco"
    ref = {"ref_id": 1, "ann_id": 5, "image_id": 7, "split": "val", "sentences": [{"sent_id": 9, "sent": "left"}]}
    put(home / "refs(unc).json", [ref, {**ref, "split": "train"}])
    with pytest.raises(NotHere, match="instances.json, which has the boxes"):
        load("refcoco", tmp_path)
    image = {"id": 7, "file_name": "COCO_train2014_7.jpg", "width": 40, "height": 80}
    put(home / "instances.json", {"images": [image], "annotations": [{"id": 5, "bbox": [0, 20, 40, 20]}]})
    (item,) = load("refcoco", tmp_path).items
    assert (item.id, item.kind, item.extra["box"]) == ("refcoco/9", "refcoco_val", (0.25, 0.25, 0.75, 0.5))
    (home / "refs(unc).json").rename(home / "refs(unc).p")
    with pytest.raises(NotHere, match=r"refs\(unc\).p: a pickle may run code"):
        load("refcoco", tmp_path)
