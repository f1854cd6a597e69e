"""Two processes give what one gives: the loss and the weights do not know how the global batch, or the weights, were
split. One launch trains two stages, the whole LLM first and then adapters on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from training.synthetic import overrides, write_dataset

from mmprune_train.training.precision import hardware_bf16

pytestmark = pytest.mark.slow

STAGES = ("pretrain", "instruct")
# a large eps: AdamW does not hide a wrong scale of the gradients
SETTINGS = (
    "evaluate.after_train=false", "data.pretrain.annotations=instruct.json", "stage.pretrain.train_llm=true",
    "stage.pretrain.template=auto", "stage.pretrain.group_by_modality=true", "stage.pretrain.image_aspect_ratio=pad",
    "optim.eps=0.003", "optim.grad_clip=0.5", "trainer.checkpoint_every_steps=100", "trainer.precision=fp32",
)  # fmt: skip
BIG = (
    "llm.arch.hidden_size=1024", "llm.arch.intermediate_size=2816", "llm.arch.num_hidden_layers=12",
    "llm.arch.num_attention_heads=16", "llm.arch.num_key_value_heads=16",
)  # fmt: skip


def both(*settings: str) -> list[str]:
    return [f"stage.{stage}.{setting}" for stage in STAGES for setting in settings]


class Trained(NamedTuple):
    losses: dict[str, list[float]]
    weights: dict[str, dict[str, torch.Tensor]]


def trained(root: Path, runs: Path, *more: str, steps: int) -> Trained:
    of_stages = both("lr=0.005", "global_batch_size=8", f"max_steps={steps}")
    command = [sys.executable, "-m", "mmprune_train", *overrides(root, runs), *SETTINGS, *of_stages, *more]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = Trained({}, {})
    for stage in STAGES:
        folder = runs / "smoke" / "t" / stage
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        if any("token_budget" in override for override in more):
            assert len({row["micro_batches"] for row in rows}) > 1, "steps should differ in their number"
            assert all(row["budget_use"] <= 1 and row["padding_tokens"] == row["budget_overruns"] == 0 for row in rows)
        assert len(rows) == steps and any(row["keep_ratio"] < 1 for row in rows)
        found.losses[stage] = [row["loss"] for row in rows]
        found.weights[stage] = load_file(folder / "model" / "model.safetensors")
        if (scorer := folder / "model" / "scorer" / "weights.safetensors").is_file():
            found.weights[stage] |= {f"scorer.{name}": weight for name, weight in load_file(scorer).items()}
    return found


def assert_equal(found: Trained, wanted: Trained) -> None:
    """Within what another order of the same fp32 sums changes."""
    for stage in STAGES:
        assert found.losses[stage] == pytest.approx(wanted.losses[stage], rel=1e-5), stage
        assert found.weights[stage].keys() == wanted.weights[stage].keys()
        for name, weight in found.weights[stage].items():
            torch.testing.assert_close(weight, wanted.weights[stage][name], atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "squares")


@pytest.fixture(scope="module")
def in_pairs(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return trained(root, tmp_path_factory.mktemp("in_pairs"), *both("batch_size=2"), steps=20)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3"])
def test_twenty_steps_of_two_processes_equal_those_of_one(
    strategy: str, root: Path, tmp_path: Path, in_pairs: Trained
) -> None:
    """One by one: what is left over of text and of images is text alone for one rank, an image for the other."""
    more = ("trainer.devices=2", "trainer.logits_chunk=3", *both("batch_size=1"))  # unequal chunks on the ranks
    assert_equal(trained(root, tmp_path, f"strategy={strategy}", *more, steps=20), in_pairs)


SCORED = ("pruner=learned", "pruner.vision.knee.ratio=0.4", "pruner.vision.noise=0")
"""Noise is another one on each rank."""


@pytest.fixture(scope="module")
def scored(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return trained(root, tmp_path_factory.mktemp("scored"), *SCORED, *both("batch_size=2"), steps=6)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3"])
def test_a_score_is_trained_by_two_processes_as_by_one(
    strategy: str, root: Path, tmp_path: Path, scored: Trained
) -> None:
    """Text alone for one rank, an image for the other, among it."""
    more = (*SCORED, "trainer.devices=2", *both("batch_size=1"))
    found = trained(root, tmp_path, f"strategy={strategy}", *more, steps=6)
    assert_equal(found, scored)
    before, after = (found.weights[stage] for stage in STAGES)
    weights = [name for name in after if name.startswith("scorer.")]
    assert len(weights) == 6 and not any(torch.equal(before[name], after[name]) for name in weights)


@pytest.fixture(scope="module")
def rounded(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    more = ("trainer.precision=bf16", *both("batch_size=2"))
    return trained(root, tmp_path_factory.mktemp("rounded"), *more, steps=4)


@pytest.mark.skipif(not hardware_bf16("cpu")[0], reason="the CPU emulates bf16: a step takes a minute")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3"])
def test_two_processes_in_bf16_differ_from_one_by_rounding(
    strategy: str, root: Path, tmp_path: Path, rounded: Trained
) -> None:
    """bf16 has 8 bits, 4e-3 of a value, and a loss is a mean over some hundred of them."""
    more = ("trainer.precision=bf16", f"strategy={strategy}", "trainer.devices=2", *both("batch_size=1"))
    found = trained(root, tmp_path, *more, steps=4)
    for stage in STAGES:
        assert found.losses[stage] == pytest.approx(rounded.losses[stage], rel=1e-3), stage
        assert found.weights[stage].keys() == rounded.weights[stage].keys()


@pytest.fixture(scope="module")
def few(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    more = (*both("batch_size=4"), "stage.instruct.train_vision=true")
    return trained(root, tmp_path_factory.mktemp("few"), *more, steps=4)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "deepspeed_zero3", "deepspeed_zero3_offload"])
def test_ranks_may_differ_in_their_passes_of_the_vision_tower(
    strategy: str, root: Path, tmp_path: Path, few: Trained
) -> None:
    """By a token budget, image by image: one rank has more images in a micro-batch than the other."""
    more = ("trainer.devices=2", "trainer.vision_chunk=1", "stage.instruct.train_vision=true")
    assert_equal(trained(root, tmp_path, f"strategy={strategy}", *more, *both("token_budget=500"), steps=4), few)


@pytest.fixture(scope="module")
def alone(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return trained(root, tmp_path_factory.mktemp("alone"), *both("batch_size=2"), steps=3)


@pytest.mark.parametrize("strategy", ["fsdp2", "deepspeed_zero2_offload", "deepspeed_zero3"])
def test_the_feature_cache_is_filled_by_two_processes(
    strategy: str, root: Path, tmp_path: Path, alone: Trained
) -> None:
    cache = ("trainer.feature_cache=true", f"trainer.feature_cache_dir={tmp_path / 'features'}")
    more = (*cache, f"strategy={strategy}", "trainer.devices=2", *both("batch_size=1"))
    assert_equal(trained(root, tmp_path, *more, steps=3), alone)
    (folder,) = (tmp_path / "features").glob("tiny_clip-*")
    assert len(list(folder.glob("*.safetensors"))) == 2, "one of each process"


@pytest.mark.parametrize("strategy", ["fsdp2", "deepspeed_zero3"])
def test_a_large_model_is_loaded_whole_by_the_first_process_alone(strategy: str, root: Path, tmp_path: Path) -> None:
    few = ("stages=[instruct]", *both("batch_size=1", "global_batch_size=2", "max_steps=1"))
    command = [sys.executable, str(Path(__file__).with_name("peak_memory.py")), *overrides(root, tmp_path / "runs")]
    command += [*SETTINGS, *BIG, *few, f"strategy={strategy}", "trainer.devices=2"]
    # glibc would keep what is freed
    environment = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "PEAK_MEMORY": str(tmp_path)}
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (int((tmp_path / f"rank-{rank}").read_text()) for rank in (0, 1))
    whole = sum(
        weight.nbytes for weight in load_file(tmp_path / "runs/smoke/t/instruct/model/model.safetensors").values()
    )
    assert first > whole > 500e6
    assert second < 0.7 * whole, "its half, and a layer"
