"""JSON, JSONL and YAML that this project writes and reads back, with a checksum: damage is told by the file's name.

The checksum finds accidents and edits that somebody forgot; it is no protection against a forger. A file without one,
of an earlier version or because its owner took it out, is taken as it is.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from mmprune_train.errors import UserError
from mmprune_train.storage.atomic import write_atomically
from mmprune_train.storage.secrets import masked, masked_texts
from mmprune_train.storage.user_files import BadJson, parse_json, read_bytes, reason_of

CHECKSUM = "checksum"
"""Last key of a JSON object: CRC-32 of all text before its value."""
BLANK = "0" * 8
BEGIN = "# checksum: "
FIRST_LINE = re.compile(BEGIN + r"([0-9a-f]{8})\b.*")
"""Of a YAML file: CRC-32 of all lines below it. First, since a YAML file that is cut off may be a whole one with fewer
keys."""
PUT_BACK = "put an earlier copy back"


def stamp_of(file: Path) -> list[Any]:
    """Path, size, inode and times of a file: others where it was written to, replaced or copied."""
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
    """
    Args:
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
        value = parse_json(text)
    except BadJson as error:
        raise damaged(path, f"it is cut off or damaged, {error}", remedy) from None
    if not isinstance(value, dict):
        raise damaged(path, f"it holds a {type(value).__name__} where an object is expected", remedy)
    known = value.pop(CHECKSUM, None)
    if known is not None and known != _crc(text[: max(0, text.rfind(str(known)))]):
        raise changed(path, f'"{CHECKSUM}"', remedy)
    return value


def write_yaml(path: Path, text: str) -> None:
    """Write YAML with its checksum."""
    text = masked(text)
    write_atomically(path, f"{BEGIN}{_crc(text)}  (delete this line if you change the file)\n{text}")


def read_yaml(path: Path) -> str:
    """The text of a YAML file that this project has written.

    Raises:
        UserError: it is empty, or not what was written, or has references: with a few of them a short file holds
            billions of values.
    """
    text = _text(path, PUT_BACK)
    if all(not line.strip() or line.startswith("#") for line in text.split("\n")):
        raise damaged(path, "it is empty or cut off", PUT_BACK)
    first, _, rest = text.partition("\n")
    known = FIRST_LINE.fullmatch(first)
    if known and known[1] != _crc(rest):
        raise changed(path, "first line", PUT_BACK)
    if "*" in text and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
        raise damaged(path, "it has references (*name), as no file that is written here", PUT_BACK)
    return text


def check_yaml_files(folder: Path) -> None:
    """Raise UserError where a YAML file with a checksum, at whatever depth in a folder, is not what was written."""
    for path in sorted(folder.rglob("*.yaml")):
        if path.is_file() and (begin := path.read_bytes()[: len(BEGIN)]) and BEGIN.encode().startswith(begin):
            read_yaml(path)


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSONL file, one by one: what comes after the last that is asked for is not looked at. A last line
    without its end, which a kill cut off, is left out.

    Raises:
        UserError: another line is damaged.
    """
    try:
        lines = read_bytes(path).split(b"\n") if path.is_file() else []
    except OSError as error:
        raise damaged(path, f"it cannot be read ({reason_of(error)})", PUT_BACK) from None
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line.decode())
            if not isinstance(row, dict):
                raise BadJson("no object")
        except ValueError as error:
            if number == len(lines):
                return
            remedy = f"{PUT_BACK}, or delete that line, which leaves it out of all averages"
            raise damaged(path, f"line {number} is damaged ({error})", remedy) from None
        yield row


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
