"""How far a stage is: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from mmprune_train.training.callbacks import Progress

ROW = {
    "loss": 0.5, "lr": 1e-3, "keep_ratio": 0.25, "mfu": 0.125, "data_seconds": 0.5, "step_seconds": 1.0, "samples": 4,
    "samples_truncated": 3,
}  # fmt: skip


def train(rows: dict[int, dict[str, Any]], last: int) -> None:
    """Steps 3 to `last` of a stage that was continued after step 2."""
    metrics = SimpleNamespace(latest={})
    progress = Progress("instruct", last, 4, metrics)
    trainer: Any = SimpleNamespace(is_global_zero=True, global_step=2)
    progress.on_train_start(trainer, None)
    for step in range(3, last + 1):
        trainer.global_step, metrics.latest = step, {**ROW, **rows.get(step, {})}
        progress.on_step_end(trainer, None)
    progress.on_train_end(trainer, None)


def test_lines_are_of_the_first_the_last_and_every_nth_step(capsys: pytest.CaptureFixture[str]) -> None:
    train({4: {"loss": None}, 9: {"data_seconds": 0.01, "samples_truncated": 0}}, last=9)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"instruct {step}/9" for step in (3, 4, 8, 9)]
    assert "loss 0.5000  lr 1.00e-03  kept 0.250" in lines[0] and "s/step (50 % waiting for data)" in lines[0]
    assert "MFU 0.12  3 of 4 samples cut" in lines[0] and "loss not finite" in lines[1]
    assert "waiting" not in lines[3] and "cut" not in lines[3] and lines[3].endswith("  0 s left")


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    train({}, last=9)
    out, err = capsys.readouterr()
    assert not out and "instruct: 100%" in err and "9/9, loss 0.5000" in err and "0 s left" in err
