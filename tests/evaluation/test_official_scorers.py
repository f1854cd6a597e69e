"""Every metric beside the benchmark's own scorer, on the pairs that were recorded with it (recorded/README.md)."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from mmprune_train.evaluation.metrics.anls import anls
from mmprune_train.evaluation.metrics.binary import binary_scores
from mmprune_train.evaluation.metrics.boxes import RIGHT, in_padded_square, iou, read_box
from mmprune_train.evaluation.metrics.exact import gqa_match
from mmprune_train.evaluation.metrics.mme import mme_scores
from mmprune_train.evaluation.metrics.options import bare_letter, first_letter, llava_letter, vlmeval_letter
from mmprune_train.evaluation.metrics.soft_accuracy import evalai_accuracy, vqa_accuracy
from mmprune_train.evaluation.metrics.vqa_text import evalai_normalised, vqa_normalised
from mmprune_train.evaluation.metrics.yes_no import bare, first_characters, first_sentence

RECORDED = Path(__file__).parent / "recorded"
TOTALS = json.loads((RECORDED / "totals.json").read_text())


def rows(name: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (RECORDED / f"{name}.jsonl").read_text().splitlines()]
    assert len(found) >= 500
    return found


def test_vqa() -> None:
    for row in rows("vqa"):
        assert vqa_normalised(row["prediction"]) == row["normalised"], row
        assert 100 * vqa_accuracy(row["prediction"], row["answers"]) == row["percent"], row


def test_lmms_eval_differs_where_all_annotators_agree_alone() -> None:
    for row in rows("vqa"):
        if abs(row["percent"] / 100 - row["lmms"]) > 1e-9:
            assert len({" ".join(answer.split()) for answer in row["answers"]}) == 1, row


def test_textvqa_and_vizwiz() -> None:
    for row in rows("evalai"):
        assert evalai_normalised(row["prediction"]) == row["normalised"], row
        assert evalai_accuracy(row["prediction"], row["answers"]) == row["score"], row


def test_gqa() -> None:
    for row in rows("gqa"):
        assert gqa_match(row["prediction"], row["answer"]) == row["right"], row


def test_pope() -> None:
    found = rows("pope")
    for row in found:
        assert first_sentence(row["prediction"]) == row["read"], row
        assert bare(row["prediction"]) == row["lmms"], row
    labels = [row["label"] for row in found]
    names = {"accuracy": "Accuracy", "precision": "Precision", "recall": "Recall", "f1": "F1 score"}
    ours = binary_scores([first_sentence(row["prediction"]) for row in found], labels)
    official = TOTALS["pope"]["official"]
    assert ours == {**{name: official[theirs] for name, theirs in names.items()}, "yes_share": official["Yes ratio"]}
    strict, lmms = binary_scores([bare(row["prediction"]) for row in found], labels), TOTALS["pope"]["lmms"]
    assert strict["accuracy"] == lmms["accuracy"] and strict["precision"] == lmms["precision"]
    assert strict["recall"] == lmms["recall"] and strict["f1"] == lmms["f1_score"]


def test_mme() -> None:
    found = rows("mme")
    for row in found:
        assert first_characters(row["prediction"]) == row["read"], row
    ours = mme_scores((row["task"], row["picture"], row["read"] == row["answer"].lower()) for row in found)
    assert ours["tasks"] == TOTALS["mme"]["tasks"]
    assert [ours["perception"], ours["cognition"]] == TOTALS["mme"]["sums"]
    assert ours["total"] == pytest.approx(sum(TOTALS["mme"]["sums"]))


def test_mme_without_all_tasks_has_no_sum() -> None:
    part = mme_scores([("OCR", "a", True), ("OCR", "a", False)])
    assert part == {"perception": None, "cognition": None, "total": None, "tasks": {"OCR": 50.0}}


def test_scienceqa() -> None:
    hits: dict[bool, list[bool]] = {True: [], False: []}
    for row in rows("scienceqa"):
        letter = llava_letter(row["prediction"], "ABCDE"[: row["options"]]).letter
        assert (letter == row["answer"]) == row["right"], row
        assert not letter or letter == row["parsed"], row
        hits[row["image"]].append(row["right"])
    both = hits[True] + hits[False]
    for name, some in (("all", both), ("image", hits[True])):
        assert round(100 * sum(some) / len(some), 2) == TOTALS["scienceqa"][name]


def test_mmbench_with_circular_evaluation() -> None:
    groups, expected = defaultdict(list), {}
    for row in rows("mmbench"):
        letter = vlmeval_letter(row["prediction"], row["options"]).letter
        assert letter == row["read"], row
        assert (letter == row["answer"]) == bool(row["right"]), row
        groups[row["group"]].append(letter == row["answer"])
        expected[row["group"]] = bool(row["group_right"])
    assert {group: all(right) for group, right in groups.items()} == expected


def test_seed() -> None:
    types = defaultdict(list)
    for row in rows("seed"):
        assert (first_letter(row["prediction"]) == row["answer"].lower()) == bool(row["lmms"]), row
        types[f"T{row['type']}"].append(bare_letter(row["prediction"], "ABCD").letter == row["answer"])
    image = [right for number in range(1, 10) for right in types[f"T{number}"]]
    shares = {name: round(100 * sum(right) / len(right), 2) for name, right in {**types, "image": image}.items()}
    assert shares == {name: TOTALS["seed"][name] for name in shares}


def test_anls() -> None:
    for row in rows("anls"):
        assert anls(row["prediction"], row["answers"]) == row["score"], row


def test_boxes() -> None:
    for row in rows("boxes"):
        box, right = read_box(row["prediction"]), tuple(row["box"])
        assert list(box or (0, 0, 0, 0)) == row["read"], row
        overlap = iou(box or (0, 0, 0, 0), right)
        assert overlap == row["iou"] and (overlap >= RIGHT) == row["right"], row


def test_the_overlap_is_the_same_in_the_padded_square() -> None:
    one, other = (10.0, 20.0, 110.0, 70.0), (40.0, 10.0, 120.0, 60.0)
    assert in_padded_square((0, 0, 200, 100), 200, 100) == (0, 0.25, 1, 0.75)
    moved = [in_padded_square(box, 200, 100) for box in (one, other)]
    assert iou(moved[0], moved[1]) == pytest.approx(iou(one, other)) != 0


@pytest.mark.parametrize(
    ("answer", "how"),
    [("B", "letter"), ("B. blue", "start"), ("The answer is B.", "sentence"), ("blue", "none"), ("D", "none")],
)
def test_how_a_letter_was_read_is_told(answer: str, how: str) -> None:
    assert llava_letter(answer, "ABC").how == how


@pytest.mark.parametrize(
    ("answer", "how"),
    [
        ("B", "letter"),
        ("(B) blue", "word"),
        ("It is blue.", "text"),
        ("The correct answer is **B**. A red one it is not, since", "sentence"),
        ("Cannot determine the answer", "refused"),
        ("red or blue", "none"),
    ],
)
def test_how_vlmevalkit_reads_a_letter_is_told(answer: str, how: str) -> None:
    assert vlmeval_letter(answer, {"A": "red", "B": "blue"}).how == how
