"""Files that users name: looked at before they are opened, and JSON of which anything may be expected."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
MOST_TEXT = 1 << 33
"""Bytes of a text that is read."""


def file_status(path: Path) -> os.stat_result:
    """Size and times of a file. Raises OSError for what is none, as all readers of users' files ask first: a pipe keeps
    its reader waiting, and a device may have no end."""
    try:
        status = path.stat()
    except ValueError:
        raise OSError("no file has such a path, with a NUL or half a character in it") from None
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for is_kind, name in KINDS if is_kind(status.st_mode)), "a device")
        raise OSError(f"{kind}, not a file")
    return status


def read_bytes(path: Path) -> bytes:
    """What a text file holds. Raises OSError as `check_text`."""
    check_text(path)
    return path.read_bytes()


def check_text(path: Path) -> None:
    """Raise OSError for what is no file, has more than `MOST_TEXT` bytes, or begins as no text does."""
    if (size := file_status(path).st_size) > MOST_TEXT:
        raise OSError(f"it has {size:,} bytes, at most {MOST_TEXT:,} are read")
    with path.open("rb") as file:
        if b"\0" in file.read(1 << 12):  # of which there may be any number where a file has holes
            raise OSError("it holds NUL bytes, as no text does")


def reason_of(error: BaseException) -> str:
    """What a library or the system has against a file, in a few words."""
    told = error.strerror if isinstance(error, OSError) else None
    return told or short(next(iter(str(error).strip().splitlines()), "")) or type(error).__name__


def short(text: str, most: int = 200) -> str:
    """A text of any length and content for one line of a message."""
    text = re.sub(r"[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]", lambda found: repr(found[0])[1:-1], text)
    text = text if len(text) <= most else f"{text[: most - 3]}..."
    return text.encode(errors="backslashreplace").decode()


class BadJson(ValueError):
    """A text is not JSON, or JSON that readers disagree about; says why."""


def parse_json(text: str | bytes, strict: bool = False) -> Any:
    """What a JSON text holds.

    Args:
        strict: refuse a key that an object has twice, of which readers keep the last, and NaN and infinity, which are
            not JSON.
    Raises:
        BadJson: also for what is nested too deeply and for numbers of more digits than Python reads.
    """
    try:
        return json.loads(text, **_STRICT) if strict else json.loads(text)
    except BadJson:
        raise
    except RecursionError:
        raise BadJson("not JSON that can be read: it is nested too deeply") from None
    except ValueError as error:
        raise BadJson(f"not JSON ({short(str(error).partition('; use sys.')[0])})") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        told = f"of {short(repr(found['id']), 80)} " if "id" in found else ""
        raise BadJson(f"an object {told}has the key {short(twice, 80)!r} twice ({short(str(found), 83)})")
    return found


def _no_number(name: str) -> Any:
    raise BadJson(f"not JSON ({name} is no number of it)")


_STRICT: dict[str, Any] = {"object_pairs_hook": _object, "parse_constant": _no_number}


def item_refused(text: str) -> int | None:
    """Number of the first item, from 0, for which strict `parse_json` refuses a list; None: the text is no list."""
    decoder, between, number = json.JSONDecoder(**_STRICT), re.compile(r"[\s,]*"), 0
    start = re.match(r"\s*\[\s*", text)
    end = start.end() if start else len(text)
    try:
        while end < len(text) and text[end] != "]":
            _, end = decoder.raw_decode(text, end)
            number, end = number + 1, between.match(text, end).end()  # type: ignore[union-attr]
    except (ValueError, RecursionError):
        return number
    return None
