"""Runs that start from what one has: trained, recorded, continued, swept."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from originals import projector_of, write_original
from safetensors.torch import load_file, save_file
from training.synthetic import overrides, write_dataset

from mmprune_train.__main__ import main
from mmprune_train.config.compose import compose_config
from mmprune_train.config.schema import Config
from mmprune_train.errors import UserError
from mmprune_train.model.build import load_model
from mmprune_train.model.weights.start import Start
from mmprune_train.tasks import calibrate, plan, prepare, train
from mmprune_train.training.rundir import RunDirectory
from mmprune_train.training.starts import note_start

SHORT = ("stage.pretrain.max_steps=1", "stage.instruct.max_steps=1", "evaluate.after_train=false",
         "trainer.precision=fp32")  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "squares")


@pytest.fixture(scope="module")
def sources(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One finished run, and what it left in every format."""
    folder = tmp_path_factory.mktemp("sources")
    train.run(compose_config([*overrides(root, folder / "runs"), *SHORT]))
    run = folder / "runs/smoke/t"
    model, processor = load_model(run / "instruct/model")
    torch.save(projector_of(model.hf), folder / "mm_projector.bin")
    found = {
        "run": run,
        "llava": run / "instruct/model",
        "adapters": run / "instruct/adapters",
        "original": write_original(folder / "original", model.hf, processor.tokenizer),
        "projector": folder / "mm_projector.bin",
    }
    return {name: str(path) for name, path in found.items()}


def config_of(root: Path, runs: Path, *more: str) -> Config:
    return compose_config([*overrides(root, runs), *SHORT, *more])


def weights(run: Path, stage: str = "instruct") -> dict[str, torch.Tensor]:
    return load_file(run / stage / "model/model.safetensors")


def start_in(run: Path, stage: str = "instruct") -> dict[str, Any]:
    return json.loads((run / "manifest.json").read_text())["stages"][stage]["start"]


@pytest.mark.parametrize("source", ["run", "llava", "adapters", "original", "projector"])
def test_the_second_stage_starts_from_any_source(
    source: str, root: Path, tmp_path: Path, sources: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"init_from={sources[source]}", "stages=[instruct]"]
    config = config_of(root, tmp_path, *given, "stage.instruct.lr=1e-12", "stage.instruct.projector_lr=1e-12")
    train.run(config)
    run = tmp_path / "smoke/t"
    assert not (run / "pretrain").exists() and "instruct starts from " in capsys.readouterr().out
    known = start_in(run)
    kind = {"run": "llava"}.get(source, source)
    assert known["kind"] == kind and len(known["sha256"]) == 64 and known["key"] == "init_from"
    base = json.loads((run / "manifest.json").read_text())["base_weights"]
    assert set(base) == ({"encoder", "llm"} if source == "projector" else set())
    before, after = weights(Path(sources["run"])), weights(run)
    for name, value in after.items():  # it has moved by 1e-12
        if source == "projector" and "projector" not in name:
            continue
        torch.testing.assert_close(value, before[name], atol=1e-6, rtol=1e-6, msg=name)
    if source == "adapters":
        assert known["adapters"] == "continue" and known["base"]["kind"] == "llava"
        told = json.loads((run / "instruct/adapters/adapter_config.json").read_text())
        assert Path(told["base_model_name_or_path"]) == Path(sources["run"]) / "pretrain/model"


def test_the_first_trained_stage_starts_there_and_the_next_goes_on_from_it(
    root: Path, tmp_path: Path, sources: dict[str, str]
) -> None:
    train.run(config_of(root, tmp_path, f"init_from={sources['llava']}"))
    run = tmp_path / "smoke/t"
    assert (start_in(run, "pretrain")["kind"], start_in(run, "pretrain")["key"]) == ("llava", "init_from")
    assert "key" not in start_in(run) and str(run / "pretrain/model") in str(start_in(run)["stamps"])


def test_a_stages_own_key_wins(root: Path, tmp_path: Path, sources: dict[str, str]) -> None:
    given = [f"stage.instruct.init_from={sources['original']}", f"init_from={sources['projector']}"]
    train.run(config_of(root, tmp_path, *given))
    run = tmp_path / "smoke/t"
    assert start_in(run, "pretrain")["kind"] == "projector"
    assert (start_in(run)["kind"], start_in(run)["key"]) == ("original", "stage.instruct.init_from")


