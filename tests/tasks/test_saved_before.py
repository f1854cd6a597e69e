"""Models, runs and sweeps that the commit before has saved, and keys of its commands that are typed once more."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from recorded import FORMER_PRESETS, NAMES, PRUNERS, RECORDED, config_now, put_pruner, put_run, put_settings, put_sweep
from tasks.conftest import Command, steady
from training.killed import killed_after
from training.synthetic import overrides, write_dataset

from mmprune_train.config.compose import compose_config, config_from_file
from mmprune_train.config.identity import differences, run_dir
from mmprune_train.config.in_effect import in_effect
from mmprune_train.config.schema import Config
from mmprune_train.model.begin import begin
from mmprune_train.model.build import load_model
from mmprune_train.storage.files import read_json, write_yaml
from mmprune_train.tasks import train

COMMAND = (
    "stage.pretrain.max_steps=2", "stage.instruct.max_steps=4", "evaluate.limit=4", "trainer.precision=fp32",
    "pruner=sparsevlm", "pruner.language.per_layer_budgets=[12,8,4]", *FORMER_PRESETS["sparsevlm"],
)  # fmt: skip
"""Of the recorded run, under the keys of now."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "squares")


@pytest.fixture(scope="module")
def continued(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """The recorded run, interrupted after step 3 of its second stage, as the commit before left it, gone on with by the
    same command, and its models as that commit saved them."""
    runs = tmp_path_factory.mktemp("runs")
    config, run = compose_config([*overrides(root, runs), *COMMAND]), runs / "smoke" / "t"
    with killed_after(3):
        train.run(config)
    put_settings(run, root)
    train.run(config)
    put_settings(run, root)
    return config, run


def test_an_interrupted_run_goes_on_where_it_was(continued: tuple[Config, Path]) -> None:
    _, run = continued
    rows = [json.loads(line) for line in (run / "instruct" / "metrics.jsonl").open()]
    before = [json.loads(line) for line in (RECORDED / "run" / "instruct" / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in before], rel=1e-5)
    assert [row["keep_ratio"] for row in rows] == [row["keep_ratio"] for row in before]
    assert "signal: previous" in (run / "config.yaml").read_text(), "left as it was written"


def test_a_finished_run_is_shown_again_and_its_settings_are_held(
    continued: tuple[Config, Path], root: Path, mmprune: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run = continued
    monkeypatch.setattr(train, "_train", lambda *_: pytest.fail("trained again"))
    command = [*overrides(root, run.parent.parent), *COMMAND]
    code, out, err = mmprune(*command)
    assert (code, err) == (0, "") and "nothing is trained (" in out
    code, out, err = mmprune(*command, "pruner.language.score_layer=current")
    assert code == 2 and "made with other settings: pruner.language.score_layer: previous -> current;" in err


def test_a_run_is_asked_and_shown_by_every_task(continued: tuple[Config, Path], root: Path, mmprune: Command) -> None:
    _, run = continued
    image = root / "images" / "0.png"
    code, out, err = mmprune("task=evaluate", f"ckpt={run}")
    assert (code, err) == (0, "") and (run / "evaluate.old1").is_dir() and "keep ratio" in out
    again, before = (read_json(run / name / "result.json") for name in ("evaluate", "evaluate.old1"))
    assert steady(again) == steady(before)
    code, _, err = mmprune("task=evaluate", f"ckpt={run}", *COMMAND[4:])
    assert code == 0 and (run / "evaluate.old2").is_dir(), "the run's own pruner is no other one"
    code, _, err = mmprune("task=generate", f"ckpt={run}", f"generate.images=[{image}]", "generate.max_new_tokens=2")
    assert (code, err) == (0, "")
    code, out, err = mmprune("task=report", f"report.runs=[{run}]")
    assert code == 0 and "done" in out, err


def test_training_starts_from_a_models_folder(continued: tuple[Config, Path], root: Path, tmp_path: Path) -> None:
    _, run = continued
    more = ["stages=[instruct]", "stage.instruct.max_steps=1", "evaluate.after_train=false", f"init_from={run}"]
    result = train.run(compose_config([*overrides(root, tmp_path), *more]))
    assert result["stages"]["instruct"]["steps"] == 1


@pytest.mark.parametrize("case", PRUNERS, ids=NAMES)
def test_a_models_pruner_is_what_its_command_composes_to_now(case: dict[str, Any], tmp_path: Path) -> None:
    now = config_now(case)
    model, processor = begin(now)
    model.save(tmp_path, processor)
    put_pruner(tmp_path, case["pruner"])
    model, processor = load_model(tmp_path)
    assert in_effect({"pruner": asdict(model.pruner.settings)}) == in_effect({"pruner": asdict(now.pruner)})
    asked = processor(images=[Image.new("RGB", (48, 48))], text="USER: <image>\nWhat? ASSISTANT:", return_tensors="pt")
    assert model.generate(**asked, max_new_tokens=2).shape[1] > asked["input_ids"].shape[1]


@pytest.mark.parametrize("case", PRUNERS, ids=NAMES)
def test_a_run_of_former_keys_is_found_by_its_command(case: dict[str, Any], tmp_path: Path) -> None:
    now = replace(config_now(case), runs_dir=str(tmp_path))
    run = tmp_path / "smoke" / case["run_id"]
    assert run_dir(now) != run, "another hash: the keys are others"
    run.mkdir(parents=True)
    (tmp_path / "smoke" / "00000000").mkdir()
    knee = yaml.safe_load((RECORDED / "run/config.yaml").read_text())["knee"]
    settings = {**asdict(now), "knee": knee, "pruner": case["pruner"]}
    write_yaml(run / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
    assert not differences(config_from_file(run / "config.yaml"), now)
    assert run_dir(now) == run
    assert run_dir(replace(now, restart=True)) != run and run_dir(replace(now, seed=1)) != run
    run_dir(replace(now, restart=True)).mkdir()
    assert run_dir(now) != run, "started over"


def test_a_report_of_a_run_and_a_sweep_shows_them_under_the_keys_of_now(
    root: Path, tmp_path: Path, mmprune: Command
) -> None:
    put_run(tmp_path / "runs" / "smoke" / "t", root)
    sweep = put_sweep(tmp_path / "runs" / "sweeps" / "one")
    code, out, err = mmprune("task=report", "report.runs=[runs/smoke/t]")
    assert code == 0 and "done" in out, err
    code, out, err = mmprune("task=report", f"report.runs=[{sweep}]")
    assert code == 0 and "pruner.language.score_layer" in out and "current" in out and "signal" not in out, err


# ---------------------------------------------------------------------- typed

OLD = "pruner.language.signal=previous"
TOLD = "pruner.language.signal=previous is now pruner.language.score_layer=previous"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((OLD,), TOLD),
        (("-m", "pruner.language.signal=next,previous"),
         "pruner.language.signal=next,previous is now pruner.language.score_layer=current,previous"),
        (("pruner=vispruner", "pruner.vision.share=0.3", OLD),
         f"pruner.vision.share=0.3 is now pruner.vision.selection_args.share=0.3; {TOLD}"),
        (("task=evaluate", "ckpt=x", OLD), TOLD),
    ],
)  # fmt: skip
def test_a_former_key_is_answered_with_what_to_type(arguments: tuple[str, ...], told: str, mmprune: Command) -> None:
    assert mmprune("+experiment=smoke", *arguments) == (2, "", f"error: {told}\n")
    assert not Path("runs").exists()


@pytest.mark.parametrize("sweep", [(), ("-m",)])
def test_former_keys_of_a_users_file_are_answered_with_its_name(sweep: tuple[str, ...], mmprune: Command) -> None:
    file = Path("mine/experiment/mine.yaml")
    file.parent.mkdir(parents=True)
    section = "pruner: {vision: {merge_count: 4}, language: {signal: next}}"
    file.write_text(f"# @package _global_\ndefaults:\n  - smoke\n{section}\n")
    assert mmprune(*sweep, "--config-dir", "mine", "+experiment=mine") == (
        2,
        "",
        "error: experiment/mine.yaml: pruner.vision.merge_count=4 is now pruner.vision.merge_args.count=4; "
        "pruner.language.signal=next is now pruner.language.score_layer=current\n",
    )


def test_a_former_key_of_a_sweepers_file_is_answered(mmprune: Command) -> None:
    file = Path("mine/sweep/mine.yaml")
    file.parent.mkdir(parents=True)
    file.write_text('# @package _global_\nhydra: {sweeper: {params: {pruner.language.signal: "next,previous"}}}\n')
    code, _, err = mmprune("-m", "--config-dir", "mine", "+experiment=smoke", "+sweep=mine")
    assert code == 2 and err.splitlines()[-1] == (
        "error: pruner.language.signal is now pruner.language.score_layer (next is now current)"
    )


def test_a_preset_that_calibration_has_written_is_answered_with_every_key(mmprune: Command) -> None:
    file = Path("mine/pruner/calibrated.yaml")
    file.parent.mkdir(parents=True)
    write_yaml(file, yaml.safe_dump(PRUNERS[0]["pruner"]))
    code, _, err = mmprune("--config-dir", "mine", "+experiment=smoke", "pruner=calibrated")
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: pruner/calibrated.yaml: ")
    assert err.count(" is now ") == 7
