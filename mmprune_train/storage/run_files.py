"""What a run directory records of itself: manifest.json, and in it the checksums of a stage's files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmprune_train.errors import UserError
from mmprune_train.storage.atomic import write_atomically
from mmprune_train.storage.checksums import Checksum, as_checksums, checksum_of, checksums_of, first_fault
from mmprune_train.storage.files import PUT_BACK, damaged, read_json, rows_of

MANIFEST = "manifest.json"
METRICS = "metrics.jsonl"
SAVED = ("model", "adapters")
"""Folders that a training stage ends with."""
MISSHAPEN = (KeyError, TypeError, AttributeError, ValueError, IndexError)
"""What reading a file raises that holds other things than its reader expects."""


def read_manifest(run: Path) -> dict[str, Any] | None:
    """A run's manifest.json; None where there is none.

    Raises:
        UserError: it is damaged, or holds something else.
    """
    remedy = f"put an earlier copy back, or move {run} aside and start over"
    found = read_json(run / MANIFEST, remedy)
    if found is not None and (fault := _fault(found)):
        raise damaged(run / MANIFEST, fault, remedy)
    return found


def _fault(manifest: Mapping[str, Any]) -> str | None:
    for key in ("stages", "base_weights"):
        entries = manifest.get(key, {})
        if not (isinstance(entries, dict) and all(isinstance(entry, dict) for entry in entries.values())):
            return f"its {key} are no objects by name"
        if odd := [name for name in entries if Path(name).name != name or name == ".."]:
            return f"its {key} name {odd[0]!r}, which is no name"
    return None


def read_result(path: Path, told: Callable[[dict[str, Any]], object]) -> dict[str, Any] | None:
    """A result.json that a training run or an evaluation wrote; None where there is none.

    Args:
        told: makes a table of it, which it must hold all for.
    Raises:
        UserError: it is damaged, or holds something else.
    """
    remedy = "put an earlier copy back, or delete it: the same command writes it again"
    found = read_json(path, remedy)
    if found is not None:
        try:
            told(found)
        except MISSHAPEN as error:
            what = f"it is no result ({type(error).__name__}: {error})"
            raise damaged(path, what, remedy) from None
    return found


def files_of_stage(folder: Path) -> dict[str, Any]:
    """For the manifest: checksums of the files that a finished stage leaves."""
    checksums = {METRICS: checksum_of(folder / METRICS)}
    for name in SAVED:
        checksums |= checksums_of(folder / name, folder)
    return {name: asdict(checksum) for name, checksum in checksums.items()}


def check_saved(key: str, folder: Path) -> None:
    """Hold the `model/` or `adapters/` of a stage against its run's manifest. Any other folder is taken as it is.

    Args:
        key: what gave the folder, for messages.
    Raises:
        UserError: a file is not what the stage has saved.
    """
    folder = folder.resolve()
    if folder.name not in SAVED:
        return
    stage = folder.parent
    if not (stage.parent / "config.yaml").is_file():  # no run: its manifest.json, if it has one, is somebody else's
        return
    checksums = {name: checksum for name, checksum in recorded(stage).items() if Path(name).parts[0] == folder.name}
    if fault := first_fault(stage, checksums):
        raise UserError(
            f"{key}: {stage}/{fault}, by damage or by hand; put it back, train anew (restart=true), or where you meant "
            f"the change give a copy of {folder}"
        )


def rows_to(path: Path, last: int) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl up to step `last`; those after it are not looked at.

    Raises:
        UserError: one is damaged, or they end before.
    """
    rows: list[dict[str, Any]] = []
    if not last:
        return rows
    for row in rows_of(path):
        rows.append(row)
        if row.get("step") == last:
            return rows
    remedy = f"{PUT_BACK}, or delete {path.parent / 'checkpoints'} to train this stage from its start"
    raise damaged(path, f"it has no row of step {last}, after which the run continues", remedy)


def keep_steps(path: Path, last: int) -> None:
    """Drop the other rows of a metrics.jsonl: the resumed run writes them again. Raises as `rows_to`."""
    kept = len(rows_to(path, last))
    if path.is_file():
        write_atomically(path, b"".join(line + b"\n" for line in path.read_bytes().split(b"\n")[:kept]))


def rows_fault(file: Path, written: Checksum | None) -> str | None:
    """How the first rows of a metrics.jsonl differ from those that were written; None: not at all, or not known."""
    if written is None or (file.is_file() and checksum_of(file, written.bytes) == written):
        return None
    return f"{file.name} has other rows than were written" if file.is_file() else f"{file.name} is missing"


def rows_written(stage: Path) -> Checksum | None:
    """Checksum of the rows of a stage's metrics.jsonl: all of a finished stage, else those up to its newest checkpoint;
    None: not recorded."""
    if known := recorded(stage).get(METRICS):
        return known
    indices = sorted((stage / "checkpoints").glob("step-*.ckpt/index.json"))
    found = read_json(indices[-1]) if indices else None
    return Checksum(**found["metrics"]) if found and found.get("metrics") else None


def recorded(stage: Path) -> dict[str, Checksum]:
    """Checksums of a finished stage's files, by their paths in its folder; empty where none were recorded."""
    state = (read_manifest(stage.parent) or {}).get("stages", {}).get(stage.name, {})
    try:
        return as_checksums(state.get("files", {}))
    except MISSHAPEN as error:
        raise damaged(stage.parent / MANIFEST, f"its files of {stage.name} are wrong ({error})", PUT_BACK) from None