def test_moved_weights_go_on_and_others_are_refused(root: Path, tmp_path: Path, sources: dict[str, str]) -> None:
    folder = shutil.copytree(sources["llava"], tmp_path / "one")
    train.run(config_of(root, tmp_path / "runs", f"init_from={folder}", "stages=[instruct]"))
    moved = config_of(root, tmp_path / "runs", f"init_from={folder.rename(tmp_path / 'two')}", "stages=[instruct]")
    again = train.run(moved)
    assert again["stages"]["instruct"]["samples"] == 8
    file = tmp_path / "two/model.safetensors"
    changed = load_file(file)
    changed["multi_modal_projector.linear_1.bias"] += 1
    save_file(changed, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"init_from of stage instruct: the weights in .*two have SHA-256"):
        train.run(moved)
    shutil.rmtree(tmp_path / "two")
    assert train.run(config_of(root, tmp_path / "runs", f"init_from={folder}", "stages=[instruct]")) == again
    with pytest.raises(UserError, match=r"made with other settings: init_from: .*one -> .*elsewhere"):
        train.run(config_of(root, tmp_path / "runs", "init_from=./elsewhere", "stages=[instruct]"))


def test_a_stage_that_has_begun_keeps_its_source_and_how_adapters_are_taken_up(
    tmp_path: Path, sources: dict[str, str]
) -> None:
    run, path = RunDirectory(tmp_path / "run", writable=True), Path(sources["adapters"])
    start = Start("adapters", path, "init_from", Start("llava", Path(sources["llava"]), "init_from"), goes_on=True)
    note_start(run, "instruct", start)
    (run.stage("instruct") / "checkpoints/step-00000001.ckpt").mkdir(parents=True)
    note_start(run, "instruct", start)
    merged = Start("adapters", path, "init_from", start.base)
    with pytest.raises(UserError, match="began with its adapters trained further, they would now be merged"):
        note_start(run, "instruct", merged)
    other = replace(start, base=Start("original", Path(sources["original"]), "init_from"))
    with pytest.raises(UserError, match="init_from of stage instruct: the weights in .*original"):
        note_start(run, "instruct", other)


def test_a_sweep_of_the_second_stage_does_not_pretrain(
    root: Path, tmp_path: Path, sources: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [*(o for o in overrides(root, tmp_path) if not o.startswith("run_id")), *SHORT, "stages=[instruct]"]
    command = ["mmprune", "-m", *given, f"init_from={sources['projector']}", "knee=kneedle,max_chord"]
    monkeypatch.setattr("sys.argv", command)
    main()
    runs = [folder for folder in (tmp_path / "smoke").iterdir() if (folder / "manifest.json").is_file()]
    assert len(runs) == 2
    assert all((run / "instruct/model").is_dir() and not (run / "pretrain").exists() for run in runs)
    assert len({start_in(run)["sha256"] for run in runs}) == 1


def test_plan_and_prepare_look_at_the_source(
    root: Path, tmp_path: Path, sources: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"init_from={sources['llava']}", "stages=[instruct]", "llm.path=owner/llm", "trainer.feature_cache=true"]
    given.append(f"trainer.feature_cache_dir={tmp_path / 'features'}")
    found = prepare.run(config_of(root, tmp_path, *given))
    assert found["init_from"] == str(Path(sources["llava"]).resolve()) and "llm" not in found
    train.run(config_of(root, tmp_path, *given))
    assert re.search("feature cache: .*none to encode", capsys.readouterr().out)
    assert "tokenised" in json.dumps(plan.run(config_of(root, tmp_path, *given))["stages"]["instruct"]["lengths"])
    for task in (plan, prepare):
        with pytest.raises(UserError, match=r"init_from: there is no \./gone"):
            task.run(config_of(root, tmp_path, "init_from=./gone"))
        with pytest.raises(UserError, match="llm.arch.hidden_size=32, there 64"):
            task.run(config_of(root, tmp_path, f"init_from={sources['llava']}", "llm.arch.hidden_size=32"))


def test_calibration_measures_what_training_starts_from(root: Path, tmp_path: Path, sources: dict[str, str]) -> None:
    def subject(*more: str) -> calibrate.Subject:
        config = config_of(root, tmp_path, "task=calibrate", "seed=7", *more)
        return calibrate.load_subject(config, config.pruner, None)

    saved = load_model(sources["llava"])[0].state_dict()
    for source, more in (("llava", []), ("adapters", ["init_adapters=continue"]), ("projector", [])):
        found = subject(f"init_from={sources[source]}", "calibrate.measure=layer_mean", *more)
        state = found.model.state_dict() if found.model else {}
        others = {
            name.split(".")[2] for name, value in saved.items() if not torch.allclose(state[name], value, atol=1e-6)
        }
        assert ("language_model" in others) == (source == "projector") and "multi_modal_projector" not in others
    (tower,) = subject(f"init_from={sources['llava']}").encoder.args  # type: ignore[attr-defined]
    name, value = next(iter(tower.state_dict().items()))
    assert torch.equal(value, saved[f"hf.model.vision_tower.{name}"])


def test_a_key_for_adapters_alone_is_refused_without_them(root: Path, tmp_path: Path, sources: dict[str, str]) -> None:
    for more in ([], [f"init_from={sources['llava']}"]):
        with pytest.raises(UserError, match=r"init_adapters=merge: nothing .* is an adapter folder"):
            train.run(config_of(root, tmp_path / "runs", "init_adapters=merge", *more))
    assert not (tmp_path / "runs").exists()
