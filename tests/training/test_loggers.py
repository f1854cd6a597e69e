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
from mmprune_train.config.schema import LoggerConfig, WandbConfig
from mmprune_train.training.loggers import CsvLogger, WandbRun, logger_faults, wandb_offline
from mmprune_train.training.run import run_stage
from mmprune_train.training.rundir import open_run


def test_csv_continues_where_the_run_continues(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    first = CsvLogger(path, flush_every=1)
    for step in (1, 2, 3):
        first.log_metrics({"loss": step / 10}, step)
    resumed = CsvLogger(path, 10, [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}])
    resumed.log_metrics({"loss": 9.0}, 3)
    resumed.finalize("success")
    assert path.read_text().splitlines() == ["step,loss", "1,0.1", "2,0.2", "3,9.0"]


def test_wandb_is_offline_without_an_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    auto = WandbConfig(mode="auto")
    assert wandb_offline(auto)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    assert not wandb_offline(auto)
    assert wandb_offline(WandbConfig(mode="offline"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_offline(auto) and not wandb_offline(WandbConfig(mode="online"))


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


@pytest.mark.parametrize("folder", ["wandb", ".wandb"])
def test_a_server_that_the_current_folder_names_gets_no_key(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    config = LoggerConfig(wandb=WandbConfig())
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "settings").write_text("[default]\nproject = mine\n")
    assert logger_faults(config) == []
    (tmp_path / folder / "settings").write_text("[default]\nbase_url = http://evil\n")
    (fault,) = logger_faults(config)
    assert f"{tmp_path}/{folder}/settings names a server" in fault and "WANDB_BASE_URL" in fault
    monkeypatch.setenv("WANDB_BASE_URL", "https://api.wandb.ai")
    assert logger_faults(config) == []


def test_wandb_is_given_nothing_that_it_warns_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = WandbRun([], save_dir=tmp_path, offline=True, mode="offline", project="p")
    assert run.experiment is not None
    run.close()
    assert "WARNING" not in capsys.readouterr().err
