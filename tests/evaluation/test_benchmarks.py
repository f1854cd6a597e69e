"""Public benchmarks read from miniatures in their official layout: what is asked, what is missing or damaged, what a
server takes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evaluation.miniatures import TASKS, TEN, WRITERS, in_base64, picture, put, put_table, write_all

from mmprune_train.config.task_schema import BENCHMARKS as NAMES
from mmprune_train.data.images import read_image
from mmprune_train.errors import NotHere, UserError
from mmprune_train.evaluation.benchmarks import submissions
from mmprune_train.evaluation.benchmarks.declared import BENCHMARKS
from mmprune_train.evaluation.benchmarks.item import Item, Loaded
from mmprune_train.evaluation.benchmarks.load import choose, load
from mmprune_train.evaluation.benchmarks.run import answers, counts, main_number, numbers, prediction_lines
from mmprune_train.evaluation.generate import Prediction, load_images
from mmprune_train.evaluation.questions import Question

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
COUNTS = dict.fromkeys(
    ("dense", "stage1", "stage2", "layer_mean", "visual_dense", "visual_stage1", "visual_stage2"), 1.0
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("eval"))


def saying(text: Callable[[Question], str]) -> Callable[..., list[Prediction]]:
    """A model that says this."""
    return lambda questions: [Prediction(question, text(question), COUNTS) for question in questions]


def scores(name: str, root: Path, text: Callable[[Question], str], **asked: Any) -> dict[str, Any]:
    metric = BENCHMARKS[name].metric
    return numbers(answers(load(name, root, **asked).items, metric, saying(text)), metric)


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


def test_scores_of_right_wrong_and_half_right_answers(root: Path) -> None:
    assert scores("vqav2", root, lambda q: "Dark Red.")["accuracy"] == pytest.approx(0.9)
    assert scores("textvqa", root, lambda q: "the red")["accuracy"] == 1.0
    assert scores("vizwiz", root, lambda q: "blue")["accuracy"] == pytest.approx(0.3)
    assert scores("gqa", root, lambda q: "Yes.")["kinds"] == {"verify": 1.0, "query": 0.0, "choose": 0.0}
    science = scores("scienceqa", root, lambda q: "A. this" if "neither" in q.text else "The answer is A.")
    assert science["accuracy"] == 0.5 and science["accuracy_image"] == 0.0
    assert science["read"] == {"sentence": {"answers": 3, "right": 3}, "start": {"answers": 3, "right": 0}}
    seed = scores("seed", root, lambda q: "A because")
    assert seed["accuracy"] == 0.0 and seed["accuracy_first_letter"] == pytest.approx(2 / 6)
    boxes = scores("refcoco", root, lambda q: "[0.125, 0.375, 0.625, 0.6]" if "left" in q.text else "there")
    assert boxes["accuracy"] == 0.6 and boxes["without_a_box"] == 2 and boxes["iou"] == pytest.approx(0.6 * 0.9)


def test_pope_by_split_and_read_in_two_ways(root: Path) -> None:
    found = scores("pope", root, lambda q: "Yes." if "popular" not in q.text else "no")
    assert found["splits"]["random"] | {"f1": 0} == {
        "accuracy": 0.5, "precision": 0.5, "recall": 1.0, "f1": 0, "yes_share": 1.0,
        "strict_accuracy": 0.0, "strict_f1": 0.0,
    }  # fmt: skip
    assert found["splits"]["popular"]["strict_accuracy"] == 0.5 and found["splits"]["popular"]["f1"] == 0.0
    assert found["f1"] == pytest.approx(2 / 3 * 2 / 3) and found["accuracy"] == 0.5


def test_mme_in_points(root: Path) -> None:
    right = scores("mme", root, lambda q: "no" if "none" in q.text else "Yes")
    assert right["perception"] == 2000 and right["cognition"] == 800 and right["total"] == 2800
    yes = scores("mme", root, lambda q: "Yes")
    assert yes["total"] == 700 and yes["tasks"]["OCR"] == 50


def test_mmbench_counts_a_question_where_all_its_rotations_are_right(root: Path) -> None:
    def first_two(question: Question) -> str:
        letter = next(line[0] for line in question.text.splitlines() if line[1:] == f". {wanted(question)}")
        return letter if "Last" not in question.text else "A"

    def wanted(question: Question) -> str:
        return "red" if "Which" in question.text else "green"

    found = scores("mmbench", root, first_two)
    assert found["accuracy"] == pytest.approx(2 / 3) and found["accuracy_single"] == pytest.approx(7 / 9)
    assert found["kinds"] == {"coarse": 0.5, "fine": 1.0}


def test_what_is_the_same_to_a_model_is_asked_once(root: Path) -> None:
    asked: list[Question] = []

    def ask(questions: Any) -> list[Prediction]:
        asked.extend(questions)
        return saying(lambda q: "yes")(questions)

    items = load("pope", root).items
    doubled = [*items, *(Item(f"{i.id}x", i.images, i.prompt, i.answers, i.kind, i.split, i.where) for i in items)]
    assert len(answers(doubled, BENCHMARKS["pope"].metric, ask)) == 36 and len(asked) == 18


def test_predictions_and_counts(root: Path) -> None:
    benchmark, items = BENCHMARKS["mmbench"], load("mmbench", root).items
    chosen = choose(items, ["coarse"], 1, "mmbench")
    assert [item.group for item in chosen] == ["0", "0", "0"], "a question with its rotations"
    found = answers(chosen, benchmark.metric, saying(lambda q: "(A) red"))
    rows = [json.loads(line) for line in prediction_lines(found).splitlines()]
    assert rows[0]["read"] == "A" and rows[0]["how"] == "word" and rows[0]["score"] == 1.0 and rows[1]["score"] == 0.0
    assert {"id", "kind", "question", "prediction", "answer", "visual_tokens_dense"} <= rows[0].keys()
    assert counts(items, chosen)["fine"] == {"asked": 0, "available": 3, "without_answer": 0}
    assert main_number(numbers(found, benchmark.metric), benchmark.metric) == 0.0
    with pytest.raises(UserError, match="mmbench has no question of kind x; it has coarse, fine"):
        choose(items, ["x"], None, "mmbench")


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


def test_mme_without_a_task_has_no_total(tmp_path: Path) -> None:
    WRITERS["mme"](tmp_path)
    shutil.rmtree(tmp_path / "MME/MME_Benchmark_release_version/OCR")
    found = scores("mme", tmp_path, lambda q: "Yes")
    assert found["perception"] is None and found["total"] is None and found["cognition"] == 200
    assert "there is no task OCR" in load("mme", tmp_path).notes[0]


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
    items = load(name, tmp_path).items
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


def test_files_for_servers_and_judges(root: Path, tmp_path: Path) -> None:
    def written(name: str, told: Callable[[Item], str], **asked: Any) -> tuple[Loaded, Path]:
        found = load(name, root, **asked)
        submit = BENCHMARKS[name].submit
        assert submit is not None
        return found, submit(tmp_path, [(item, told(item)) for item in found.items], found)[0]

    _, path = written("vqav2", lambda i: "The Two cats.", split="test-dev")
    rows = json.loads(path.read_text())
    assert rows[0] == {"question_id": 10, "answer": "2 cats"} and rows[3:] == [
        {"question_id": 13, "answer": ""},
        {"question_id": 14, "answer": ""},
    ]
    _, path = written("vizwiz", lambda i: "Unanswerable", split="test")
    assert json.loads(path.read_text())[0] == {"image": "VizWiz_test_00000000.jpg", "answer": "unanswerable"}
    _, path = written("mmvet", lambda i: "x = 1")
    assert json.loads(path.read_text()) == {f"v1_{n}": "x = 1" for n in range(5)}
    _, path = written("seed", lambda i: "B")
    assert json.loads(path.read_text().splitlines()[0]) == {"question_id": "100", "prediction": "B"}
    _, path = written("gqa", lambda i: "Yes.")
    assert json.loads(path.read_text())[0] == {"questionId": "00", "prediction": "yes"}
    found, path = written("mmbench", lambda i: "A")
    header, *lines = path.read_text().splitlines()
    assert header.split("\t") == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert lines[-1].split("\t")[6] == "A" and len(found.items) == 9


def test_the_upload_of_mmbench_as_a_workbook(root: Path, tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    found = load("mmbench", root)
    _, path = submissions.mmbench(tmp_path, [(item, "B") for item in found.items], found)
    rows = list(openpyxl.load_workbook(path).active.values)
    assert rows[0][:2] == ("index", "question") and rows[1][0] == 0 and rows[1][6] == "B" and len(rows) == 10
