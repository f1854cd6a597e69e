"""A task called from Python does what it does from the shell: what was asked for by name is its argument."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tasks.conftest import steady
from training.synthetic import overrides, write_dataset

from mmprune_train.config.command import Command
from mmprune_train.config.compose import compose_config, config_from_file
from mmprune_train.errors import UserError
from mmprune_train.storage.files import read_json, write_yaml
from mmprune_train.tasks import find_task, train
from mmprune_train.tasks.checkpoint import find_checkpoint

Shell = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "squares", images=4)


@pytest.fixture(scope="module")
def run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    short = ["stage.pretrain.max_steps=1", "stage.instruct.max_steps=1", "evaluate.after_train=false"]
    batches = [f"stage.{name}.global_batch_size=4" for name in ("pretrain", "instruct")]
    train.run(
        compose_config([*overrides(root, runs), *short, *batches, "pruner=language_only", "trainer.precision=fp32"])
    )
    return runs / "smoke" / "t"


def python(*typed: str) -> Any:
    config = compose_config(list(typed))
    return find_task(config.task)(config, Command.of(typed))


TYPED = {
    "evaluate-none": ["task=evaluate", "+experiment=llava7b_dense", "trainer.accelerator=cpu",
                      "evaluate.limit=1", "evaluate.max_new_tokens=2"],
    "generate": ["task=generate", "pruner=encoder_only", "generate.max_new_tokens=2", "generate.question=What's it?"],
    "inspect": ["task=inspect", "pruner=twostage", "knee=otsu"],
    "calibrate": ["task=calibrate", "pruner=encoder_only", "knee=cumulative_mass", "calibrate.target=0.5"],
    "bench": ["task=bench", "pruner=twostage", "knee=otsu", "bench.measure=[generate]", "bench.pruners=[twostage]",
              "bench.repeats=1", "bench.new_tokens=2", "bench.batch_size=2", "bench.baseline=false"],
}  # fmt: skip


@pytest.mark.parametrize("folder", TYPED)
def test_a_result_from_python_is_the_one_from_the_shell(folder: str, run: Path, root: Path, mmprune: Shell) -> None:
    typed = [*TYPED[folder], f"ckpt={run}"]
    if folder in ("generate", "inspect"):
        typed.append(f"generate.images=[{root}/images/0.png]")
    code, _, err = mmprune(*typed)
    assert code == 0, err
    from_shell = read_json(run / folder / "result.json")
    python(*typed)
    assert steady(read_json(run / folder / "result.json")) == steady(from_shell)
    found = find_checkpoint(compose_config(typed), Command.of(typed))
    assert found.pruner is not None and found.pruner.name in folder + " ".join(typed)
    assert find_checkpoint(compose_config(typed)).pruner is None, "where nothing is asked for it is the run's own"


def test_tasks_of_one_process_do_not_see_each_others_overrides(
    run: Path, root: Path, mmprune: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = ["task=generate", f"ckpt={run}", f"generate.images=[{root}/images/0.png]", "generate.max_new_tokens=1"]
    told = []

    def nested(config: object, command: Command) -> None:
        assert command.names("pruner")
        told.extend(python(*more)["pruner"] for more in (ask, [*ask, "pruner=none"], ask))

    fake = ModuleType("plan")
    monkeypatch.setattr(fake, "run", nested, raising=False)
    monkeypatch.setitem(sys.modules, "mmprune_train.tasks.plan", fake)
    code, _, err = mmprune("task=plan", "pruner=encoder_only", "stages=[pretrain]")
    assert code == 0, err
    assert told == ["language_only", "none", "language_only"]


def test_a_runs_own_settings_give_way_to_what_is_asked_for_and_to_no_default(run: Path, root: Path) -> None:
    def settled(*typed: str) -> Any:
        typed = ("task=evaluate", f"ckpt={run}", *typed)
        return find_checkpoint(compose_config(list(typed)), Command.of(typed))

    own = settled()
    assert own.config.encoder.name == "tiny_clip" and own.config.evaluate.batch_size == 16 and own.stage is None
    dense = settled("+experiment=llava7b_dense")
    assert dense.pruner.name == "none" and dense.config.encoder == own.config.encoder, "of which that one says nothing"
    assert dense.config.data == own.config.data and dense.config.stage["instruct"] == own.config.stage["instruct"]
    assert dense.config.stage["pretrain"].strategy == "deepspeed_zero2", "which it does say, through its strategy"
    demo = settled("+experiment=demo", "evaluate.max_new_tokens=3", "data=files", "data.root=/x")
    assert demo.pruner is None and demo.config.encoder.name == "dinov2_small" and demo.config.data.root == "/x"
    assert demo.config.evaluate.max_new_tokens == 3 and demo.config.evaluate.limit is None
    assert demo.config.evaluate.batch_size == 16, "the run's own"
    assert settled("stages=[pretrain]").stage == "pretrain"


@pytest.mark.parametrize("alone", [False, True])
def test_a_single_key_of_the_pruner_changes_the_models_own(alone: bool, run: Path, tmp_path: Path) -> None:
    model = shutil.copytree(run / "instruct" / "model", tmp_path / "model") if alone else run

    def found(*typed: str) -> Any:
        typed = ("task=evaluate", f"ckpt={model}", *typed)
        return find_checkpoint(compose_config(list(typed)), Command.of(typed)).pruner

    own = config_from_file(run / "config.yaml").pruner
    other = 1 if own.language.layer != 1 else 2
    changed = found(f"pruner.language.layer={other}")
    assert changed == replace(own, language=replace(own.language, layer=other)) and not changed.vision.enabled
    merged = found("pruner.language.merge=recycle", "pruner.language.merge_args.size=3")
    assert merged.language.merge_args == {"size": 3} and merged.language.layer == own.language.layer
    assert found(f"pruner.language.layer={own.language.layer}") in (None, own), "as it was trained"
    assert found("pruner=twostage", "pruner.language.layer=1").vision.enabled, "a pruner that is chosen is that one"
    with pytest.raises(UserError, match="pruner.language.layer"):
        found("pruner.language.layer=77")


def test_a_runs_own_component_is_not_run_for_a_key_beside_it(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    settings = (copy / "config.yaml").read_text()
    (copy / "config.yaml").unlink()
    write_yaml(copy / "config.yaml", settings.replace("score: text_attention", "score: harmful:score"))
    typed = ["task=evaluate", f"ckpt={copy}", "pruner.language.layer=1"]
    with pytest.raises(UserError, match="names pruner.language.score=harmful:score"):
        find_checkpoint(compose_config(typed), Command.of(typed))


def test_an_experiments_pruner_is_told_where_the_run_was_trained_with_another(
    run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for typed, noted in (
        (["+experiment=llava7b_dense"], True),
        (["pruner=none"], False),
        (["+experiment=demo"], False),
    ):
        find_checkpoint(compose_config([f"ckpt={run}", *typed]), Command.of([f"ckpt={run}", *typed]))
        err = capfd.readouterr().err
        assert (f"the experiment's, none, and not language_only as {run} was trained" in err) == noted


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib", "submitit_local"])
def test_jobs_of_a_sweep_do_what_each_of_them_asks_for(
    launcher: str, run: Path, mmprune: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    if launcher != "basic":
        pytest.importorskip(f"hydra_plugins.hydra_{launcher.split('_')[0]}_launcher")
    monkeypatch.setenv("PYTHONPATH", str(Path(importlib.import_module("mmprune_train").__file__).parents[1]))
    short = ["evaluate.limit=1", "evaluate.max_new_tokens=1", "evaluate.blank=false", f"evaluate.name={launcher}"]
    task = partial(mmprune, "-m", "task=evaluate", f"ckpt={run}", f"hydra/launcher={launcher}")
    code, out, err = task(*short, "pruner=none,encoder_only")
    assert code == 0 and "Sweep of 2 jobs: 2 done" in out, out + err
    for pruner in ("none", "encoder_only"):
        assert read_json(run / f"evaluate-{launcher}-{pruner}" / "result.json")["pruner"] == pruner
