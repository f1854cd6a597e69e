"""A run directory belongs to one set of settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mmprune_train.config.compose import compose_config
from mmprune_train.config.schema import Config
from mmprune_train.errors import UserError
from mmprune_train.training.rundir import open_run


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return compose_config(["+experiment=smoke", f"runs_dir={tmp_path}", "run_id=one"])


def test_the_same_settings_continue(config: Config, tmp_path: Path) -> None:
    run = open_run(config)
    run.update_stage("pretrain", state="running", steps=4)
    run.update_stage("pretrain", state="done")
    again = open_run(replace(config, task="train", debug=True))
    assert again.path == tmp_path / "smoke" / "one"
    assert again.finished("pretrain") and again.stage_state("pretrain")["steps"] == 4
    assert again.manifest["versions"]["torch"] and again.manifest["seed"] == config.seed


def test_other_settings_are_refused_by_key(config: Config) -> None:
    open_run(config)
    with pytest.raises(UserError, match=r"seed: 42 -> 43.*restart=true"):
        open_run(replace(config, seed=43))


def test_restart_moves_the_old_run_aside(config: Config) -> None:
    first = open_run(config)
    first.write_result({"old": True})
    second = open_run(replace(config, seed=43, restart=True))
    assert second.result is None
    assert (second.path.parent / "one.old1" / "result.json").is_file()


def test_other_ranks_write_nothing(config: Config) -> None:
    run = open_run(config, writable=False)
    run.update(x=1)
    assert not run.path.exists()
