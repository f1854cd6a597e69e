"""A run that is killed and started again goes on as if nothing had happened."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from training.killed import Killed, killed_after
from training.synthetic import overrides, write_dataset

from mmprune_train.config.compose import compose_config
from mmprune_train.config.schema import Config
from mmprune_train.data import loader
from mmprune_train.data.lengths import KeptTokens
from mmprune_train.errors import UserError
from mmprune_train.training.checkpoint_files import all_checkpoints
from mmprune_train.training.run import run_stage
from mmprune_train.training.rundir import RunDirectory, open_run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "squares")


def config_of(root: Path, runs: Path, *more: str) -> Config:
    """LoRA with dropout, random scores, accumulation, several epochs: everything that has a state."""
    return compose_config(
        [
            *overrides(root, runs),
            "peft.dropout=0.3",
            *([] if any(one.startswith("pruner=") for one in more) else ["pruner=random"]),
            "stage.instruct.batch_size=2",
            "stage.instruct.global_batch_size=4",
            "stage.instruct.max_steps=9",
            "trainer.checkpoint_every_steps=2",
            *more,
        ]
    )


def train(config: Config) -> tuple[list[dict[str, Any]], RunDirectory]:
    run = open_run(config)
    run_stage(config, "instruct", run, None)
    return [json.loads(line) for line in (run.stage("instruct") / "metrics.jsonl").open()], run


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param(("pruner.schedule.name=constant",), marks=pytest.mark.slow),
        pytest.param(("pruner.schedule.name=anneal",), marks=pytest.mark.slow),
        ("pruner.schedule.name=random",),
        ("stage.instruct.token_budget=600", "stage.instruct.global_batch_size=6", "trainer.num_workers=1"),
        ("pruner=learned", "pruner.vision.knee.ratio=0.4"),
    ],
    ids=["constant", "anneal", "random", "token_budget", "learned"],
)
def test_killed_at_any_step_the_losses_are_bit_equal(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: tuple[str, ...]
) -> None:
    monkeypatch.setattr(loader, "KeptTokens", partial(KeptTokens, lag=2, enough=4))
    whole, _ = train(config_of(root, tmp_path / "whole", *changed))
    assert len({row["loss"] for row in whole}) == 9 and whole[-1]["epoch"] > 1
    config = config_of(root, tmp_path / "killed", *changed)
    for step in (1, 4, 7):  # before the first checkpoint, at one, between two of them
        with killed_after(step):
            train(config)
    rows, run = train(config)
    clocked = ("step_seconds", "data_seconds", "samples_per_second", "tflops", "mfu")
    timeless = [{k: v for k, v in row.items() if k not in clocked} for row in (*whole, *rows)]
    assert timeless[:9] == timeless[9:]
    if "micro_batches" in rows[0]:
        use = [(row["micro_batches"], row["budget_overruns"]) for row in rows]
        assert use[:3] == [(2, 0)] * 3 and use[-1] == (1, 0), "all patches first, then what stage 1 leaves"
    assert run.finished("instruct") and (run.model("instruct") / "model.safetensors").is_file()
    assert len(all_checkpoints(run.stage("instruct") / "checkpoints")) == 2


def test_a_checkpoint_holds_the_trained_weights_alone(root: Path, tmp_path: Path) -> None:
    _, run = train(config_of(root, tmp_path, "stage.instruct.max_steps=2"))
    (path,) = all_checkpoints(run.stage("instruct") / "checkpoints")
    names = torch.load(path / "state", weights_only=True)["state_dict"]
    assert names and all("lora_" in name or "multi_modal_projector" in name for name in names)


@pytest.mark.parametrize("moment", ["save_adapters", "merge_adapters", "stage_image_processor"])
def test_killed_after_the_last_step_only_what_is_missing_is_done(
    moment: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(root, tmp_path, "stage.instruct.max_steps=2")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(f"mmprune_train.training.run.{moment}", Mock(side_effect=Killed))
        train(config)
    run = RunDirectory(tmp_path / "smoke" / "t", writable=False)
    assert not run.finished("instruct") and not run.model("instruct").exists()
    before = (run.stage("instruct") / "metrics.jsonl").read_text()
    train(config)
    assert run.finished("instruct") and (run.model("instruct") / "model.safetensors").is_file()
    assert (run.stage("instruct") / "metrics.jsonl").read_text() == before
    written = sorted(path.name for path in run.stage("instruct").iterdir())
    assert written == ["adapters", "checkpoints", "metrics.csv", "metrics.jsonl", "model"]


@pytest.mark.parametrize(
    ("setting", "named"),
    [("trainer.devices=2", "trainer.devices: 1 -> 2"), ("strategy=ddp", "strategy.name: single -> ddp")],
)
def test_another_number_of_processes_or_strategy_is_refused(
    setting: str, named: str, root: Path, tmp_path: Path
) -> None:
    open_run(config_of(root, tmp_path))
    with pytest.raises(UserError, match=f"{named}.*run_id="):
        open_run(config_of(root, tmp_path, setting, "strategy=ddp"))


def test_a_stage_leaves_adapters_as_its_last_checkpoint_has_them(root: Path, tmp_path: Path) -> None:
    _, run = train(config_of(root, tmp_path, "stage.instruct.max_steps=2"))
    (path,) = all_checkpoints(run.stage("instruct") / "checkpoints")
    state = torch.load(path / "state", weights_only=True)["state_dict"]
    saved = load_file(run.stage("instruct") / "adapters" / "adapter_model.safetensors")
    for name, weight in saved.items():
        key = "model.hf." + name.removeprefix("base_model.model.").replace(".weight", ".default.weight")
        assert torch.equal(state[key], weight)
    assert len(saved) == sum("lora_" in name for name in state)
