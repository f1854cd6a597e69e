"""Whole runs on the device: strategies on one device lose what one process loses, and a killed run goes on exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from training.killed import killed_after
from training.synthetic import write_dataset
from training.test_parallel import STAGES, Trained, both, trained
from training.test_resume import config_of, train

pytestmark = pytest.mark.cuda
STEPS = 3


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "squares")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """What one process without a strategy does, once it has been asked for."""
    return {}


@pytest.mark.parametrize("strategy", ["fsdp2", "deepspeed_zero2"])
def test_a_strategy_on_one_device_loses_what_a_single_process_does(
    strategy: str,
    root: Path,
    tmp_path: Path,
    alone: dict[str, Trained],
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over NCCL on a GPU, over gloo on a CPU."""
    if device.type == "cuda":
        monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    more = (*both("batch_size=2"), f"trainer.accelerator={device.type}")
    if not alone:
        alone["single"] = trained(root, tmp_path / "single", *more, steps=STEPS)
    found, wanted = trained(root, tmp_path / strategy, f"strategy={strategy}", *more, steps=STEPS), alone["single"]
    for stage in STAGES:
        assert found.losses[stage] == pytest.approx(wanted.losses[stage], rel=1e-4), stage
        for name, weight in wanted.weights[stage].items():
            torch.testing.assert_close(found.weights[stage][name], weight, atol=1e-4, rtol=0)


def test_killed_and_started_again_the_losses_are_bit_equal(
    root: Path, tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With kernels that give the same sums each time: what differs is then what a checkpoint lacks."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    changed = (f"trainer.accelerator={device.type}", "trainer.attention=sdpa_per_sample")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            whole, _ = train(config_of(root, tmp_path / "whole", *changed))
            config = config_of(root, tmp_path / "killed", *changed)
            with killed_after(4):
                train(config)
            rows, _ = train(config)
    finally:
        torch.use_deterministic_algorithms(False)
    losses, again = ([row["loss"] for row in these] for these in (whole, rows))
    assert again[:4] == losses[:4], "the kernels give other sums each time"
    assert again == losses and len(losses) == 9
