"""Public benchmarks as they are typed: what is asked, written and told."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from evaluation.miniatures import write_all
from training.synthetic import overrides, write_dataset

from mmprune_train.config.compose import compose_config
from mmprune_train.config.task_schema import BENCHMARKS
from mmprune_train.storage.files import read_json, rows_of
from mmprune_train.tasks import train

Command = Callable[..., tuple[int, str, str]]
SHORT = ("evaluate.max_new_tokens=2", "trainer.precision=fp32", "evaluate.batch_size=8")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data, runs = write_dataset(tmp_path_factory.mktemp("data") / "squares", images=4), tmp_path_factory.mktemp("runs")
    steps = ("stages=[instruct]", "stage.instruct.max_steps=1", "stage.instruct.global_batch_size=4")
    train.run(compose_config([*overrides(data, runs), *steps, "evaluate.after_train=false"]))
    return runs / "smoke" / "t"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("eval"))


def test_all_benchmarks_are_asked_and_written(run: Path, root: Path, mmprune: Command) -> None:
    names = f"evaluate.benchmarks=[{','.join(BENCHMARKS)}]"
    code, out, err = mmprune("task=evaluate", f"ckpt={run}", names, f"evaluate.root={root}", *SHORT)
    assert code == 0, err
    home = run / "evaluate-benchmarks"
    whole = read_json(home / "result.json")
    assert whole is not None and list(whole["benchmarks"]) == list(BENCHMARKS) and whole["missing"] == {}
    for name in BENCHMARKS:
        result = read_json(home / name / "result.json")
        rows = list(rows_of(home / name / "predictions.jsonl"))
        assert result is not None and result["questions"] == len(rows) >= 5, name
        assert result["asked"]["limit"] is None, "the run's own limit is for its own questions"
        assert len(result["asked"]["files"]) >= 1 and all(len(sha) == 64 for sha in result["asked"]["files"].values())
        assert result["asked"]["prompt"].count("{question}") == 1 and 0 < result["keep_ratio"] <= 1
        scored = [row for row in rows if "score" in row]
        assert (result["score"] is None) == (not scored), name
        assert all((home / name / file).is_file() for file in result.get("submission", []))
        assert whole["benchmarks"][name] == result
    assert "MME" in out and "POPE" in out and str(home) in out
    assert read_json(home / "textvqa/result.json")["asked"]["ocr_tokens"] is True
    numbers = ("sweep.objectives=[loss,keep_ratio]", "sweep.directions=[minimize,minimize]")
    code, _, err = mmprune("task=report", f"report.runs=[{run}]", f"report.output={run / 'told'}", *numbers)
    assert code == 0, err


def test_what_is_missing_is_told_and_the_rest_is_scored(
    run: Path, root: Path, mmprune: Command, tmp_path: Path
) -> None:
    shutil.copytree(root / "pope", tmp_path / "eval/pope")
    (tmp_path / "eval/pope/coco/coco_pope_random.json").unlink()
    some = ("evaluate.benchmarks=[pope,gqa]", "evaluate.root=eval", "evaluate.name=some", "evaluate.limit=2")
    code, out, err = mmprune("task=evaluate", f"ckpt={run}", *some, "pruner=none", *SHORT)
    assert code == 0, err
    assert "note: GQA: there is no data/testdev_balanced_questions.json" in err and "cs.stanford.edu" in err
    assert "note: POPE: there is no coco/coco_pope_random.json" in err
    found = read_json(run / "evaluate-some-none/result.json")
    assert found is not None and list(found["benchmarks"]) == ["pope"] and "gqa" in found["missing"]
    assert found["benchmarks"]["pope"]["questions"] == 4 and "gqa" in out


def test_another_prompt_split_and_kind(run: Path, root: Path, mmprune: Command) -> None:
    asked = (
        "evaluate.benchmarks=[vqav2,pope]",
        f"evaluate.root={root}",
        "evaluate.splits={vqav2:test-dev}",
        "evaluate.prompts={pope:'{question} Yes or no?'}",
        "evaluate.name=other",
    )
    code, out, err = mmprune("task=evaluate", f"ckpt={run}", *asked, *SHORT)
    assert code == 0, err
    home = run / "evaluate-other"
    assert all(row["question"].endswith("image? Yes or no?") for row in rows_of(home / "pope/predictions.jsonl"))
    result = read_json(home / "vqav2/result.json")
    assert result is not None and result["score"] is None and result["submission"] == ["vqav2_upload.json"]
    assert result["asked"]["questions"] == {"all": {"asked": 3, "available": 3, "without_answer": 3}}
    assert "test-dev" in out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["evaluate.benchmarks=[pop]"], "evaluate.benchmarks=pop: there is no such option; did you mean pope?"),
        (["evaluate.benchmarks=[pope]"], "evaluate.root is not set"),
        (["evaluate.benchmarks=[pope]", "evaluate.root=nowhere"], "evaluate.root=nowhere: there is no such folder"),
        (["evaluate.benchmarks=[pope]", "evaluate.root=."], "get it from output/coco of"),
        (["evaluate.benchmarks=[pope]", "evaluate.root=.", "evaluate.splits={mme:x}"], "evaluate.splits=mme"),
        (["evaluate.benchmarks=[pope]", "evaluate.root=ROOT", "evaluate.kinds=[x]"], "pope has no question of kind x"),
        (["evaluate.benchmarks=[pope]", "evaluate.root=ROOT", "evaluate.prompts={pope:a}"], "there is no {question}"),
    ],
)
def test_what_cannot_be_asked_is_refused(more: list[str], words: str, run: Path, root: Path, mmprune: Command) -> None:
    code, _, err = mmprune("task=evaluate", f"ckpt={run}", *(one.replace("ROOT", str(root)) for one in more))
    assert code == 2 and words in err and "Traceback" not in err, err
