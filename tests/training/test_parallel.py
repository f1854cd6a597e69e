"""Two processes give what one gives: the loss and the weights do not know how the global batch was split."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training.synthetic import overrides, write_dataset

pytestmark = pytest.mark.slow

# a large eps: AdamW does not hide a wrong scale of the gradients
SETTINGS = (
    "stages=[instruct]", "evaluate.after_train=false", "stage.instruct.max_steps=4", "stage.instruct.lr=0.02",
    "stage.instruct.global_batch_size=8", "optim.eps=0.003",
)  # fmt: skip


def losses_and_weights(root: Path, runs: Path, *more: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    command = [sys.executable, "-m", "mmprune_train", *overrides(root, runs), *SETTINGS, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = runs / "smoke" / "t" / "instruct"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    if any("token_budget" in override for override in more):
        assert len({row["micro_batches"] for row in rows}) > 1, "steps should differ in their number"
        assert all(row["budget_use"] <= 1 and row["padding_tokens"] == row["budget_overruns"] == 0 for row in rows)
    return [row["loss"] for row in rows], load_file(folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "squares")


@pytest.fixture(scope="module")
def alone(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict[str, torch.Tensor]]:
    return losses_and_weights(root, tmp_path_factory.mktemp("alone"), "stage.instruct.batch_size=4")


@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3"])
@pytest.mark.parametrize("split", ["batch_size=2", "token_budget=500"])
def test_two_processes_equal_one(
    split: str, strategy: str, root: Path, tmp_path: Path, alone: tuple[list[float], dict[str, torch.Tensor]]
) -> None:
    more = ("trainer.devices=2", "trainer.logits_chunk=3")  # unequal chunks on the ranks
    losses, weights = losses_and_weights(root, tmp_path, f"strategy={strategy}", f"stage.instruct.{split}", *more)
    assert losses == pytest.approx(alone[0], rel=1e-5)
    assert weights.keys() == alone[1].keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, alone[1][name], atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def in_pairs(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict[str, torch.Tensor]]:
    return losses_and_weights(root, tmp_path_factory.mktemp("in_pairs"), "stage.instruct.batch_size=2")


@pytest.mark.parametrize(
    ("strategy", "cached"),
    [("ddp", True), ("deepspeed_zero2", True), ("deepspeed_zero3", True), ("deepspeed_zero3", False)],
)
def test_one_process_may_have_text_alone_with_and_without_the_feature_cache(
    strategy: str, cached: bool, root: Path, tmp_path: Path, in_pairs: tuple[list[float], dict[str, torch.Tensor]]
) -> None:
    """One by one: what is left over of text and of images is text alone for one rank, an image for the other."""
    cache = ["trainer.feature_cache=true", f"trainer.feature_cache_dir={tmp_path / 'features'}"]
    both = [f"strategy={strategy}", "trainer.devices=2", "stage.instruct.batch_size=1"]
    losses, weights = losses_and_weights(root, tmp_path, *(cache if cached else []), *both)
    assert losses == pytest.approx(in_pairs[0], rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, in_pairs[1][name], atol=1e-5, rtol=0)
    if cached:
        (folder,) = (tmp_path / "features").glob("tiny_clip-*")
        assert len(list(folder.glob("*.safetensors"))) == 2, "one of each process"
