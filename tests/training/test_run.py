"""What a stage says of the kernels it runs with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import packed, tiny_llava
from training.synthetic import overrides, write_dataset

from mmprune_train.config.compose import compose_config
from mmprune_train.errors import UserError
from mmprune_train.tasks import train
from mmprune_train.training.network import kernel_lines


def test_kernels_are_told_with_the_reason() -> None:
    model = packed(tiny_llava())
    told = kernel_lines(model, torch.device("cpu"), torch.float32)
    assert told == "attention: sdpa_per_sample (on a CPU)\nlogits: chunks of 1024 tokens (on a CPU)"
    model = packed(tiny_llava(), attention="sdpa_per_sample", logits_chunk=5)
    told = kernel_lines(model, torch.device("cpu"), torch.float32)
    assert told.splitlines()[0].endswith("(as trainer.attention asks)") and "chunks of 5 tokens" in told


def test_a_stage_prints_them_and_ends_where_they_cannot_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_dataset(tmp_path / "squares")
    command = [*overrides(root, tmp_path), "stages=[pretrain]", "stage.pretrain.max_steps=1", "trainer.accelerator=cpu"]
    command += ["evaluate.after_train=false", "trainer.logits_chunk=7", "trainer.precision=fp32"]
    with pytest.raises(UserError, match="trainer.attention=flash_2: needs a CUDA device"):
        train.run(compose_config([*command, "trainer.attention=flash_2"]))
    train.run(compose_config(command))
    assert "attention: sdpa_per_sample (on a CPU)\nlogits: chunks of 7 tokens (on a CPU)\n" in capsys.readouterr().out
