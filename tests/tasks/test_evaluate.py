"""Evaluation, generation and inspection as they are typed: what is asked, where it goes, and what is refused."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from training.synthetic import entry, overrides, write_dataset

from mmprune_train.config.compose import compose_config, load_pruner
from mmprune_train.config.identity import run_of
from mmprune_train.config.schema import SplitConfig
from mmprune_train.errors import UserError
from mmprune_train.storage.files import read_json, rows_of, write_json
from mmprune_train.tasks import train
from mmprune_train.tasks.checkpoint import Checkpoint, Results, check_writable
from mmprune_train.tasks.evaluate import folder_name

Command = Callable[..., tuple[int, str, str]]
SHORT = ("evaluate.max_new_tokens=2", "evaluate.blank=false", "trainer.precision=fp32")
ALL = ("evaluate.limit=null", "trainer.precision=fp32")
SIX = "stage.instruct.global_batch_size=4"  # the samples are six
ASKED = ("stages=[instruct]", "stage.instruct.max_steps=1", SIX, "evaluate.limit=2", *SHORT)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = write_dataset(tmp_path_factory.mktemp("data") / "squares", images=4)
    later = [
        entry("two", ["0.png", "1.png"], ["<image>\nWhat?", "red", "<image>\nAnd this?", "no"]),
        entry("later", "0.png", ["hello", "hi", "<image>\nWhat?", "red"]),
    ]
    (data / "talks.json").write_text(json.dumps(later))
    (data / "bare.json").write_text(json.dumps([entry("x", "0.png", ["<image>\nWhat?"])]))
    (data / "lost.json").write_text(json.dumps([entry("gone", "absent.png", ["<image>\nWhat?", "red"])]))
    return data


@pytest.fixture(scope="module")
def run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    train.run(compose_config([*overrides(root, runs), *ASKED]))
    return runs / "smoke" / "t"


def refused(done: tuple[int, str, str], *words: str) -> bool:
    code, _, err = done
    assert code == 2 and "Traceback" not in err, err
    assert all(word in err for word in words), err
    return True


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_after_training_the_table_says_how_many_of_how_many(
    run: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = read_json(run / "result.json")["evaluate"]
    assert read_json(run / "evaluate/result.json") == found
    assert found["asked"]["annotations"] == str(root / "evaluate.json") and len(found["asked"]["sha256"]) == 64
    train.run(compose_config([*overrides(root, run.parents[1]), *ASKED]))
    assert "2 of 4 open, 2 of 4 yes/no questions; evaluate.limit=null asks all" in capsys.readouterr().out


def test_turns_of_other_data_are_asked_beside_the_runs_own(run: Path, mmprune: Command) -> None:
    own = snapshot(run / "evaluate")
    code, out, err = mmprune("task=evaluate", f"ckpt={run}", "data.evaluate.annotations=talks.json", *ALL)
    assert code == 0, err
    assert "3 of 3 open, 1 of 1 yes/no questions" in out and str(run / "evaluate-talks") in out
    rows = list(rows_of(run / "evaluate-talks/predictions.jsonl"))
    told = [(row["id"], row["turn"], row["visual_tokens_dense"], row["answer"]) for row in rows]
    assert told == [("two", 1, 36, "red"), ("later", 1, 0, "hi"), ("later", 2, 36, "red"), ("two", 2, 72, "no")]
    assert snapshot(run / "evaluate") == own
    first = ["data.evaluate.annotations=talks.json", "evaluate.turns=first", "evaluate.name=firsts"]
    assert mmprune("task=evaluate", f"ckpt={run}", *first)[0] == 0
    assert [row["turn"] for row in rows_of(run / "evaluate-firsts/predictions.jsonl")] == [1, 1]


def test_records_without_answers_give_predictions(run: Path, mmprune: Command) -> None:
    bare = ["data.evaluate.annotations=bare.json", "evaluate.name=bare", "evaluate.blank=true"]
    code, out, err = mmprune("task=evaluate", f"ckpt={run}", *bare)
    assert code == 0, err
    assert "not scored, without an answer: 1 open" in out
    (row,) = rows_of(run / "evaluate-bare/predictions.jsonl")
    assert "answer" not in row and "turn" not in row
    result = read_json(run / "evaluate-bare/result.json")
    assert result["accuracy"] == {"open": None} and "accuracy_blank" not in result


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["data.evaluate.annotations=lost.json"], "question gone: there is no image"),
        (["data.evaluate.annotations=nowhere.json"], "nowhere.json is missing"),
        (["data.blind=nowhere.json"], "data.blind: data.instruct.annotations: "),
        (["evaluate.kinds=[colour]"], "no question of kind colour; it has open, yes_no"),
        (["evaluate.turns=last"], "evaluate.turns=last"),
        (["evaluate.name=a/b"], "evaluate.name=a/b names a folder"),
        (["evaluate.max_new_tokens=2048"], "evaluate.max_new_tokens=2048: the LLM reads 2048 tokens"),
        (["stages=[pretrain]"], "no finished stage pretrain"),
        (["peft=lora"], "task=evaluate does not read peft where ckpt= is given"),
    ],
)
def test_what_cannot_be_asked_leaves_the_earlier_evaluation(
    more: list[str], words: str, run: Path, mmprune: Command
) -> None:
    before = snapshot(run)
    assert refused(mmprune("task=evaluate", f"ckpt={run}", *more), words)
    assert snapshot(run) == before


def test_an_evaluation_made_again_moves_the_earlier_one_aside(run: Path, mmprune: Command) -> None:
    model = run / "instruct/model"  # the same model by its folder
    again = ("task=evaluate", f"ckpt={model}", "evaluate.name=again", "evaluate.limit=1")
    assert mmprune(*again)[0] == 0
    before = snapshot(run / "evaluate-again")
    code, out, _ = mmprune(*again)
    assert "1 of 4 open, 1 of 4 yes/no" in out
    assert code == 0 and "moved the earlier evaluate-again" in out
    assert snapshot(run / "evaluate-again.old1") == before


def test_questions_of_any_wording_are_answered_in_the_run(
    run: Path, root: Path, mmprune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "it's, a (copy).png"
    image.write_bytes((root / "images/0.png").read_bytes())
    ask = ["task=generate", f"ckpt={run}", f"generate.images={image}", "generate.max_new_tokens=2", SHORT[2]]
    (tmp_path / "question.txt").write_text("From a file,\nin two lines?\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("From (standard) input?\n"))
    wordings = {
        "generate.question=What's in it, a (red) {shape}: 100 %, ${no} = #1?": None,
        "generate.question=-": "From (standard) input?",
        "generate.question_file=question.txt": "From a file,\nin two lines?",
    }
    for argument in wordings:
        code, _, err = mmprune(*ask, argument)
        assert code == 0, err
    told = [row["question"] for row in rows_of(run / "generate/answers.jsonl")]
    assert told == [text or argument.partition("=")[2] for argument, text in wordings.items()]
    assert read_json(run / "generate/result.json")["question"] == told[-1]
    assert not (tmp_path / "runs").exists()


def test_what_cannot_be_asked_on_the_command_line_is_refused_by_key(
    run: Path, root: Path, mmprune: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = root / "images"
    ask = ["task=generate", f"ckpt={run}"]
    two = f"generate.images=[{images}/0.png,{images}/1.png]"
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert refused(mmprune(*ask, two, "generate.question=<image> what?"), "has 1 <image> for 2 generate.images")
    assert refused(mmprune(*ask, "generate.question=<image> what?"), "has 1 <image> for 0 generate.images")
    assert refused(mmprune(*ask, "generate.images=[a.png, b, c.png]"), "there is no file a.png", "wants quotes")
    assert refused(mmprune(*ask, "generate.max_new_tokens=5000"), "generate.max_new_tokens=5000: the LLM reads 2048")
    assert refused(mmprune(*ask, "generate.question=-"), "nothing came from standard input")
    assert refused(mmprune(*ask, "generate.question=a", "generate.question_file=b"), "are both given")
    Path("empty.txt").write_text("\n")
    assert refused(mmprune(*ask, "generate.question_file=empty.txt"), "question_file=empty.txt: the file is empty")
    assert refused(mmprune(*ask, "generate.question_file=absent.txt"), "question_file=absent.txt: cannot be read")
    assert refused(mmprune(*ask, "generate.question=\udcff"), "not valid UTF-8")
    os.mkfifo("pipe")
    monkeypatch.setattr("sys.stdin", io.StringIO("word " * 10**6))
    assert refused(mmprune(*ask, "generate.question=-"), "generate.question=-: more than 1,048,576 characters")
    for name in ("pipe", "/dev/zero"):
        assert refused(mmprune(*ask, f"generate.question_file={name}"), f"{name}: cannot be read", "not a file")
        assert refused(mmprune(*ask, f"generate.images={name}"), f"image {name} cannot be read", "not a file")


def test_pictures_of_one_question_are_kept_beside_those_of_the_next(run: Path, root: Path, mmprune: Command) -> None:
    ask = ["task=inspect", f"ckpt={run}", f"generate.images=[{root}/images/0.png]"]
    assert mmprune(*ask, "generate.question=What's this?")[0] == 0
    assert mmprune(*ask, "generate.question=And now?")[0] == 0
    asked = [read_json(run / name / "result.json")["asked"]["question"] for name in ("inspect.old1", "inspect")]
    assert asked == ["What's this?", "And now?"]
    assert (run / "inspect.old1/pruning.png").is_file() and (run / "inspect/pruning.png").is_file()


def test_a_bench_of_a_run_lies_in_it(run: Path, mmprune: Command) -> None:
    short = ["bench.measure=[generate]", "bench.pruners=[none]", "bench.repeats=1", "bench.new_tokens=2"]
    code, _, err = mmprune("task=bench", f"ckpt={run}", *short, "bench.batch_size=2", "bench.baseline=false")
    assert code == 0, err
    result = read_json(run / "bench/result.json")
    assert result["ckpt"] == str(run / "instruct/model") and result["llm"] == "tiny_llama"
    assert refused(mmprune("task=bench", f"ckpt={run}", "bench.new_tokens=2048"), "bench.new_tokens=2048: the LLM")
    assert refused(mmprune("task=bench", "+experiment=smoke", f"ckpt={run.parent / 'nothing'}"), "no such folder")


def test_other_questions_in_the_same_file_are_asked_again_after_training(run: Path, tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "squares", images=4)
    shutil.copytree(run, tmp_path / "runs/smoke/t")
    config = compose_config([*overrides(data, tmp_path / "runs"), *ASKED])
    first = train.run(config)["evaluate"]
    questions = json.loads((data / "evaluate.json").read_text())
    (data / "evaluate.json").write_text(json.dumps(questions[::-1]))
    again = train.run(config)["evaluate"]
    folder = tmp_path / "runs/smoke/t"
    assert first["asked"]["sha256"] != again["asked"]["sha256"]
    assert read_json(folder / "evaluate.old1/result.json") == first
    assert read_json(folder / "evaluate/result.json") == read_json(folder / "result.json")["evaluate"] == again
    (data / "evaluate.json").unlink()
    assert train.run(config)["evaluate"] == again, "what was found is shown without the file"


def test_another_case_than_the_runs_own_has_a_folder_of_its_own(tmp_path: Path) -> None:
    config = compose_config(["task=evaluate", "data=files", f"data.root={tmp_path}"])
    foreign = Checkpoint(tmp_path / "llava", tmp_path, config, None)
    assert folder_name(foreign, "a.json") == "evaluate"
    asked = {"ckpt": str(tmp_path / "llava"), "annotations": "a.json"}
    write_json(tmp_path / "evaluate/result.json", {"asked": asked})
    assert folder_name(foreign, "a.json") == "evaluate"
    assert folder_name(foreign, "b.json") == "evaluate-b"
    assert folder_name(replace(foreign, model=tmp_path / "other"), "a.json") == "evaluate-other"
    own = replace(config, data=replace(config.data, evaluate=SplitConfig(annotations="test.json")))
    trained = replace(foreign, trained=own, pruner=load_pruner("none"), stage="pretrain")
    assert folder_name(trained, str(tmp_path / "test.json")) == "evaluate-pretrain-none"
    assert folder_name(replace(trained, stage=None), "elsewhere/test.json") == "evaluate-files-none"
    named = replace(config, evaluate=replace(config.evaluate, name="held_out"))
    assert folder_name(replace(trained, config=named, stage=None), "b.json") == "evaluate-held_out-none"


def test_a_stages_folder_names_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r/instruct/model").mkdir(parents=True)
    (tmp_path / "r/manifest.json").write_text("{}")
    for ckpt in ("r", "r/instruct", "r/instruct/model", "r/instruct/model/"):
        assert run_of(str(tmp_path / ckpt)) == tmp_path / "r"
    for inside, ckpt in (("r", "instruct"), ("r/instruct", "model"), ("r/instruct/model", ".")):
        monkeypatch.chdir(tmp_path / inside)
        found = run_of(ckpt)
        assert found is not None and found.resolve() == tmp_path / "r"
    assert run_of(str(tmp_path / "r/instruct/adapters")) is None


def test_an_evaluation_that_was_moved_aside_meanwhile_gets_its_own_result(tmp_path: Path) -> None:
    first, second, third = (Results(tmp_path / "evaluate") for _ in range(3))
    for number, results in enumerate((first, second, third)):
        with results.writing() as folder:
            (folder / "predictions.jsonl").write_text(str(number))
    for number, results in enumerate((first, second, third)):
        with results.writing() as folder:
            (folder / "result.json").write_text(str(number))
    assert [r.place.name for r in (first, second, third)] == ["evaluate.old1", "evaluate.old2", "evaluate"]
    for number, results in enumerate((first, second, third)):
        assert [path.read_text() for path in sorted(results.place.iterdir())] == [str(number)] * 2


WRITES = """
import sys
from pathlib import Path
from mmprune_train.tasks.checkpoint import Results
for number in range(5):
    results = Results(Path(sys.argv[1]) / "evaluate")
    for name in ("predictions.jsonl", "result.json"):
        with results.writing() as folder:
            (folder / name).write_text(f"{sys.argv[2]} {number}")
"""


def test_two_evaluations_at_once_lose_nothing(tmp_path: Path) -> None:
    started = [subprocess.Popen([sys.executable, "-c", WRITES, str(tmp_path), name]) for name in "ab"]
    assert [process.wait() for process in started] == [0, 0]
    found = [sorted(path.read_text() for path in folder.iterdir()) for folder in tmp_path.iterdir()]
    assert sorted(found) == [[f"{name} {number}"] * 2 for name in "ab" for number in range(5)]


def test_results_that_could_not_be_kept_are_refused_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_writable(tmp_path / "not/yet/there")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=r"cannot be written to; .*ckpt=COPY"):
        check_writable(tmp_path / "run")
