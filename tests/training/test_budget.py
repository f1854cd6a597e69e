"""A token budget decides how a step is split, not what it computes."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training.short import Loader
from training.synthetic import overrides, write_dataset

from mmprune_train.config.compose import compose_config
from mmprune_train.data import loader
from mmprune_train.data.lengths import KeptTokens
from mmprune_train.tasks.train import run
from mmprune_train.training.stream import BatchStream

STEPS = 6


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "squares")


def trained(root: Path, runs: Path, *more: str) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor], dict]:
    fixed = ("stages=[instruct]", "evaluate.after_train=false", f"stage.instruct.max_steps={STEPS}", "optim.eps=0.003")
    fixed += ("stage.instruct.lr=0.02", "trainer.precision=fp32")  # bf16 rounds otherwise in a batch of another size
    result = run(compose_config([*overrides(root, runs), *fixed, *more]))
    folder = Path(result["run"]) / "instruct"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return rows, load_file(folder / "model" / "model.safetensors"), result["stages"]["instruct"]


@pytest.mark.parametrize("pruner", ["none", "twostage"])
def test_losses_and_weights_are_those_of_a_fixed_batch_size(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pruner: str
) -> None:
    monkeypatch.setattr(loader, "KeptTokens", partial(KeptTokens, lag=1, enough=4))
    fixed, weights, _ = trained(root, tmp_path / "fixed", f"pruner={pruner}")
    assert "\n4 samples a forward pass" in capsys.readouterr().out
    rows, others, summary = trained(root, tmp_path / "packed", f"pruner={pruner}", "stage.instruct.token_budget=500")
    printed = capsys.readouterr().out
    assert "packs to 500 tokens a forward pass" in printed and "use of the token budget" in printed
    for a, b in zip(fixed, rows, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        for key in ("epoch", "samples", "tokens_stage1", "supervised_tokens", "lr"):
            assert a[key] == b[key], key
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], atol=1e-6, rtol=0)
    assert len({row["micro_batches"] for row in rows}) > 1 and not any(row["padding_tokens"] for row in rows)
    for row in rows:
        assert row["budget_use"] == pytest.approx(row["tokens_stage1"] / row["micro_batches"] / 500)
    assert summary["micro_batches"] == pytest.approx(sum(row["micro_batches"] for row in rows) / STEPS)
    assert summary["budget_overruns"] == summary["padding_tokens"] == 0


def test_a_run_goes_on_with_an_estimate_where_the_feature_cache_knew_until_now() -> None:
    steps = Loader(4)
    steps.kept = KeptTokens(patches=9, lag=2, enough=1)
    stream = BatchStream(steps, steps=20)
    stream.load_state_dict({"handed_out": 7, "kept": None})
    for step in range(7, 10):  # planned before anything was seen
        assert steps.kept.at(step).mean == 9
        stream.learn([1.0, 1.0, 4.0, 16.0])
    assert steps.kept.at(10).mean == pytest.approx(4)
