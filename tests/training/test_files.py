"""What a resumed run finds on disk."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mmprune_train.config.schema import WandbConfig
from mmprune_train.files import json_text, keep_steps, read_jsonl, write_json
from mmprune_train.folders import finished_folder, whole_folder
from mmprune_train.training.loggers import CsvLogger, wandb_offline


def test_steps_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s}) + "\n" for s in range(1, 6)) + '{"step": 6, "lo')
    keep_steps(path, 3)
    assert [row["step"] for row in read_jsonl(path)] == [1, 2, 3]


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


@pytest.mark.parametrize("umask", [0o002, 0o027])
@pytest.mark.parametrize("make", [whole_folder, finished_folder])
def test_files_of_a_new_folder_have_the_mode_of_the_umask(make: Any, umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with make(tmp_path / "new") as part:
            (part / "inside").mkdir()
            save_file({"a": torch.ones(1)}, part / "inside" / "model.safetensors")
            (part / "config.json").write_text("{}")
    finally:
        os.umask(before)
    modes = {path.is_dir(): path.stat().st_mode & 0o777 for path in (tmp_path / "new", *(tmp_path / "new").rglob("*"))}
    assert modes == {True: 0o777 & ~umask, False: 0o666 & ~umask}
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "new").rglob("*") if path.is_file()} == {0o666 & ~umask}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), np.float64("nan")])
def test_json_has_null_for_what_it_has_no_word_for(value: float, tmp_path: Path) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(word)

    found = {"loss": value, "parts": [1, (value, 2.5)], "deep": {"a": {"b": value}}, "word": "NaN", "yes": True}
    wanted = {"loss": None, "parts": [1, [None, 2.5]], "deep": {"a": {"b": None}}, "word": "NaN", "yes": True}
    write_json(tmp_path / "result.json", found)
    for text in ((tmp_path / "result.json").read_text(), json_text(found)):
        assert json.loads(text, parse_constant=refuse) == wanted
