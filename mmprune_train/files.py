"""Files that are either whole or not there; those that are read back carry a checksum, and damage is told by name.

The checksum finds accidents and edits that somebody forgot; it is no protection against a forger. A file without one,
of an earlier version or because its owner took it out, is taken as it is.
"""

from __future__ import annotations

import json
import math
import os
import re
import uuid
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from mmprune_train.errors import UserError
from mmprune_train.secrets import masked, masked_texts
from mmprune_train.user_files import read_bytes, reason_of

CHECKSUM = "checksum"
"""Last key of a JSON object: CRC-32 of all text before its value."""
BLANK = "0" * 8
MARK = re.compile(r"# checksum: ([0-9a-f]{8})\b.*")
"""First line of a YAML file: CRC-32 of all lines below it. First, since a YAML file that is cut off may be a whole one
with fewer keys."""
PUT_BACK = "put an earlier copy back"


def write_atomically(path: Path, data: str | bytes, shared: bool = False) -> None:
    """Write beside the file, a text without secrets, bring that to disk, then rename over it.

    Args:
        shared: several processes may write it at once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp" if shared else f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # another user's, who was stopped, might not be written to
        temporary.write_bytes(masked(data).encode() if isinstance(data, str) else data)
        sync(temporary)
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Bring a file, or a folder's list of names, to disk, where it outlasts the machine's failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def write_json(path: Path, value: Any, checked: bool = False, shared: bool = False) -> None:
    """Args:
    checked: with a checksum, of an object that `read_json` reads back.
    shared: as in `write_atomically`.
    """
    text = json_text(masked_texts({**value, CHECKSUM: BLANK} if checked else value), indent=2) + "\n"
    if checked:
        before, after = text.rsplit(BLANK, 1)
        text = f"{before}{_crc(before)}{after}"
    write_atomically(path, text.encode(), shared)


def read_json(path: Path, remedy: str = PUT_BACK) -> dict[str, Any] | None:
    """The object that a file holds, without its checksum; None where there is no file.

    Raises:
        UserError: it is damaged, or holds something else; with the remedy.
    """
    if not path.is_file():
        return None
    text = _text(path, remedy)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"it is cut off or damaged, not JSON ({error})", remedy) from None
    if not isinstance(value, dict):
        raise damaged(path, f"it holds a {type(value).__name__} where an object is expected", remedy)
    known = value.pop(CHECKSUM, None)
    if known is not None and known != _crc(text[: max(0, text.rfind(str(known)))]):
        raise changed(path, f'"{CHECKSUM}"', remedy)
    return value


def marked(text: str) -> str:
    """YAML with its checksum."""
    text = masked(text)
    return f"# checksum: {_crc(text)}  (delete this line if you change the file)\n{text}"


def read_marked(path: Path, remedy: str = PUT_BACK) -> str:
    """The text of a YAML file. Raises UserError where it is empty, or is not what was written."""
    text = _text(path, remedy)
    first, _, rest = text.partition("\n")
    known = MARK.fullmatch(first)
    if all(not line.strip() or line.startswith("#") for line in text.split("\n")):
        raise damaged(path, "it is empty or cut off", remedy)
    if known and known[1] != _crc(rest):
        raise changed(path, "first line", remedy)
    return text


def read_written(path: Path, remedy: str = PUT_BACK) -> str:
    """The text of a YAML file that this project has written. Raises as `read_marked`, also where it has references:
    with a few of them a short file holds billions of values."""
    text = read_marked(path, remedy)
    if "*" in text and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
        raise damaged(path, "it has references (*name), as no file that is written here", remedy)
    return text


def check_marks(folder: Path) -> None:
    """Raise UserError where a YAML file with a checksum, at whatever depth in a folder, is not what was written."""
    for path in sorted(folder.rglob("*.yaml")):
        if path.is_file() and path.stat().st_size:
            read_marked(path)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSONL file; a last line without its end, which a kill cut off, is left out.

    Raises:
        UserError: another line is damaged.
    """
    return [row for _, row in _rows(path)] if path.is_file() else []


def rows_to(path: Path, last: int) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl up to step `last`; those after it are not looked at.

    Raises:
        UserError: one is damaged, or they end before.
    """
    return [row for _, row in _rows_to(path, last)]


def keep_steps(path: Path, last: int) -> None:
    """Drop the other rows of a metrics.jsonl: the resumed run writes them again. Raises as `rows_to`."""
    kept = b"".join(line + b"\n" for line, _ in _rows_to(path, last))
    if path.is_file():
        write_atomically(path, kept)


def _rows_to(path: Path, last: int) -> Iterator[tuple[bytes, dict[str, Any]]]:
    if not last:
        return
    for line, row in _rows(path) if path.is_file() else ():
        yield line, row
        if row.get("step") == last:
            return
    remedy = f"{PUT_BACK}, or delete {path.parent / 'checkpoints'} to train this stage from its start"
    raise damaged(path, f"it has no row of step {last}, after which the run continues", remedy)


def _rows(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    try:
        lines = read_bytes(path).split(b"\n")
    except OSError as error:
        raise damaged(path, f"it cannot be read ({reason_of(error)})", PUT_BACK) from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line.decode())
            if not isinstance(row, dict):
                raise ValueError("no object")
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                return
            remedy = f"{PUT_BACK}, or delete that line, which leaves it out of all averages"
            raise damaged(path, f"line {number} is damaged ({error})", remedy) from None
        yield line, row


def _text(path: Path, remedy: str) -> str:
    try:
        return read_bytes(path).decode()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({reason_of(error)}); make it readable, or {remedy}") from None
    except UnicodeDecodeError as error:
        raise damaged(path, f"it is damaged, not UTF-8 ({error.reason} at byte {error.start})", remedy) from None


def _crc(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def damaged(path: Path, fault: str, remedy: str) -> UserError:
    """The error of a file that cannot be what was written."""
    return UserError(f"{path}: {fault}; {remedy}")


def changed(path: Path, mark: str, remedy: str) -> UserError:
    """The error of a file whose checksum says that it was changed; `mark` is what holds it."""
    fault = "it is not what was written there, by damage or by hand"
    return damaged(path, fault, f"{remedy}, or delete its {mark} if you meant the change")
