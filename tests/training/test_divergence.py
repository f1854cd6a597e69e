"""Divergence is never success: what is not finite is not learnt from, not kept and not called done."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from training.killed import killed_after
from training.synthetic import overrides, write_dataset

from mmprune_train.config.compose import compose_config
from mmprune_train.config.schema import Config
from mmprune_train.errors import NotFinite, UserError
from mmprune_train.model.llava import PackedLlava
from mmprune_train.training import network
from mmprune_train.training import run as run_module
from mmprune_train.training.checkpoint_files import all_checkpoints, step_of
from mmprune_train.training.module import MultimodalModule
from mmprune_train.training.run import run_stage
from mmprune_train.training.rundir import RunDirectory, open_run

CLOCKED = ("step_seconds", "data_seconds", "samples_per_second", "tflops", "mfu")
Spoil = Callable[[MultimodalModule], None]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "squares")


@pytest.fixture(scope="module", autouse=True)
def no_clock() -> Iterator[None]:
    """The machine's speed is not measured, which takes longer than these trainings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "peak", lambda *_: SimpleNamespace(tflops=1.0, source="made up"))
        yield


def config_of(root: Path, runs: Path, *more: str) -> Config:
    steps = ["stage.pretrain.max_steps=6", "stage.pretrain.batch_size=2", "stage.pretrain.global_batch_size=4"]
    return compose_config([*overrides(root, runs), *steps, "trainer.checkpoint_every_steps=2", *more])


def train(config: Config) -> tuple[list[dict[str, Any]], RunDirectory]:
    run = open_run(config)
    run_stage(config, "pretrain", run, None)
    return rows_of(run), run


def rows_of(run: RunDirectory) -> list[dict[str, Any]]:
    lines = (run.stage("pretrain") / "metrics.jsonl").open()
    rows = [json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON")) for line in lines]
    return [{k: v for k, v in row.items() if k not in CLOCKED} for row in rows]


def projector(module: MultimodalModule) -> nn.Linear:
    return module.model.hf.model.multi_modal_projector.linear_2


def loss_of(value: float) -> Spoil:
    def spoil(module: MultimodalModule) -> None:
        forward = module.model.forward_packed

        def once(*given: Any, **more: Any) -> Any:
            output = forward(*given, **more)
            output.loss_sum = output.loss_sum * value
            module.model.forward_packed = forward
            return output

        module.model.forward_packed = once

    return spoil


def gradient_of(value: float) -> Spoil:
    def spoil(module: MultimodalModule) -> None:
        handle = projector(module).weight.register_hook(lambda gradient: (gradient * value, handle.remove())[0])

    return spoil


def weight_of(value: float) -> Spoil:
    """As an update leaves it that overflows."""

    def spoil(module: MultimodalModule) -> None:
        projector(module).weight.data[0, 0] = value

    return spoil


@contextmanager
def spoiled(spoil: Spoil, *steps: int) -> Iterator[None]:
    """What trains in here is spoiled in the last micro-batch of these steps, counted from 1."""
    begin = MultimodalModule.on_train_batch_start

    def patched(self: MultimodalModule, batch: Any, index: int) -> None:
        begin(self, batch, index)
        if batch.place.last and batch.place.step + 1 in steps:
            spoil(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MultimodalModule, "on_train_batch_start", patched)
        yield


@pytest.fixture(scope="module")
def undisturbed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return train(config_of(root, tmp_path_factory.mktemp("whole")))[0]


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (loss_of(torch.nan), "the loss is not finite"),
        pytest.param(loss_of(torch.inf), "the loss is not finite", marks=pytest.mark.slow),
        pytest.param(gradient_of(torch.nan), "the gradient norm of projector is not finite", marks=pytest.mark.slow),
        (gradient_of(1e30), "the gradient norm of projector is not finite"),  # its square overflows
    ],
)
def test_a_step_that_is_not_finite_ends_the_run_and_the_same_command_goes_on(
    spoil: Spoil, named: str, root: Path, tmp_path: Path, undisturbed: list[dict[str, Any]]
) -> None:
    config = config_of(root, tmp_path)
    with spoiled(spoil, 4), pytest.raises(NotFinite) as ended:
        train(config)
    run = RunDirectory(tmp_path / "smoke" / "t", writable=False)
    what, kept, remedy = str(ended.value).splitlines()
    assert what.startswith(f"stage pretrain, step 4: {named}, so the step is not applied; samples p")
    assert what.count(", p") == 3 and "step-00000002.ckpt" in kept
    assert "stage.pretrain.lr (projector 0.001)" in remedy and "trainer.on_nonfinite=skip" in remedy
    assert rows_of(run) == undisturbed[:3]
    assert not run.finished("pretrain") and not run.model("pretrain").exists()
    assert [step_of(path) for path in all_checkpoints(run.stage("pretrain") / "checkpoints")] == [2]
    rows, run = train(config)
    assert rows == undisturbed and run.finished("pretrain")
    assert all(row["grad_norm"] > 0 and row["steps_skipped"] == 0 for row in rows)


