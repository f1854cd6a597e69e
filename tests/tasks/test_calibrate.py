"""From a sample to a preset that a later command includes."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from training.synthetic import entry, overrides, write_dataset

from mmprune_train.config.compose import compose_config, config_from_file, load_pruner
from mmprune_train.data.batch import collate
from mmprune_train.data.records import Record
from mmprune_train.errors import UserError
from mmprune_train.evaluation.calibration import draw_records
from mmprune_train.model.begin import begin
from mmprune_train.model.build import load_model
from mmprune_train.model.llava import PackedLlava
from mmprune_train.storage.conf import options
from mmprune_train.storage.files import rows_of
from mmprune_train.tasks import calibrate, train
from mmprune_train.training.inputs import stage_loader

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "squares")


def calibrated(root: Path, runs: Path, *more: str) -> tuple[dict, Path]:
    result = calibrate.run(compose_config([*overrides(root, runs), "task=calibrate", *more]))
    return result, runs / "smoke" / "t" / "calibrate"


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_next_command_trains_with_what_was_found(root: Path, tmp_path: Path) -> None:
    given = [*overrides(root, tmp_path), "knee=cumulative_mass", "pruner.language.layer=1"]
    done = command("-m", "mmprune_train", "task=calibrate", *given, "calibrate.target=0.4")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "smoke" / "t" / "calibrate"
    result = json.loads((folder / "result.json").read_text())
    assert (folder / "budgets.png").stat().st_size > 10_000
    assert set(result["budgets"]) == set(options("knee")) and result["images"] == 16
    found = result["budgets"]["cumulative_mass"]["target"]
    assert abs(found["reached"] - 0.4) <= 1 / 36
    assert result["next"] in done.stdout and "pruner=calibrated" in result["next"]
    assert "knee=" not in result["next"] and "pruner.language" not in result["next"], "the preset has them"

    short = ["stage.pretrain.max_steps=1", "stage.instruct.max_steps=1", "evaluate.after_train=false"]
    done = command(*shlex.split(result["next"])[1:], *short)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "smoke" / "t"
    pruner = config_from_file(run / "config.yaml").pruner
    asked = compose_config(given).pruner
    solved = replace(asked.vision.knee, mass=found["value"])
    assert pruner == replace(asked, name="twostage-calibrated", vision=replace(asked.vision, knee=solved))
    assert load_model(run)[0].pruner.settings == pruner
    visual = next(rows_of(run / "pretrain" / "metrics.jsonl"))
    assert 0.2 < visual["visual_keep_ratio"] < 0.6


def test_a_preset_says_what_it_was_computed_from_and_others_stand_beside_it(root: Path, tmp_path: Path) -> None:
    result, folder = calibrated(root, tmp_path, "calibrate.budgets=[fixed_ratio,otsu]", "calibrate.target=0.5")
    presets = {path.stem: path for path in (folder / "conf" / "pruner").iterdir()}
    assert set(presets) == {"calibrated", "calibrated_fixed_ratio"} == set(result["presets"])
    assert set(result["budgets"]) == {"kneedle", "fixed_ratio", "otsu"}
    head = [line for line in presets["calibrated_fixed_ratio"].read_text().splitlines() if line.startswith("#")]
    for words in ("task=calibrate", "16 images", "seed 42", "cls_attention", "fixed_ratio, ratio=0.5", "target 0.5",
                  "reached 0.5000", "tiny_clip"):  # fmt: skip
        assert any(words in line for line in head), words
    calibrated(root, tmp_path, "calibrate.budgets=[otsu]", "calibrate.target=0.5")
    assert {path.stem for path in (folder / "conf" / "pruner").iterdir()} == {"calibrated"}, "no stale ones"


def test_the_keep_ratio_of_a_trained_run_is_near_the_one_solved_for(root: Path, tmp_path: Path) -> None:
    target = 0.8
    result, folder = calibrated(
        root, tmp_path, "calibrate.measure=layer_mean", f"calibrate.target={target}", "knee=cumulative_mass"
    )
    reached = result["budgets"]["cumulative_mass"]["target"]["reached"]
    assert reached == pytest.approx(result["keep_ratio"]) and abs(reached - target) < 1 / result["tokens"]["dense"]
    pruner = load_pruner(yaml.safe_load((folder / "conf" / "pruner" / "calibrated.yaml").read_text()))
    config = compose_config(
        [*overrides(root, tmp_path), "stages=[instruct]", "stage.instruct.max_steps=4", "evaluate.after_train=false"]
    )
    train.run(replace(config, pruner=pruner))
    rows = list(rows_of(tmp_path / "smoke" / "t" / "instruct" / "metrics.jsonl"))
    trained = sum(row["tokens_layer_mean"] for row in rows) / sum(row["tokens_dense"] for row in rows)
    assert trained == pytest.approx(target, abs=0.04)


def test_passes_that_stop_at_the_last_pruned_layer_count_what_whole_ones_do(root: Path, tmp_path: Path) -> None:
    """Every sample is drawn, so the keep ratio is that of the plain model on all samples."""
    more = ["calibrate.measure=layer_mean", "calibrate.target=null", "calibrate.images=1000", "pruner.language.layer=1"]
    result, _ = calibrated(root, tmp_path, *more)
    config = compose_config([*overrides(root, tmp_path), *more[3:], "stage.instruct.group_by_modality=false"])
    model, processor = begin(config)
    model.eval()
    loader = stage_loader(config, "instruct", processor.tokenizer, model.config.image_seq_length, rank=0, world=1)
    kept = dense = 0.0
    with torch.no_grad():
        for index in range(len(loader.dataset)):
            batch = collate(loader.dataset.read([index]))
            trace = model.forward_packed(batch.sequence, batch.pixel_values).trace
            assert len(trace.layers) == 4
            counts = trace.counts()
            kept, dense = kept + counts["layer_mean"], dense + counts["dense"]
    assert result["samples"] == len(loader.dataset) == 18
    assert result["keep_ratio"] == pytest.approx(kept / dense, abs=1e-3)
    assert "target" not in result["budgets"]["kneedle"] and result["presets"] == []


def test_each_image_is_encoded_once(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = []
    real = PackedLlava.encode_images

    def watch(self: PackedLlava, pixels: torch.Tensor) -> object:
        encoded.append(len(pixels))
        return real(self, pixels)

    monkeypatch.setattr(PackedLlava, "encode_images", watch)
    calibrated(root, tmp_path, "calibrate.measure=layer_mean", "calibrate.target=0.8", "knee=cumulative_mass")
    assert sum(encoded) == 16


def test_stage_two_alone_is_solved_for_its_own_parameter(root: Path, tmp_path: Path) -> None:
    result, folder = calibrated(
        root, tmp_path, "pruner=language_only", "knee=fixed_ratio", "calibrate.measure=layer_mean",
        "calibrate.target=0.7", "calibrate.budgets=[fixed_ratio,kneedle]",
    )  # fmt: skip
    found = result["budgets"]["fixed_ratio"]["target"]
    assert result["stage"] == "language" and abs(found["reached"] - 0.7) < 1 / result["tokens"]["dense"]
    text = (folder / "conf" / "pruner" / "calibrated.yaml").read_text()
    pruner = yaml.safe_load(text)
    assert pruner["language"]["knee"]["ratio"] == found["value"] and pruner["vision"]["knee"]["ratio"] is None


def test_a_target_out_of_reach_ends_with_the_range_after_the_report(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "smoke" / "t" / "calibrate"
    with pytest.raises(UserError, match=r"target=0.7: iqr keeps 0\.\d+ to 0\.\d+ .*out of reach"):
        calibrated(root, tmp_path, "knee=iqr", "calibrate.target=0.7", "calibrate.budgets=[iqr,fixed_count]")
    told = json.loads((folder / "result.json").read_text())["budgets"]
    assert told["iqr"]["target"]["value"] is None and told["iqr"]["target"]["problem"] == "out of reach"
    assert told["fixed_count"]["target"]["value"] == 25
    assert [path.stem for path in (folder / "conf" / "pruner").iterdir()] == ["calibrated_fixed_count"]


def test_a_budget_that_cannot_read_the_score_is_named_and_the_others_are_reported(root: Path, tmp_path: Path) -> None:
    result, _ = calibrated(root, tmp_path, "pruner.vision.score=cls_cosine", "calibrate.target=0.5")
    assert "can be negative" in result["budgets"]["cumulative_mass"]["problem"]
    assert result["budgets"]["kneedle"]["share"] > 0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["pruner=none"], "keeps everything"),
        (["pruner=language_only"], "no stage 1; set calibrate.measure=layer_mean"),
        (["calibrate.measure=layer_mean", "knee=otsu"], "no parameter.*knee=kneedle"),
        (["calibrate.measure=layers"], "did you mean layer_mean"),
        (["calibrate.target=1.5"], "share"),
        (["calibrate.split=evaluate"], "one of pretrain, instruct"),
        (["calibrate.budgets=[kneedl]"], "did you mean kneedle"),
        (["calibrate.images=0"], "at least 1"),
        (["data.instruct.annotations=absent.json"], "absent.json is missing"),
        (["ckpt=/nowhere"], "no such folder"),
    ],
)
def test_what_cannot_be_calibrated_is_one_line(root: Path, tmp_path: Path, more: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        calibrated(root, tmp_path, *more)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_score_with_weights_of_its_own_is_measured_by_them(root: Path, tmp_path: Path) -> None:
    more = ["pruner=learned", "calibrate.budgets=[fixed_ratio]", "calibrate.target=0.5"]
    result, _ = calibrated(root, tmp_path, *more)
    assert result["budgets"]["fixed_ratio"]["target"]["reached"] == 0.5


@pytest.mark.slow
def test_a_trained_run_is_calibrated_in_its_own_folder_with_its_own_settings(root: Path, tmp_path: Path) -> None:
    short = ["stage.pretrain.max_steps=1", "stage.instruct.max_steps=1", "evaluate.after_train=false"]
    train.run(compose_config([*overrides(root, tmp_path), *short, "pruner=encoder_only", "knee=fixed_ratio"]))
    run = tmp_path / "smoke" / "t"
    asked = ["task=calibrate", f"ckpt={run}", "calibrate.target=0.5", "calibrate.budgets=[fixed_ratio]"]
    calibrate.run(compose_config(asked))
    result = json.loads((run / "calibrate" / "result.json").read_text())
    assert result["budget"] == "fixed_ratio" and result["budgets"]["fixed_ratio"]["target"]["reached"] == 0.5
    assert "task=evaluate" in result["next"] and f"ckpt={run}" in result["next"]
    done = command(*shlex.split(result["next"])[1:], "evaluate.limit=2", "evaluate.max_new_tokens=2")
    assert done.returncode == 0, done.stderr
    evaluated = json.loads((run / "evaluate-encoder_only-calibrated" / "result.json").read_text())
    assert evaluated["tokens_dense"] - evaluated["tokens_stage1"] == 18  # half of 36 patches


def test_the_sample_is_drawn_by_the_seed_until_it_shows_enough_images() -> None:
    images = [[Path(f"{i // 3}.png")] if i % 4 else [] for i in range(60)]
    records = [Record(str(i), paths, [], f"file[{i}]") for i, paths in enumerate(images)]
    drawn = draw_records(records, 8, seed=1)
    assert len({path for record in drawn for path in record.images}) == 8
    assert drawn == draw_records(records, 8, seed=1) != draw_records(records, 8, seed=2)
    assert any(not record.images for record in draw_records(records, 1000, seed=1))
    assert len(draw_records(records, 1000, seed=1)) == 60


def test_a_split_without_images_is_named(root: Path, tmp_path: Path) -> None:
    (root / "text.json").write_text(json.dumps([entry("a", None, ["What is it?", "a test"])]))
    with pytest.raises(UserError, match="no sample has an image"):
        calibrated(root, tmp_path, "data.instruct.annotations=text.json")
