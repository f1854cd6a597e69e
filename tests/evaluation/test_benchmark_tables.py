"""Benchmarks in one TSV, as VLMEvalKit keeps them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from evaluation.answered import saying
from evaluation.miniatures import TEN, WRITERS, in_base64, picture, put_table

from mmprune_train.config.task_schema import BENCHMARKS as NAMES
from mmprune_train.data.images import read_image
from mmprune_train.errors import NotHere, UserError
from mmprune_train.evaluation.benchmarks.declared import BENCHMARKS
from mmprune_train.evaluation.benchmarks.load import load
from mmprune_train.evaluation.benchmarks.run import answers
from mmprune_train.evaluation.generate import load_images

TABLES: dict[str, dict[str, Any]] = {
    "vqav2": {"question": "What?", "answer": str(TEN), "category": "other"},
    "gqa": {"question": "What?", "answer": "red", "category": "query"},
    "vizwiz": {"question": "What?", "answer": json.dumps(TEN)},
    "scienceqa": {"question": "Which?", "A": "red", "B": "blue", "C": "", "answer": "A", "hint": "Look."},
    "textvqa": {"question": "What?", "answer": str(TEN)},
    "pope": {"question": "Is it? Please answer yes or no.", "answer": "Yes", "category": "popular,random"},
    "mme": {"question": "Is it? Please answer yes or no.", "answer": "Yes", "category": "OCR"},
    "mmbench": {"question": "Which?", "A": "red", "B": "blue", "answer": "A", "hint": "", "category": "x"},
    "mmbench_cn": {"question": "Which?", "A": "red", "B": "blue", "answer": "A", "hint": "nan", "category": "x"},
    "seed": {"question": "Which?", "A": "red", "B": "blue", "answer": "A", "category": "x"},
    "mmvet": {"question": "What?", "answer": "red", "category": "ocr"},
    "refcoco": {"question": "a man", "answer": "[10, 10, 50, 30]", "width": 80, "height": 40, "split": "val"},
}


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_is_read_from_a_table_too(name: str, tmp_path: Path) -> None:
    rows = [{"index": 0, "image": in_base64("red"), **TABLES[name]}, {"index": 1, "image": "0", **TABLES[name]}]
    put_table(tmp_path / BENCHMARKS[name].tables[0], rows)
    items = load(name, tmp_path, ocr_tokens=False).items
    assert len(items) == (4 if name == "pope" else 2) and items[0].images == items[1].images
    assert "Please answer" not in items[0].prompt
    (image,) = load_images(items[-1].question, read_image)
    assert image.getpixel((0, 0)) == (255, 0, 0)
    right = {"scienceqa": "A", "mmbench": "A", "mmbench_cn": "A", "seed": "A", "pope": "yes", "mme": "yes"}
    right["refcoco"] = "[0.125, 0.375, 0.625, 0.625]"
    metric = BENCHMARKS[name].metric
    if metric is not None:
        found = answers(items, metric, saying(lambda q: right.get(name, "red")))
        assert all(answer.score is not None and answer.score["score"] == 1.0 for answer in found)


def test_pictures_of_a_table_by_path_and_several_in_a_row(tmp_path: Path) -> None:
    picture(tmp_path / "images/gqa/a.png", "blue")
    asked = {"question": "What?", "answer": "red"}
    put_table(tmp_path / "gqa.tsv", [{"index": 0, "image_path": "a.png", **asked}])
    assert load("gqa", tmp_path).items[0].images == (tmp_path / "images/gqa/a.png",)
    first = {"index": 0, "image": in_base64("red"), "image_path": "x/a.png", **asked}
    put_table(tmp_path / "gqa.tsv", [first, {**first, "index": 1, "image": "0"}])
    items = load("gqa", tmp_path).items
    assert items[0].images == items[1].images, "as in MME.tsv"
    both = str([in_base64("red"), in_base64("blue")])
    put_table(tmp_path / "gqa.tsv", [{"index": 0, "image": both, **asked}])
    (item,) = load("gqa", tmp_path).items
    assert [i.getpixel((0, 0)) for i in load_images(item.question, read_image)] == [(255, 0, 0), (0, 0, 255)]


@pytest.mark.parametrize(
    ("cells", "told"),
    [
        ({"answer": "red"}, "line 3: answer is one text, where a list of all annotators' is scored"),
        ({"question": ""}, "line 3: there is nothing in column question"),
        ({"image": "9"}, "line 3: image 9 is neither a picture nor the index of an earlier row"),
    ],
)
def test_a_damaged_table_is_answered_by_its_line(cells: dict[str, str], told: str, tmp_path: Path) -> None:
    rows = [{"index": n, "image": in_base64("red"), "question": "What?", "answer": str(TEN)} for n in range(2)]
    put_table(tmp_path / "textvqa.tsv", [rows[0], {**rows[1], **cells}])
    with pytest.raises(UserError, match=told):
        load("textvqa", tmp_path, ocr_tokens=False)


def test_a_split_of_a_table(tmp_path: Path) -> None:
    put_table(tmp_path / "pope.tsv", [{"index": 0, "image": in_base64("red"), **TABLES["pope"]}])
    assert [item.id for item in load("pope", tmp_path, split="random").items] == ["random/0"]
    with pytest.raises(UserError, match="evaluate.splits.pope=x: there is no such split .* it has popular, random"):
        load("pope", tmp_path, split="x")


def test_a_table_of_mme_whose_rows_have_a_picture_each_is_refused(tmp_path: Path) -> None:
    """Accuracy+ would be the accuracy again."""
    put_table(tmp_path / "MME.tsv", [{"index": n, "image": in_base64("red"), **TABLES["mme"]} for n in range(2)])
    with pytest.raises(UserError, match="MME.tsv, line 2: 1 questions are about picture OCR/0, where 2 are scored"):
        load("mme", tmp_path)


def test_a_table_is_not_asked_in_place_of_a_prompt_with_ocr_tokens(tmp_path: Path) -> None:
    put_table(tmp_path / "textvqa.tsv", [{"index": 0, "image": in_base64("red"), **TABLES["textvqa"]}])
    with pytest.raises(NotHere, match="textvqa.tsv, line 2: .* OCR tokens, .* give evaluate.ocr_tokens=false"):
        load("textvqa", tmp_path)


def test_a_damaged_picture_of_a_table_is_answered_by_its_line(tmp_path: Path) -> None:
    broken = in_base64("red")[:-9] + "!" * 9
    cut = in_base64("red")[: len(in_base64("red")) // 8 * 4]
    for image, told in (
        (broken, "gqa.tsv, line 2: the image is no base64"),
        (cut, "gqa.tsv, line 2: image .* cannot be read"),
    ):
        put_table(tmp_path / "gqa.tsv", [{"index": 0, "image": image, "question": "What?", "answer": "red"}])
        with pytest.raises(UserError, match=told):
            load_images(load("gqa", tmp_path).items[0].question, read_image)


def test_a_table_cut_off_inside_a_cell(tmp_path: Path) -> None:
    WRITERS["mmbench"](tmp_path)
    path = tmp_path / "mmbench/mmbench_dev_20230712.tsv"
    text = path.read_text(encoding="utf-8")
    path.write_text(text[: text.rindex("And") + 4], encoding="utf-8")
    with pytest.raises(UserError, match=r"tsv, line \d+: unexpected end of data"):
        load("mmbench", tmp_path)
