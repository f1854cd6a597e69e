"""A checkpoint is whole or it is not there; one that is damaged is passed over, and no other is deleted for it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training.killed import Killed

from mmprune_train.config.explain import user_mistake
from mmprune_train.config.schema import TrainerConfig
from mmprune_train.errors import UserError
from mmprune_train.training import checkpoint_files, checkpoints
from mmprune_train.training.checkpoint_files import (
    all_checkpoints,
    check_written_by,
    damage,
    data_alone,
    last_checkpoint,
    read_index,
    step_of,
)
from mmprune_train.training.checkpoints import Checkpoints
from mmprune_train.workers import Ranks


class Strategy:
    """One process, or rank 0 of several whose clock decides."""

    def barrier(self, name: str) -> None:
        pass

    def broadcast(self, value: Any) -> Any:
        return value


class Trainer:
    """What Checkpoints asks of Lightning's; writes the files that two processes would under ZeRO."""

    is_global_zero, world_size, global_rank = True, 1, 0

    def __init__(self, metrics: Path) -> None:
        self.strategy = Strategy()
        self.optimizers = [SimpleNamespace(state={"a": 1})]
        self.loggers: list[Any] = []
        self.global_step = 0
        self.metrics = SimpleNamespace(path=metrics, latest={"loss": 0.0})
        metrics.parent.mkdir(parents=True, exist_ok=True)
        metrics.touch()

    def save_checkpoint(self, path: Path) -> None:
        path.mkdir()
        for rank in range(2):
            (path / f"rank_{rank}.pt").write_bytes(f"step {self.global_step} rank {rank} ".encode() * 100)

    def run(self, saves: Checkpoints, to: int, losses: dict[int, float] | None = None) -> None:
        saves.on_train_start(self, None)
        for step in range(self.global_step + 1, to + 1):
            self.global_step = step
            self.metrics.latest = {"loss": (losses or {}).get(step, 1.0)}
            saves.on_step_end(self, None)


@pytest.fixture(autouse=True)
def whole_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "refuse_broken", lambda *_: None)


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return Trainer(tmp_path / "metrics.jsonl")


def saves_of(trainer: Trainer, every: int | None = 2, last: int = 100, **more: Any) -> Checkpoints:
    folder = trainer.metrics.path.parent / "checkpoints"
    config = TrainerConfig(checkpoint_every_steps=every, **more)
    return Checkpoints(folder, trainer.metrics, "deepspeed_zero2", last, config)


def steps(folder: Path) -> list[int]:
    return [step_of(path) for path in all_checkpoints(folder)]