@pytest.mark.parametrize("spoil", [loss_of(torch.nan), pytest.param(gradient_of(torch.inf), marks=pytest.mark.slow)])
def test_a_skipped_step_changes_nothing_is_counted_and_survives_a_kill(
    spoil: Spoil, root: Path, tmp_path: Path, undisturbed: list[dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    skip = ("trainer.on_nonfinite=skip", "trainer.max_nonfinite_steps=2")
    with spoiled(spoil, 3, 4):
        whole, _ = train(config_of(root, tmp_path / "whole", *skip))
        config = config_of(root, tmp_path / "killed", *skip)
        with killed_after(5):
            train(config)
        rows, run = train(config)
    assert rows == whole and [row["steps_skipped"] for row in rows] == [0, 0, 1, 1, 0, 0]
    assert rows[:2] == undisturbed[:2] and [row["lr"] for row in rows] == [row["lr"] for row in undisturbed]
    assert rows[2]["grad_norm"] is None and run.stage_state("pretrain")["steps_skipped"] == 2
    said = capfd.readouterr().out
    assert "in a row: 2 of 2" in said and "2 of 6 steps were not applied" in said


def test_weights_and_optimizer_stay_as_they_were(root: Path, tmp_path: Path) -> None:
    with spoiled(loss_of(torch.nan), 3, 4):
        _, run = train(config_of(root, tmp_path, "trainer.on_nonfinite=skip", "stage.pretrain.max_steps=5"))
    states = [torch.load(path / "state") for path in all_checkpoints(run.stage("pretrain") / "checkpoints")]
    four, last = (state["optimizer_states"][0]["state"] for state in states)
    assert {int(entry["step"]) for entry in four.values()} == {2}
    assert {int(entry["step"]) for entry in last.values()} == {3}


@pytest.mark.parametrize(("steps", "most"), [((3, 4, 5), 2), pytest.param(range(1, 7), 10, marks=pytest.mark.slow)])
def test_too_many_in_a_row_or_all_of_them_end_the_run(steps: Any, most: int, root: Path, tmp_path: Path) -> None:
    """Counted over a kill, too."""
    config = config_of(root, tmp_path, "trainer.on_nonfinite=skip", f"trainer.max_nonfinite_steps={most}")
    with spoiled(loss_of(torch.nan), *steps):
        with killed_after(4):
            train(config)
        with pytest.raises(NotFinite, match=f"such steps in a row: {len(steps)}"):
            train(config)
    run = RunDirectory(tmp_path / "smoke" / "t", writable=False)
    assert not run.model("pretrain").exists() and not run.finished("pretrain")


@pytest.mark.parametrize(
    ("saved", "value"),
    [("trainer.checkpoint_every_steps=2", torch.nan), ("trainer.save_every_minutes=1e-9", torch.inf)],
)
def test_no_checkpoint_holds_weights_that_are_not_finite(
    saved: str, value: float, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = MultimodalModule.step_metrics

    def overflowing(self: MultimodalModule) -> dict[str, Any]:
        if self.trainer.global_step == 4:
            weight_of(value)(self)
        return step(self)

    monkeypatch.setattr(MultimodalModule, "step_metrics", overflowing)
    with pytest.raises(NotFinite, match="step 4: the weights of projector are not finite, so they are not saved"):
        train(config_of(root, tmp_path, saved))
    found = all_checkpoints(tmp_path / "smoke/t/pretrain/checkpoints")
    assert step_of(found[-1]) in (2, 3)
    for path in found:
        assert all(weight.isfinite().all() for weight in torch.load(path / "state")["state_dict"].values())


BEYOND = ("stage.pretrain.lr=1e30", "optim.warmup_ratio=0")


@pytest.mark.parametrize(
    ("steps", "choice"), [(1, "stop"), (2, "stop"), (3, "skip"), pytest.param(4, "stop", marks=pytest.mark.slow)]
)
def test_a_learning_rate_beyond_all_measure_is_no_success(steps: int, choice: str, root: Path, tmp_path: Path) -> None:
    """Also where the last step applied has broken the weights, which are finite still, and all others are skipped."""
    more = (*BEYOND, f"stage.pretrain.max_steps={steps}", f"trainer.on_nonfinite={choice}")
    with pytest.raises(NotFinite, match=r"stage pretrain, step \d: "):
        train(config_of(root, tmp_path, *more))
    assert not (tmp_path / "smoke/t/pretrain/model").exists()


@pytest.mark.parametrize("part", ["multi_modal_projector.linear_1.bias", "language_model.embed_tokens.weight"])
def test_weights_that_are_nan_from_the_start_are_named(
    part: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = network.begin

    def begun(*given: Any, **more: Any) -> tuple[PackedLlava, Any]:
        model, processor = begin(*given, **more)
        dict(model.named_parameters())[f"hf.model.{part}"].data[0] = torch.nan
        return model, processor

    monkeypatch.setattr(network, "begin", begun)
    with pytest.raises(UserError, match=rf"the weights that stage pretrain starts from hold NaN .*{part}"):
        train(config_of(root, tmp_path))


@pytest.mark.parametrize("stage", ["pretrain", "instruct"])
def test_no_model_is_saved_with_nan(stage: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merged adapters overflow where the adapters do not."""
    save = run_module.save_stage

    def broken(model: PackedLlava, *given: Any) -> None:
        for name, parameter in model.named_parameters():
            if "lora_" in name or (stage == "pretrain" and "projector" in name):
                parameter.data.fill_(1e25 if "lora_" in name else torch.nan)
        save(model, *given)

    monkeypatch.setattr(run_module, "save_stage", broken)
    config = config_of(root, tmp_path, f"stage.{stage}.max_steps=1")
    with pytest.raises(NotFinite, match="not finite"):
        run_stage(config, stage, open_run(config), None)
    assert not (tmp_path / "smoke/t" / stage / "model").exists()


SPOILED_RANK = """
import sys
from mmprune_train.__main__ import main
from mmprune_train.model.llava import PackedLlava
from mmprune_train.training.module import MultimodalModule

step = MultimodalModule.training_step

def training_step(self, batch, index):
    loss = step(self, batch, index)
    bad = self.global_rank == 1 and batch.place.step == 1 and batch.place.last
    if bad:
        self.loss_sum = self.loss_sum * float("nan")
    return loss * float("nan") if bad else loss

MultimodalModule.training_step = training_step
main()
"""


def on_two(root: Path, runs: Path, strategy: str, program: str, *more: str) -> subprocess.CompletedProcess[str]:
    """The first stage on two processes, started by `python program`."""
    asked = [f"strategy={strategy}", "trainer.devices=2", "stages=[pretrain]", "evaluate.after_train=false"]
    asked += ["stage.pretrain.global_batch_size=8", "trainer.checkpoint_every_steps=1", *more]
    command = [sys.executable, *program.split(), *overrides(root, runs), *asked]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3"])
def test_on_two_processes_the_last_step_is_looked_at_too(strategy: str, root: Path, tmp_path: Path) -> None:
    done = on_two(root, tmp_path, strategy, "-m mmprune_train", *BEYOND, "stage.pretrain.max_steps=1")
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "error: stage pretrain, step 1: the loss is not finite any more" in done.stderr
    assert not (tmp_path / "smoke/t/pretrain/model").exists()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3"])
@pytest.mark.parametrize("choice", ["stop", "skip"])
def test_all_ranks_agree_on_what_one_of_them_saw(strategy: str, choice: str, root: Path, tmp_path: Path) -> None:
    script = tmp_path / "spoiled.py"
    script.write_text(SPOILED_RANK)
    done = on_two(root, tmp_path, strategy, str(script), "stage.pretrain.max_steps=4", f"trainer.on_nonfinite={choice}")
    run = RunDirectory(tmp_path / "smoke" / "t", writable=False)
    assert "Traceback" not in done.stderr
    if choice == "stop":
        assert done.returncode == 1 and done.stderr.count("error: stage pretrain, step 2: the loss is not finite") == 1
        assert [row["step"] for row in rows_of(run)] == [1] and not run.model("pretrain").exists()
        return
    assert done.returncode == 0, done.stderr
    assert [row["steps_skipped"] for row in rows_of(run)] == [0, 1, 0, 0] and run.finished("pretrain")
