"""Official files looked for under a folder and read, with the file and the line in every error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmprune_train.errors import NotHere, UserError
from mmprune_train.storage.user_files import BadJson, parse_json, read_bytes, reason_of, short

AGAIN = "get the file again"


@dataclass(frozen=True)
class Folder:
    """Where a benchmark's files may be: a folder of its own in `root`, or `root` itself."""

    root: Path
    names: tuple[str, ...]
    """Of its own folder, as LLaVA's `playground/data/eval` and its site call it."""

    @property
    def places(self) -> list[Path]:
        return [*(self.root / name for name in self.names if (self.root / name).is_dir()), self.root]

    def find(self, *names: str) -> Path | None:
        """The first that is there of these files or folders, each a path from one of the places."""
        return next((place / name for name in names for place in self.places if (place / name).exists()), None)

    def need(self, *names: str) -> Path:
        """`find`; NotHere with the name that is usual."""
        if (found := self.find(*names)) is None:
            raise NotHere(f"there is no {names[0]} in {' or '.join(map(str, self.places))}")
        return found

    def images(self, *names: str) -> Path:
        """The folder of images, where it is usual if it is not there."""
        return self.find(*names) or self.places[0] / names[0]


class Entry:
    """An object of a file, whose values are asked for by key and type."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, Mapping):
            raise UserError(f"{where}: an object is expected, found {type(values).__name__}; {AGAIN}")
        self.values, self.where = values, where

    def text(self, *keys: str) -> str:
        """The value of the first key that is there, numbers as text."""
        return str(self.of(*keys, kinds=(str, int)))

    def of(self, *keys: str, kinds: tuple[type, ...]) -> Any:
        key = next((key for key in keys if key in self.values), None)
        if key is None:
            raise UserError(f"{self.where}: there is no key {' or '.join(keys)}; {AGAIN}")
        value = self.values[key]
        if not isinstance(value, kinds) or isinstance(value, bool):
            told = " or ".join(kind.__name__ for kind in kinds)
            raise UserError(f"{self.where}: {key} is a {type(value).__name__}, not a {told}; {AGAIN}")
        return value

    def list_of(self, key: str) -> list[Entry]:
        return [Entry(one, f"{self.where}, {key}[{n}]") for n, one in enumerate(self.of(key, kinds=(list,)))]

    def texts(self, key: str) -> list[str]:
        found = self.of(key, kinds=(list,))
        if not all(isinstance(one, str | int | float) for one in found):
            raise UserError(f"{self.where}: {key} is no list of texts; {AGAIN}")
        return [str(one) for one in found]

    def numbers(self, key: str, count: int) -> list[float]:
        found = self.of(key, kinds=(list,))
        if len(found) != count or not all(isinstance(one, int | float) for one in found):
            raise UserError(f"{self.where}: {key} is no list of {count} numbers; {AGAIN}")
        return [float(one) for one in found]


def read_json(path: Path) -> Any:
    """What a JSON file holds; the error of a broken one has the line."""
    try:
        return parse_json(_text(path))
    except BadJson as error:
        raise UserError(f"{path}: {error}; {AGAIN}") from None


def entries(path: Path) -> Iterator[Entry]:
    """Objects of a JSON list, or of JSON lines, whatever the file's name ends with: POPE's `.json` has lines."""
    text = _text(path)
    if text.lstrip()[:1] == "[":
        try:
            found = parse_json(text)
        except BadJson as error:
            raise UserError(f"{path}: {error}; {AGAIN}") from None
        yield from (Entry(one, f"{path}[{number}]") for number, one in enumerate(found))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield Entry(parse_json(line), f"{path}, line {number}")
            except BadJson as error:
                raise UserError(f"{path}, line {number}: {error}; {AGAIN}") from None


def by_key(path: Path) -> dict[str, Entry]:
    """Objects of a JSON object, by key."""
    return {
        key: Entry(one, f"{path}[{short(key, 80)}]") for key, one in Entry(read_json(path), str(path)).values.items()
    }


def lines(path: Path) -> list[str]:
    """Without line breaks; other characters at which Unicode breaks lines (U+2028, U+0085) may stand in one."""
    return _text(path).split("\n")


def _text(path: Path) -> str:
    try:
        return read_bytes(path).decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason_of(error)}); {AGAIN}") from None
    except UnicodeDecodeError as error:
        line = read_bytes(path)[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8 ({error.reason}); {AGAIN}") from None
