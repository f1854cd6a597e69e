"""Every option of the config groups trains and evaluates at tiny size, one override at a time."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from training.synthetic import overrides, write_dataset

from mmprune_train.config.compose import compose_config
from mmprune_train.storage.conf import options
from mmprune_train.tasks import train

SHORT = (
    "stage.pretrain.max_steps=1", "stage.instruct.max_steps=1", "evaluate.limit=2", "evaluate.max_new_tokens=2",
)  # fmt: skip
FREE = ("knee", "pruner", "projector", "peft", "logger", "optim")
ON_CUDA = {"peft=qlora"}  # elsewhere it is refused: tests/model/test_quantize.py
TRAINED = "knee=above_zero"  # refused without a score that is trained: tests/model/test_learned.py
SINGLE = sorted({f"{group}={name}" for group in FREE for name in options(group)} - ON_CUDA - {TRAINED})
KEYS = [
    "pruner.language.layer=1", "pruner.language.layer=[1,3]", "pruner.language.score=text_cosine",
    "pruner.language.score=last_token_attention", "pruner.language.candidates=visual",
    "pruner.language.turns=mean", "pruner.language.turns=max", "pruner.language.query_tokens=relevant",
    "pruner.language.score_layer=previous", "pruner.language.merge=recycle", "pruner.language.layer=[0.25,0.5]",
    "pruner.language.no_text=last_token_attention", "pruner.language.ranking=joint",
    "pruner.language.positions=contiguous", "pruner.vision.positions=original", "projector.init=matched",
    "pruner.vision.score=cls_cosine", "pruner.vision.score=pooled_cosine",
    "pruner.language.knee.method=fixed_count", "encoder.feature_layer=-1", "optim.schedule=constant",
    "optim.grad_clip=1.0", "llm.template=v1", "logger=[wandb,csv]", "stage.instruct.gradient_checkpointing=true",
    "stage.instruct.samples_per_image=2", "stage.instruct.train_vision=true", "trainer.num_workers=1",
    "trainer.precision=bf16", "trainer.attention=sdpa_per_sample", "trainer.logits_chunk=3",
]  # fmt: skip

KEEPS_ALL = (
    "knee=fixed_count", "pruner=visionzip", "pruner=fastervlm", "pruner=vispruner", "pruner=dpp",
    "knee=attention_entropy", "pruner=sparsevlm", "pruner=cdpruner", "pruner=windowed", "pruner=dart", "pruner=vscan",
    "pruner=scope", "pruner=mmtok", "pruner=holov", "pruner=downsample",
)  # fmt: skip
"""Overrides that keep more patches than a tiny image has, or as many as a random encoder attends to: all."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "squares")


def check(root: Path, runs: Path, *more: str) -> dict:
    result = train.run(compose_config([*overrides(root, runs), *SHORT, *more]))
    for stage in result["stages"]:
        assert math.isfinite(result["stages"][stage]["loss"])
        assert (runs / "smoke" / "t" / stage / "model" / "model.safetensors").is_file()
    assert set(result["evaluate"]["accuracy"]) == {"open", "yes_no"}
    return result


@pytest.mark.parametrize("override", [*SINGLE, *(pytest.param(one, marks=pytest.mark.slow) for one in KEYS)])
def test_a_single_override_trains_and_evaluates(override: str, root: Path, tmp_path: Path) -> None:
    pruning = override.startswith(("pruner", "knee"))  # which the first stage does as the second
    more = ["stages=[instruct]"] if pruning else []
    result = check(root, tmp_path, override, *more, *(["stage.instruct.max_steps=5"] if "pruner=" in override else []))
    assert list(result["stages"]) == (["instruct"] if pruning else ["pretrain", "instruct"])
    if override == "pruner=none":
        assert result["evaluate"]["keep_ratio"] == 1.0
    elif override.startswith(("pruner=", "knee=")) and override not in KEEPS_ALL:
        assert result["evaluate"]["keep_ratio"] < 1.0


def test_several_overrides_go_together(root: Path, tmp_path: Path) -> None:
    check(root, tmp_path, "knee=max_chord", "pruner.language.layer=1", "llm=tiny_llama", "encoder=tiny_clip")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", options("strategy"))
def test_every_strategy_trains_on_one_process(strategy: str, root: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mmprune_train", *overrides(root, tmp_path), *SHORT, f"strategy={strategy}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "accuracy" in done.stdout
