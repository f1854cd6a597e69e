"""Every logger has every step once, however often the run was interrupted."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training.killed import killed_after
from training.synthetic import overrides, write_dataset
from training.wandb_file import history

from mmprune_train.config.compose import compose_config
from mmprune_train.training.loggers import WandbRun
from mmprune_train.training.run import run_stage
from mmprune_train.training.rundir import open_run


def test_all_loggers_have_every_step_once_over_an_interrupted_run(tmp_path: Path) -> None:
    settings = ("stage.instruct.max_steps=5", "stage.instruct.batch_size=2", "stage.instruct.global_batch_size=2")
    more = ("logger=[csv,tensorboard,wandb]", "trainer.checkpoint_every_steps=2")
    config = compose_config([*overrides(write_dataset(tmp_path / "data"), tmp_path), *settings, *more])
    with killed_after(3):
        run_stage(config, "instruct", open_run(config), None)
    run = open_run(config)
    run_stage(config, "instruct", run, None)

    folder = run.stage("instruct")
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open()]
    assert len(losses) == 5
    assert [float(row["loss"]) for row in csv.DictReader((folder / "metrics.csv").open())] == losses
    events = EventAccumulator(str(folder / "tensorboard")).Reload().Scalars("loss")
    assert [event.step for event in events] == [1, 2, 3, 4, 5]
    first, second = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert first.name == second.name, "one run of wandb's"
    rows = history(second)
    assert [(row["_step"], row["trainer/global_step"]) for row in rows] == [(step, step) for step in range(1, 6)]
    assert [row["loss"] for row in rows] == losses


def test_training_outlives_wandbs_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        step = 0

        def log(self, *_: Any, **__: Any) -> None:
            raise ConnectionResetError("Connection lost")

    run = WandbRun([{"step": 1, "loss": 2.0}], save_dir=tmp_path, offline=True)
    monkeypatch.setattr(WandbRun, "experiment", Broken())
    run.open()
    run.log_metrics({"loss": 1.0}, 2)
    run.close(75)
    assert capsys.readouterr().out.count("wandb's process is gone (Connection lost)") == 1


def test_wandb_is_given_nothing_that_it_warns_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = WandbRun([], save_dir=tmp_path, offline=True, mode="offline", project="p")
    assert run.experiment is not None
    run.close()
    assert "WARNING" not in capsys.readouterr().err
