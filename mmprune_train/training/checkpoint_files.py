"""Checkpoints as files: what makes one whole, how damage is found, and which one a run continues.

A checkpoint is a folder `step-00000100.ckpt` with `state`, the file or folder that the strategy writes and reads, and
`index.json`, written last: the size and CRC-32 of every file, and of the rows that metrics.jsonl had. All processes
write it, otherwise as any folder that is whole or not there (`storage/atomic.py`).
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from mmprune_train.errors import UserError
from mmprune_train.storage.atomic import sync, unfinished
from mmprune_train.storage.checksums import Checksum, as_checksums, checksum_of, fault_of, files_in
from mmprune_train.storage.files import read_json, write_json
from mmprune_train.storage.run_files import METRICS, rows_fault
from mmprune_train.workers import ALONE, Ranks

PATTERN = re.compile(r"step-(\d+)\.ckpt")
STATE = "state"
INDEX = "index.json"


@dataclass(frozen=True)
class Index:
    """What `index.json` tells."""

    step: int
    """Optimizer steps of the stage that are done."""
    strategy: str
    world_size: int
    """Processes that wrote it."""
    loss: float | None = None
    """Mean training loss of the steps since the checkpoint before."""
    files: Mapping[str, Checksum] = field(default_factory=dict)
    """By path inside the checkpoint."""
    metrics: Checksum | None = None
    """Of the stage's metrics.jsonl up to this step: its rows count in the stage's averages. None: not recorded."""


def name_of(step: int) -> str:
    return f"step-{step:08d}.ckpt"


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was written."""
    found = PATTERN.fullmatch(checkpoint.name)
    assert found is not None, checkpoint
    return int(found[1])


def all_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints, oldest first; unfinished ones are not among them."""
    return sorted((path for path in folder.glob("*.ckpt") if PATTERN.fullmatch(path.name)), key=step_of)


def last_checkpoint(folder: Path, ranks: Ranks = ALONE) -> Path | None:
    """The newest whole checkpoint, every byte of it read; None: there is no checkpoint at all.

    Every rank must call it, and reads its share. Rank 0 tells which damaged ones are passed over.

    Raises:
        UserError: there are checkpoints, and none is whole.
    """
    damaged: list[str] = []
    for checkpoint in reversed(ranks.exchange(all_checkpoints(folder))[0]):
        fault = damage(checkpoint, ranks)
        if fault is None:
            if damaged and ranks.rank == 0:
                print(f"passed over: {'; '.join(damaged)}; {checkpoint.name} is whole", flush=True)
            return checkpoint
        damaged.append(f"{checkpoint.name} is damaged ({fault})")
    if damaged:
        raise UserError(
            f"{folder}: {'; '.join(damaged)}; put a whole one there, delete the folder to train this stage from its "
            "start, or give restart=true to start the run over and move this one aside"
        )
    return None


def seal(checkpoint: Path, index: Index, ranks: Ranks) -> None:
    """Bring a written checkpoint to disk and write its index. Every rank must call it when all have written theirs."""
    names = ranks.exchange(files_in(checkpoint))[0]
    checksums = ranks.all(lambda share: [_bring_to_disk(checkpoint / name) for name in share], names)
    if ranks.rank == 0:
        whole = replace(index, files=dict(zip(names, checksums, strict=True)))
        write_json(checkpoint / INDEX, asdict(whole), checked=True)
        for folder in {(checkpoint / name).parent for name in names}:
            sync(folder)
        sync(checkpoint)


def read_index(checkpoint: Path) -> Index | None:
    """What a checkpoint says it holds; None where that cannot be read."""
    try:
        found = read_json(checkpoint / INDEX)
        if found is None:
            return None
        metrics = found.pop("metrics", None)
        index = Index(**{**found, "files": as_checksums(found["files"])}, metrics=metrics and Checksum(**metrics))
        return index if type(index.step) is int and index.step == step_of(checkpoint) else None
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def damage(checkpoint: Path, ranks: Ranks = ALONE) -> str | None:
    """What is wrong with a checkpoint; None: it is as it was written. Every rank must call it, and reads its share."""
    index = ranks.exchange(read_index(checkpoint))[0]
    if index is None:
        return f"no {INDEX} that can be read"

    def faults(share: Sequence[str]) -> list[str | None]:
        return [fault_of(checkpoint, name, index.files[name], checksum_of) for name in share]

    rows = ranks.exchange(rows_fault(checkpoint.parent.parent / METRICS, index.metrics))[0]
    return next((fault for fault in (*ranks.all(faults, list(index.files)), rows) if fault is not None), None)


def check_written_by(checkpoint: Path, strategy: str, world_size: int) -> None:
    """Raise UserError unless as many processes as now wrote a checkpoint under the same strategy: sums over other ranks
    round otherwise, and what each rank keeps of the optimizer is its own part."""
    index = read_index(checkpoint)
    assert index is not None, checkpoint
    if (index.strategy, index.world_size) != (strategy, world_size):
        raise UserError(
            f"{checkpoint} was written by {_processes(index.world_size)} under strategy={index.strategy}, and this run "
            f"has {_processes(world_size)} under strategy={strategy}: start it as before to continue, or give "
            "another run_id="
        )


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint, under a name that marks what a kill leaves of it as unfinished."""
    if checkpoint.is_dir() and PATTERN.fullmatch(checkpoint.name):
        checkpoint = checkpoint.rename(unfinished(checkpoint))
    if checkpoint.is_dir() and not checkpoint.is_symlink():
        shutil.rmtree(checkpoint)
    else:
        checkpoint.unlink(missing_ok=True)


@contextmanager
def data_alone() -> Iterator[None]:
    """While this lasts torch.load makes tensors, plain containers and a few of DeepSpeed's records, and nothing else,
    also where its caller asks for more: DeepSpeed does."""
    key, records = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", []
    if "deepspeed" in sys.modules:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        records = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        with torch.serialization.safe_globals(records):
            yield
    finally:
        os.environ.pop(key)
        if before is not None:
            os.environ[key] = before


def _bring_to_disk(path: Path) -> Checksum:
    sync(path)
    return checksum_of(path)


def _processes(number: int) -> str:
    return f"{number} process" if number == 1 else f"{number} processes"
