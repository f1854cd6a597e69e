"""One checkpoint under several pruners: the table, what goes on after a kill, and processes that share the work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from evaluation.miniatures import write_all
from tasks.conftest import steady
from tiny import packed, tiny_llava
from training.synthetic import overrides, write_dataset

from mmprune_train.config.command import Command
from mmprune_train.config.compose import compose_config, load_pruner
from mmprune_train.errors import UserError
from mmprune_train.model.llava import PackedLlava
from mmprune_train.storage.conf import options
from mmprune_train.storage.files import read_json, rows_of
from mmprune_train.tasks import evaluate, scoring, train
from mmprune_train.tasks.checkpoint import Checkpoint

Typed = Callable[..., tuple[int, str, str]]
LABELS = ["none", "twostage", "random"]
ASK = (
    "evaluate.pruners=[none,twostage,random]",
    "evaluate.batch_size=2",
    "evaluate.max_new_tokens=3",
    "evaluate.limit=null",
    "trainer.precision=fp32",
    "trainer.accelerator=cpu",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data, runs = write_dataset(tmp_path_factory.mktemp("data") / "squares", images=8), tmp_path_factory.mktemp("runs")
    steps = ("stages=[instruct]", "stage.instruct.max_steps=60", "stage.instruct.global_batch_size=4")
    steps += ("stage.instruct.lr=0.01",)  # as much as some right answers want
    train.run(compose_config([*overrides(data, runs), *steps, "evaluate.after_train=false"]))
    return runs / "smoke" / "t"


@pytest.fixture(scope="module")
def whole(run: Path) -> dict[str, Any]:
    """The result that one process finds without a break."""
    asked = ["task=evaluate", f"ckpt={run}", *ASK, "evaluate.name=whole"]
    found = evaluate.run(compose_config(asked), Command.of(asked))
    assert found == read_json(run / "evaluate-whole-pruners/result.json")
    return steady(found)


def start(run: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mmprune_train", "task=evaluate", f"ckpt={run}", *ASK, *more]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "PYTHONSAFEPATH": "1"}
    )


def same(run: Path, name: str, whole: dict[str, Any]) -> bool:
    """Whether an evaluation has found what the whole one has, answer by answer."""
    home, other = run / "evaluate-whole-pruners", run / f"evaluate-{name}-pruners"
    for label in whole["pruners"]:
        rows = (home / label / "predictions.jsonl").read_text()
        assert len(set(rows.splitlines())) == 16 and (other / label / "predictions.jsonl").read_text() == rows
    found = read_json(other / "result.json")
    assert found is not None and 0 < sum(found["pruners"]["none"]["accuracy"].values()) < 2
    assert steady(found) == whole
    return True


def test_the_table_has_a_row_a_pruner_with_intervals_and_tests(run: Path, whole: dict[str, Any]) -> None:
    home = run / "evaluate-whole-pruners"
    labels = list(whole["pruners"])
    assert labels[:3] == LABELS and ("downsample" in options("pruner")) == (len(labels) > 3)
    for label in labels:
        rows, one = list(rows_of(home / label / "predictions.jsonl")), read_json(home / label / "result.json")
        assert one is not None and len(rows) == one["questions"] == 16 and steady(one) == whole["pruners"][label]
        for kind, (low, high) in one["intervals"].items():
            assert 0 <= low <= one["accuracy"][kind] <= high <= 1
        right = [
            row["prediction"].strip(" .").lower() == row["answer"] for row in rows if row["answer"] in ("yes", "no")
        ]
        assert one["accuracy"]["yes_no"] == sum(right) / len(right)
        assert one["pruner"] == label.partition("@")[0]
    tokens = {label: found["visual_keep_ratio"] for label, found in whole["pruners"].items()}
    assert tokens["none"] == 1 and tokens["random"] < 1 and tokens["twostage"] < 1
    compared = whole["comparison"]
    assert compared["first"] == "none" and {test["test"] for test in compared["tests"]} == {"mcnemar"}
    assert len(compared["tests"]) == len(labels) * (len(labels) - 1)  # of every two rows one for each kind
    names = [baseline["name"] for baseline in compared["baselines"]]
    assert names == ["blind majority (question alone)", "none, image blanked"]
    assert (home / "table.md").read_text().startswith("| pruner | open | yes/no |")
    assert (home / "table.tex").read_text().startswith(r"\begin{tabular}")
    assert not (run / "evaluate.answers").exists(), "what was kept goes when the result is there"


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_where_it_was(run: Path, whole: dict[str, Any], mmprune: Typed) -> None:
    kept = run / "evaluate.answers"
    process = start(run, "evaluate.name=killed")
    until = time.monotonic() + 120
    while len(list(kept.glob("*.jsonl"))) < 3 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.002)  # dense, dense without images, and the first of twostage
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL and not (run / "evaluate-killed-pruners").exists()
    files = sorted(kept.glob("*.jsonl"), key=lambda path: path.stat().st_mtime)
    before = {path: path.read_text() for path in files}
    with files[-1].open("a") as torn:
        torn.write('{"index": 9, "text": "y')
    code, out, err = mmprune("task=evaluate", f"ckpt={run}", *ASK, "evaluate.name=killed")
    assert code == 0, err
    assert "none: goes on, 16 of 16 questions were answered before" in out and sum(map(len, before.values())) > 0
    assert same(run, "killed", whole) and not kept.exists()


@pytest.mark.slow
def test_other_settings_do_not_take_the_answers(run: Path, mmprune: Typed) -> None:
    """Of everything that decides an answer one is another: nothing is gone on with."""
    kept = run / "evaluate.answers"
    process = start(run, "evaluate.name=others")
    until = time.monotonic() + 120
    while not (kept.exists() and any(map(str.strip, map(Path.read_text, kept.glob("*.jsonl"))))):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = set(kept.glob("*.jsonl"))
    for other in ("evaluate.max_new_tokens=2", "seed=5", "data.exif_orientation=false", "evaluate.limit=3"):
        code, out, err = mmprune("task=evaluate", f"ckpt={run}", *ASK, "evaluate.name=others", other)
        assert code == 0 and "goes on" not in out, err
    assert left <= set(kept.glob("*.jsonl")), "those of the other settings are left"
    for file in left:
        file.unlink()
    kept.rmdir()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["devices", "torchrun"])
def test_two_processes_find_what_one_does(launcher: str, run: Path, whole: dict[str, Any]) -> None:
    more = [f"evaluate.name={launcher}"]
    if launcher == "devices":
        process = start(run, *more, "trainer.devices=2")
    else:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
        command = [*torchrun, "mmprune_train", "task=evaluate", f"ckpt={run}", *ASK, *more]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    out, _ = process.communicate(timeout=400)
    assert process.returncode == 0, out[-3000:]
    assert same(run, launcher, whole) and out.count("Scores [95 % interval]") == 1
    assert "none 4/4 batches" in out, "half of 8 batches"


def test_budgets_are_met_and_told(run: Path, mmprune: Typed) -> None:
    asked = ("evaluate.pruners=[none,random]", "evaluate.budgets=[0.5,0.3]", "evaluate.downsample=false")
    code, out, err = mmprune("task=evaluate", f"ckpt={run}", *ASK[1:], *asked, "evaluate.name=budgets")
    assert code == 0, err
    found = read_json(run / "evaluate-budgets-pruners/result.json")
    assert found is not None and list(found["pruners"]) == ["none", "random@0.5", "random@0.3"]
    for told, target in zip(found["comparison"]["table"][1:], (0.5, 0.3), strict=True):
        made = told["set_to"]
        assert made["target"] == target and abs(made["reached"] - target) < 0.05
        assert abs(told["visual_keep_ratio"] - target) < 0.05 and made["setting"].startswith(
            "pruner.vision.knee.ratio="
        )
        assert f"{told['pruner']}: {made['setting']} (visual tokens kept: {target:.3f} wanted" in out


def test_a_single_pruner_ends_with_the_table_as_well(run: Path, mmprune: Typed) -> None:
    code, out, err = mmprune("task=evaluate", f"ckpt={run}", *ASK[1:], "evaluate.name=single", "pruner=none")
    assert code == 0, err
    found = read_json(run / "evaluate-single-none/result.json")
    assert found is not None and [told["pruner"] for told in found["comparison"]["table"]] == ["none"]
    assert (run / "evaluate-single-none/table.md").is_file() and "Scores [95 % interval]" in out
    json.dumps(found)


def test_benchmarks_are_columns(run: Path, tmp_path: Path, mmprune: Typed) -> None:
    asked = ("evaluate.pruners=[none,twostage]", "evaluate.benchmarks=[pope,gqa,mmvet]", "evaluate.downsample=false")
    root = write_all(tmp_path / "eval")
    code, out, err = mmprune("task=evaluate", f"ckpt={run}", *asked, f"evaluate.root={root}", "trainer.precision=fp32")
    assert code == 0, err
    home = run / "evaluate-benchmarks-pruners"
    found = read_json(home / "result.json")
    assert found is not None and list(found["pruners"]) == ["none", "twostage"]
    for row in found["comparison"]["table"]:
        assert list(row["columns"]) == ["POPE", "GQA"], "MM-Vet is scored elsewhere"
        for name, title in (("pope", "POPE"), ("gqa", "GQA")):
            one = read_json(home / row["pruner"] / name / "result.json")
            assert one == found["pruners"][row["pruner"]]["benchmarks"][name]
            assert one is not None and one["score"] == row["columns"][title]["score"]
            assert one["intervals"][one["metric"]] == row["columns"][title]["interval"]
            assert ("score_blank" in one) == (row["pruner"] == "none") and 0 <= one["score_blind"] <= 1
        assert (home / row["pruner"] / "mmvet/mmvet_results.json").is_file()
    names = [baseline["name"] for baseline in found["comparison"]["baselines"]]
    assert names == ["blind majority (question alone)", "none, image blanked"] and "twostage - none, GQA" in out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["evaluate.pruners=[nine]"], "evaluate.pruners: pruner=nine"),
        (["evaluate.pruners=[twostage]", "evaluate.budgets=[2]"], "evaluate.budgets=2.0 must be"),
        (
            ["evaluate.pruners=[none,learned]"],
            "pruner.vision.score=learned has weights that are trained, and there is no",
        ),
        (["evaluate.pruners=[cdpruner]"], "this pruner reads the question, and there is no text tower"),
    ],
)
def test_what_cannot_be_compared_is_refused(more: list[str], words: str, run: Path, mmprune: Typed) -> None:
    code, _, err = mmprune("task=evaluate", f"ckpt={run}", *more)
    assert code == 2 and words in err and "Traceback" not in err, err


def test_a_network_without_a_pruners_weights_is_not_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is loaded with the text tower that one of two reads, and so without the scorer of the other."""
    loaded = []

    def load(found: Checkpoint) -> tuple[PackedLlava, None, None]:
        loaded.append(found.pruner.name)
        return packed(tiny_llava(), asdict(found.pruner)), None, None

    monkeypatch.setattr(scoring, "load", load)
    pruners = [load_pruner("learned"), load_pruner("cdpruner")]
    found = Checkpoint(tmp_path, tmp_path, compose_config(["+experiment=smoke"]), None)
    with pytest.raises(
        UserError, match=r"evaluate.pruners: pruner=learned: .* made without: take .* alone: \[learned\]"
    ):
        scoring.open_asker(found, pruners=pruners)
    assert loaded == ["cdpruner"]
