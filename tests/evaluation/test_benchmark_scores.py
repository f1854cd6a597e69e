"""What answers to a benchmark come to, and the files that servers and judges take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evaluation.answered import saying, scores
from evaluation.miniatures import WRITERS, write_all
from openpyxl import load_workbook

from mmprune_train.config.task_schema import EvaluateConfig
from mmprune_train.errors import UserError
from mmprune_train.evaluation.benchmarks import submissions
from mmprune_train.evaluation.benchmarks.declared import BENCHMARKS
from mmprune_train.evaluation.benchmarks.item import Item, Loaded
from mmprune_train.evaluation.benchmarks.load import choose, load
from mmprune_train.evaluation.benchmarks.run import answers, counts, main_number, numbers, prediction_lines
from mmprune_train.evaluation.generate import Prediction
from mmprune_train.evaluation.metrics.exact import blind_guess
from mmprune_train.evaluation.questions import Question
from mmprune_train.tasks.evaluate_benchmarks import read_benchmarks


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("eval"))


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


@pytest.mark.parametrize("name", ["scienceqa", "mmbench", "mmbench_cn", "seed"])
def test_the_blind_guess_of_a_letter_is_read_as_one(name: str, root: Path) -> None:
    guess = blind_guess([("x?", "B"), ("y?", " B"), ("z?", "b"), ("w?", "A")])
    assert guess("x?") == guess("new?") == "B" and guess("w?") == "A"
    metric = BENCHMARKS[name].metric
    found = [answer.score for answer in answers(load(name, root).items, metric, saying(lambda q: guess(q.plain)))]
    assert sum(score["score"] for score in found if score) >= 1


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


def test_an_upload_with_questions_that_were_not_asked_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One without its image and one beyond the limit: of three that are test-dev, of five that the server wants."""
    WRITERS["vqav2"](tmp_path)
    (tmp_path / "vqav2/test2015/COCO_test2015_000000000000.jpg").unlink()
    settings = EvaluateConfig(benchmarks=["vqav2"], root=str(tmp_path), splits={"vqav2": "test-dev"}, limit=1)
    ((one,), _) = read_benchmarks(settings)
    (path,) = submissions.vqav2(tmp_path, [(item, "red") for item in one.items], one.loaded)
    assert [(row["question_id"], row["answer"]) for row in json.loads(path.read_text())] == [
        (11, "red"), (10, ""), (12, ""), (13, ""), (14, ""),
    ]  # fmt: skip
    told = "2 of 3 questions have no answer in the file for a server or judge"
    assert one.loaded.notes[-1] == told and f"note: VQAv2: {told}\n" in capsys.readouterr().err


def test_the_upload_of_mmbench_as_a_workbook(root: Path, tmp_path: Path) -> None:
    found = load("mmbench", root)
    _, path = submissions.mmbench(tmp_path, [(item, "B") for item in found.items], found)
    rows = list(load_workbook(path).active.values)
    assert rows[0][:2] == ("index", "question") and rows[1][0] == 0 and rows[1][6] == "B" and len(rows) == 10
