"""What is said of benchmarks whose files are damaged, or not all there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from evaluation.answered import scores
from evaluation.miniatures import WRITERS

from mmprune_train.config.task_schema import BENCHMARKS as NAMES
from mmprune_train.errors import NotHere, UserError
from mmprune_train.evaluation.benchmarks.declared import BENCHMARKS
from mmprune_train.evaluation.benchmarks.load import load

DAMAGE: list[tuple[str, str, str, str, str]] = [
    # benchmark, file, what is replaced there, by what, what is told
    (
        "vqav2",
        "vqav2/v2_OpenEnded_mscoco_val2014_questions.json",
        '"question_id": 10\n',
        '"question_id": \n',
        r"questions.json: not JSON \(.*line 7",
    ),
    (
        "vqav2",
        "vqav2/v2_mscoco_val2014_annotations.json",
        '"question_id": 10,',
        '"question_id": 99,',
        r"questions\[0\]: .*annotations.json has no question 10",
    ),
    (
        "gqa",
        "gqa/data/testdev_balanced_questions.json",
        '"answer": "red"',
        '"answr": "red"',
        r"questions.json\[01\]: there is no key answer",
    ),
    (
        "vizwiz",
        "vizwiz/val.json",
        '"answers": [',
        '"answers": 3, "x": [',
        r"val.json\[0\]: answers is a int, not a list",
    ),
    (
        "textvqa",
        "textvqa/TextVQA_0.5.1_val.json",
        "Camera 3",
        "car",
        r"data\[3\]: llava_textvqa.* has no such question of image a3",
    ),
    (
        "textvqa",
        "textvqa/llava_textvqa_val_v051_ocr.jsonl",
        '{"question_id": "a2"',
        '{"question_id" "a2"',
        "ocr.jsonl, line 3: not JSON",
    ),
    (
        "scienceqa",
        "scienceqa/problems.json",
        '"answer": 1',
        '"answer": 7',
        r"problems.json\[1\]: answer 7 of 3 choices",
    ),
    ("scienceqa", "scienceqa/pid_splits.json", '"5"', '"77"', "problem 77 of test is not in"),
    (
        "pope",
        "pope/coco/coco_pope_popular.json",
        '"label": "no"',
        '"label": "maybe"',
        "popular.json, line 2: the answer is 'maybe'",
    ),
    ("mme", "MME/MME_Benchmark_release_version/OCR/1.txt", "\tNo", " No", "1.txt, line 2: there is no tab"),
    (
        "mmbench",
        "mmbench/mmbench_dev_20230712.tsv",
        "1000000\t",
        "1000000\tx\t",
        "tsv, line 3: 15 cells for 14 columns",
    ),
    (
        "mmbench",
        "mmbench/mmbench_dev_20230712.tsv",
        "\tC\tcoarse",
        "\tD\tcoarse",
        "line 3: answer 'D' is none of the options A, B, C",
    ),
    (
        "seed",
        "seed_bench/SEED-Bench.json",
        '"choice_c": "c1"',
        '"choice_c": null',
        r"questions\[1\]: choice_c is a NoneType",
    ),
    (
        "mmvet",
        "mm-vet/mm-vet.json",
        '"imagename": "v1_2.png"',
        '"imagename": []',
        r"mm-vet.json\[v1_2\]: imagename is a list",
    ),
    (
        "refcoco",
        "refcoco/refcoco_val.jsonl",
        '10, 50, 30], "image": "x/COCO_train2014_1',
        '10, 5, 30], "image": "x/COCO_train2014_1',
        "refcoco_val.jsonl, line 2: box .* is none",
    ),
]


@pytest.mark.parametrize(("name", "file", "old", "new", "told"), DAMAGE)
def test_a_damaged_file_is_answered_by_its_place(
    name: str, file: str, old: str, new: str, told: str, tmp_path: Path
) -> None:
    WRITERS[name](tmp_path)
    path = tmp_path / file
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(UserError, match=told) as caught:
        load(name, tmp_path)
    assert not isinstance(caught.value, NotHere) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", NAMES)
def test_what_is_missing_is_named_with_where_to_get_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(NotHere, match="get it from ") as caught:
        load(name, tmp_path)
    assert BENCHMARKS[name].get in str(caught.value) and BENCHMARKS[name].tables[0] in str(caught.value)


def test_what_is_there_is_asked_without_the_rest(tmp_path: Path) -> None:
    WRITERS["pope"](tmp_path)
    (tmp_path / "pope/coco/coco_pope_popular.json").unlink()
    (tmp_path / "pope/val2014/COCO_val2014_2.jpg").unlink()
    found = load("pope", tmp_path)
    assert len(found.items) == 8 and {item.kind for item in found.items} == {"random", "adversarial"}
    assert "there is no coco/coco_pope_popular.json" in found.notes[0]
    assert "1 of 3 images are missing, the first is" in found.notes[1] and "4 of 12 questions" in found.notes[1]
    shutil.rmtree(tmp_path / "pope/val2014")
    with pytest.raises(NotHere, match="3 of 3 images are missing.*get them from"):
        load("pope", tmp_path)


@pytest.mark.parametrize("name", ["/etc/passwd", "../../secret.png"])
def test_no_image_leads_out_of_the_folder(name: str, tmp_path: Path) -> None:
    WRITERS["pope"](tmp_path)
    path = tmp_path / "pope/coco/coco_pope_random.json"
    path.write_text(path.read_text().replace("COCO_val2014_1.jpg", name, 1))
    with pytest.raises(UserError, match="random.json, line 3: image .* leads out of"):
        load("pope", tmp_path)


def test_mme_without_a_task_has_no_total(tmp_path: Path) -> None:
    WRITERS["mme"](tmp_path)
    shutil.rmtree(tmp_path / "MME/MME_Benchmark_release_version/OCR")
    found = scores("mme", tmp_path, lambda q: "Yes")
    assert found["perception"] is None and found["total"] is None and found["cognition"] == 200
    assert "there is no task OCR" in load("mme", tmp_path).notes[0]