@pytest.mark.parametrize("keep", [1, 2])
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(
    keep: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends at the n-th thing it asks of the disk, for every n until it lives through all of them."""
    left = [0]

    def mortal(function: Any) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return function(*arguments, **more)

        return call

    def cut_off(path: Path, data: bytes) -> int:
        left[0] -= 1
        if left[0] == 0:
            data = data[: len(data) // 2]
        with path.open("wb") as file:
            file.write(data)
        if left[0] == 0:
            raise Killed
        return len(data)

    def remove_tree(path: Path, **_: Any) -> None:
        for name in sorted(path.rglob("*"), reverse=True):
            name.rmdir() if name.is_dir() else name.unlink()
        path.rmdir()

    monkeypatch.setattr(shutil, "rmtree", remove_tree)
    for name in ("mkdir", "rename", "rmdir", "unlink"):
        monkeypatch.setattr(Path, name, mortal(getattr(Path, name)))
    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, mortal(getattr(os, name)))
    monkeypatch.setattr(Path, "write_bytes", cut_off)
    killed = 0
    for moment in range(1, 400):
        left[0] = 0
        trainer = Trainer(tmp_path / str(moment) / "metrics.jsonl")
        folder = trainer.metrics.path.parent / "checkpoints"
        trainer.run(saves_of(trainer, keep_checkpoints=keep), to=4)
        left[0] = moment
        try:
            trainer.run(saves_of(trainer, keep_checkpoints=keep), to=6)
        except Killed:
            killed += 1
        alive, left[0] = left[0] > 0, 0
        found = last_checkpoint(folder)
        assert found is not None and step_of(found) in (4, 6)
        again = Trainer(trainer.metrics.path)
        again.global_step = step_of(found)
        again.run(saves_of(again, keep_checkpoints=keep), to=8)
        assert steps(folder) == [6, 8][-keep:] and all(damage(path) is None for path in all_checkpoints(folder))
        assert sorted(folder.iterdir()) == all_checkpoints(folder), "nothing else is left"
        if alive:
            break
    assert killed > 15


@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (lambda c: (c / "state/rank_1.pt").unlink(), "rank_1.pt is missing"),
        (lambda c: (c / "state/rank_0.pt").write_bytes(b"step"), "rank_0.pt has 4 of 1400 bytes"),
        (lambda c: flip(c / "state/rank_1.pt"), "rank_1.pt has other bytes than were written"),
        (lambda c: (c / "index.json").write_text('{"step": 4, "stra'), "no index.json that can be read"),
        (lambda c: (c / "index.json").unlink(), "no index.json that can be read"),
    ],
    ids=["missing", "truncated", "flipped", "index", "no_index"],
)
def test_a_damaged_newest_is_named_and_the_one_before_it_used(
    harm: Any, what: str, trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    saves = saves_of(trainer)
    trainer.run(saves, to=4)
    harm(saves.folder / "step-00000004.ckpt")
    found = last_checkpoint(saves.folder)
    assert found == saves.folder / "step-00000002.ckpt"
    said = capsys.readouterr().out
    assert "step-00000004.ckpt is damaged (" in said and what in said and "step-00000002.ckpt is whole" in said
    trainer.global_step = 2
    trainer.run(saves_of(trainer, every=1), to=3)
    assert steps(saves.folder) == [2, 3], "the damaged one does not count among those that are kept"
    assert not list(saves.folder.glob("*.damaged"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)


def test_where_none_is_whole_the_stage_is_not_begun_anew(trainer: Trainer) -> None:
    saves = saves_of(trainer, keep_checkpoints=1)
    trainer.run(saves, to=4)
    (saves.folder / "step-00000004.ckpt" / "state" / "rank_0.pt").unlink()
    with pytest.raises(UserError, match=r"step-00000004.ckpt is damaged .*rank_0.pt is missing.*restart=true"):
        last_checkpoint(saves.folder)
    assert last_checkpoint(saves.folder / "absent") is None


def test_ranks_read_their_share_and_agree(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    saves = saves_of(trainer)
    trainer.run(saves, to=2)
    checkpoint = saves.folder / "step-00000002.ckpt"
    read: list[str] = []
    mark = checkpoint_files.checksum_of
    monkeypatch.setattr(checkpoint_files, "checksum_of", lambda path: read.append(path.name) or mark(path))
    second = Ranks(1, 2, lambda mine: [mine if not isinstance(mine, list) else [None] * len(mine), mine])
    assert damage(checkpoint, second) is None
    assert read == ["rank_1.pt"]
    flip(checkpoint / "state" / "rank_1.pt")
    assert "rank_1.pt has other bytes" in str(damage(checkpoint, second))


def test_a_step_that_has_a_checkpoint_is_not_saved_again(trainer: Trainer) -> None:
    saves = saves_of(trainer)
    saves.on_train_start(trainer, None)
    saves.save(trainer)
    assert steps(saves.folder) == [], "the start of a stage needs none"
    trainer.run(saves, to=2)
    written = (saves.folder / "step-00000002.ckpt").stat().st_mtime_ns
    saves.save(trainer)
    resumed = saves_of(trainer)
    resumed.on_train_start(trainer, None)
    resumed.save(trainer)
    assert (saves.folder / "step-00000002.ckpt").stat().st_mtime_ns == written
    trainer.global_step = 3
    saves.save(trainer)
    assert steps(saves.folder) == [2, 3]


def test_minutes_are_those_of_rank_0(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now[0])
    saves = saves_of(trainer, every=None, save_every_minutes=1.5, keep_checkpoints=10)
    saves.on_train_start(trainer, None)
    for step in range(1, 8):
        trainer.global_step, now[0] = step, 40.0 * step
        saves.on_step_end(trainer, None)
    assert steps(saves.folder) == [3, 6]
    monkeypatch.setattr(trainer.strategy, "broadcast", lambda _: True)
    trainer.global_step = 8
    saves.on_step_end(trainer, None)
    assert steps(saves.folder)[-1] == 8, "though this rank's clock says otherwise"


def test_the_last_step_is_saved_whatever_the_rhythm(trainer: Trainer) -> None:
    saves = saves_of(trainer, every=4, last=5)
    trainer.run(saves, to=5)
    assert steps(saves.folder) == [4, 5]


def test_the_best_is_that_of_the_lowest_mean_loss_since_the_one_before(trainer: Trainer) -> None:
    saves = saves_of(trainer, keep_checkpoints=1, keep_best=True)
    losses = {1: 9, 2: 9, 3: 1, 4: 5, 5: 4, 6: 4, 7: 0, 8: 9, 9: 5, 10: 5}
    trainer.run(saves, to=10, losses={step: float(loss) for step, loss in losses.items()})
    assert steps(saves.folder) == [4, 10]
    found = read_index(saves.folder / "step-00000004.ckpt")
    assert found is not None and found.loss == 3.0


def test_loggers_are_flushed_before_a_checkpoint_knows_their_step(trainer: Trainer) -> None:
    flushed = []
    trainer.loggers = [SimpleNamespace(save=lambda: flushed.append(trainer.global_step))]
    trainer.run(saves_of(trainer), to=5)
    assert flushed == [2, 4]


def test_other_processes_or_strategies_are_refused_by_name(trainer: Trainer) -> None:
    saves = saves_of(trainer)
    trainer.run(saves, to=2)
    (checkpoint,) = all_checkpoints(saves.folder)
    check_written_by(checkpoint, "deepspeed_zero2", 1)
    with pytest.raises(UserError, match=r"1 process under strategy=deepspeed_zero2.* 4 processes under strategy=ddp"):
        check_written_by(checkpoint, "ddp", 4)


class Payload:
    def __reduce__(self) -> Any:
        return os.mkdir, ("/tmp/must-not-exist",)


def test_reading_a_checkpoint_runs_no_code_in_it(tmp_path: Path) -> None:
    torch.save({"state": Payload()}, tmp_path / "evil.pt")
    torch.save({"state": torch.ones(2)}, tmp_path / "good.pt")
    with data_alone():
        with pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / "evil.pt", weights_only=False)  # as DeepSpeed asks
        assert torch.load(tmp_path / "good.pt", weights_only=False)["state"].sum() == 2
    assert not Path("/tmp/must-not-exist").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_the_index_tells_what_a_person_wants_to_know(trainer: Trainer) -> None:
    saves = saves_of(trainer)
    trainer.run(saves, to=2)
    told = json.loads((saves.folder / "step-00000002.ckpt" / "index.json").read_text())
    assert {key: told[key] for key in ("step", "strategy", "world_size", "loss")} == {
        "step": 2, "strategy": "deepspeed_zero2", "world_size": 1, "loss": 1.0,
    }  # fmt: skip
    assert set(told["files"]) == {"state/rank_0.pt", "state/rank_1.pt"}


def test_of_a_link_the_link_alone_is_deleted(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "kept").mkdir(parents=True)
    for name in ("step-00000001.ckpt", ".step-00000002.ckpt.tmp", "step-00000003.ckpt.damaged"):
        (tmp_path / name).symlink_to(elsewhere)
        checkpoint_files.remove(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"] and (elsewhere / "kept").is_dir()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(28, "No space left on device"), True),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 8 vs 4\nframe #0"), True),
        (RuntimeError("a bug"), False),
    ],
)
def test_a_full_disk_is_told_in_a_line_and_older_ones_stay(error: Exception, told: bool, trainer: Trainer) -> None:
    trainer.run(saves_of(trainer), to=2)

    def full(path: Path) -> None:
        raise error

    trainer.save_checkpoint = full  # type: ignore[method-assign]
    with pytest.raises((OSError, RuntimeError), match="cannot be written .* those before it are whole") as caught:
        trainer.run(saves_of(trainer), to=4)
    message = user_mistake(caught.value)
    assert (message is not None) == told
    assert message is None or ("step-00000004.ckpt" in message and "make room" in message and "\n" not in message)
    assert steps(saves_of(trainer).folder) == [2]
