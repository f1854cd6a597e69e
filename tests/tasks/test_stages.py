"""A run of three stages: each goes on from the one before, is continued, and can be asked for by its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training.synthetic import overrides, write_dataset

from mmprune_train.config.compose import compose_config
from mmprune_train.config.identity import run_of
from mmprune_train.errors import UserError
from mmprune_train.tasks import bench, evaluate, train
from mmprune_train.tasks.checkpoint import find_checkpoint

NAMES = ["pretrain", "midtrain", "instruct"]


def command(root: Path, runs: Path, *more: str) -> list[str]:
    sizes = [
        f"stage.{name}.{size}"
        for name in NAMES
        for size in ("batch_size=4", "global_batch_size=8", "max_length=512", "max_steps=2")
    ]
    data = ["data.midtrain.annotations=instruct.json", "data.midtrain.images=images"]
    off = ["peft=none", "evaluate.after_train=false", "trainer.precision=fp32"]
    return [*overrides(root, runs), "stage=llava_onevision", *data, *sizes, *off, *more]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "squares")


@pytest.fixture(scope="module")
def run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained in one go."""
    runs = tmp_path_factory.mktemp("runs")
    train.run(compose_config(command(root, runs)))
    return runs / "smoke/t"


def weights(run: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_file(run / stage / "model/model.safetensors")


def losses(run: Path, stage: str) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / stage / "metrics.jsonl").open()]


def test_every_stage_has_its_folder_and_trains_what_it_says(run: Path) -> None:
    stages = json.loads((run / "manifest.json").read_text())["stages"]
    assert list(stages) == NAMES and {stage["state"] for stage in stages.values()} == {"done"}
    began = [Path(next(iter(stages[name]["start"]["stamps"].values()))[0]).parent for name in NAMES[1:]]
    assert began == [run / "pretrain/model", run / "midtrain/model"]
    first, middle, last = (weights(run, name) for name in NAMES)
    changed = [{name for name in after if not torch.equal(before[name], after[name])}
               for before, after in ((first, middle), (middle, last))]  # fmt: skip
    for names in changed:
        assert any("vision_tower" in name for name in names) and any("language_model" in name for name in names)
    assert run_of(str(run / "midtrain")) == run_of(str(run / "midtrain/model")) == run


def test_stages_trained_one_command_at_a_time_are_those_of_one_run(run: Path, root: Path, tmp_path: Path) -> None:
    for stages in ("[pretrain]", "[midtrain]", "[pretrain,midtrain,instruct]"):
        train.run(compose_config(command(root, tmp_path, f"stages={stages}")))
    assert [losses(tmp_path / "smoke/t", name) for name in NAMES] == [losses(run, name) for name in NAMES]


def test_the_middle_stage_starts_from_another_run(run: Path, root: Path, tmp_path: Path) -> None:
    more = (f"stage.midtrain.init_from={run}/pretrain", "stages=[midtrain]")
    train.run(compose_config(command(root, tmp_path, *more)))
    assert losses(tmp_path / "smoke/t", "midtrain") == losses(run, "midtrain")


def test_the_middle_stage_is_asked_by_its_name_whatever_stage_group_the_command_has(run: Path) -> None:
    asked = ["+experiment=smoke", f"ckpt={run}"]
    found = find_checkpoint(compose_config(["task=evaluate", *asked]))
    assert found.model == run / "instruct/model" and list(found.config.stage) == NAMES == found.config.stages
    assert compose_config(["task=evaluate", *asked, "stages=[midtrain]"]).stages == ["midtrain"], "the run has it"
    short = ["bench.stage=midtrain", "bench.measure=[train]", "bench.repeats=1", "bench.pruners=[none]"]
    result = bench.run(compose_config(["task=bench", *asked, *short, "bench.baseline=false", "bench.batch_size=2"]))
    assert result["stage"] == "midtrain"
    with pytest.raises(UserError, match="bench.stage=midtran: .*did you mean midtrain"):
        bench.run(compose_config(["task=bench", *asked, "bench.stage=midtran"]))
    evaluate.run(compose_config(["task=evaluate", "+experiment=smoke", f"ckpt={run}/midtrain", "evaluate.limit=2"]))
    assert (run / "evaluate-midtrain/predictions.jsonl").is_file()
