"""Files that are either whole or not there."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_atomically(path: Path, text: str) -> None:
    """Write beside the file, bring that to disk, then rename over it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    os.replace(temporary, path)


def sync(path: Path) -> None:
    """Bring a file, or a folder's list of names, to disk, where it outlasts the machine's failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of `folder` when the block ends well and all of it is on disk."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    for path in (*temporary.rglob("*"), temporary):
        sync(path)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def stamp_of(file: Path) -> list[Any]:
    """By what the very same file is known: place, size, inode and both times, of which a copy has a new one."""
    found = file.stat()
    return [str(file.resolve()), found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON that any reader takes: NaN and infinity, which it does not have, are null."""
    return json.dumps(_without_nan(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_nan(part) for key, part in value.items()}
    return [_without_nan(part) for part in value] if isinstance(value, list | tuple) else value


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json_text(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The file's content, or None where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSONL file; a last line cut off by a kill is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def keep_steps(path: Path, last: int) -> None:
    """Drop the rows of a metrics.jsonl after step `last`: the resumed run writes them again."""
    rows = [row for row in read_jsonl(path) if row["step"] <= last]
    if path.is_file():
        write_atomically(path, "".join(json_text(row) + "\n" for row in rows))
