"""A benchmark in one TSV, as VLMEvalKit keeps them: a row a question, its picture in base64 in the row, a path, or the
index of the row that has it."""

from __future__ import annotations

import ast
import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mmprune_train.errors import UserError
from mmprune_train.evaluation.benchmarks.files import AGAIN
from mmprune_train.evaluation.pictures import Picture, TablePicture, encoded_parts, table_rows
from mmprune_train.storage.user_files import check_text, reason_of

IMAGE = "image"
LONGEST_INDEX = 64
"""Characters; an `image` that has more is a picture."""
NONE = frozenset({"", "nan", "none"})
"""What an empty cell may say, in lower case."""


@dataclass(frozen=True)
class Row:
    """A row without its picture's text."""

    cells: dict[str, str]
    images: tuple[Picture, ...]
    picture: str
    """Index of the row that holds the picture, or its path."""
    where: str

    def get(self, column: str) -> str:
        """Empty where there is no such column, or nothing in it."""
        cell = self.cells.get(column, "").strip()
        return "" if cell.lower() in NONE else cell

    def need(self, column: str) -> str:
        if not (cell := self.get(column)):
            raise UserError(f"{self.where}: there is nothing in column {column}; {AGAIN}")
        return cell

    @property
    def options(self) -> dict[str, str]:
        """A, B, ... up to the first that is empty."""
        found: dict[str, str] = {}
        for letter in "ABCDEFGHIJ":
            if not (text := self.get(letter)):
                break
            found[letter] = text
        return found

    @property
    def answers(self) -> tuple[str, ...]:
        """A list, as Python or JSON writes it, or one text."""
        cell = self.get("answer")
        if cell.startswith("[") and cell.endswith("]"):
            try:
                found = ast.literal_eval(cell)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                found = None
            if isinstance(found, list) and all(isinstance(one, str) for one in found):
                return tuple(found)
        return (cell,) if cell else ()


def read_rows(path: Path) -> list[Row]:
    """All rows of a table; UserError, with the line, for a broken one, or one without a picture where it names one."""
    held: dict[str, tuple[Picture, ...]] = {}
    rows = list[Row]()
    for cells, start, stop, line in _cells(path):
        where = f"{path}, line {line}"
        index, image = cells.get("index", str(len(rows))), cells.pop(IMAGE, "").strip()
        if len(image) > LONGEST_INDEX:
            column, parts = list(_header(path)).index(IMAGE), encoded_parts(image)
            held[index] = tuple(TablePicture(path, start, stop, column, line, part) for part in range(len(parts)))
            images, picture = held[index], index
        elif image in held:
            images, picture = held[image], image
        elif named := cells.get("image_path", "").strip():
            images, picture = tuple(_beside(path, one) for one in encoded_parts(named)), named
        elif image:
            raise UserError(f"{where}: image {image} is neither a picture nor the index of an earlier row; {AGAIN}")
        else:
            images, picture = (), index
        rows.append(Row(cells, images, cells.get("image_path", "") or picture, where))
    return rows


def _header(path: Path) -> list[str]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return next(table_rows(file), [])


def _cells(path: Path) -> Iterator[tuple[dict[str, str], int, int, int]]:
    """Each row by column, the bytes where it starts and stops, and its first line."""
    at = {"byte": 0, "line": 0}

    def counted(file: Iterator[bytes]) -> Iterator[str]:
        for line in file:
            at["byte"] += len(line)
            at["line"] += 1
            yield line.decode("utf-8-sig" if at["line"] == 1 else "utf-8")

    begun = 1
    try:
        check_text(path)
        with path.open("rb") as file:
            reader = table_rows(counted(file))
            header = next(reader, [])
            if "question" not in header:
                raise UserError(f"{path}, line 1: there is no column question (columns: {', '.join(header)[:200]})")
            start, begun = at["byte"], at["line"] + 1
            for cells in reader:
                if cells and len(cells) != len(header):
                    told = f"{len(cells)} cells for {len(header)} columns"
                    raise UserError(f"{path}, line {begun}: {told}; {AGAIN}")
                if cells:
                    yield dict(zip(header, cells, strict=True)), start, at["byte"], begun
                start, begun = at["byte"], at["line"] + 1
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason_of(error)}); {AGAIN}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}, line {begun}: {reason_of(error)}; {AGAIN}") from None


def _beside(table: Path, name: str) -> Path:
    """A picture that a table names: from its folder, or `images/NAME/` there as VLMEvalKit unpacks them."""
    places = (table.parent / name, table.parent / "images" / table.stem / name)
    return next((place for place in places if place.is_file()), places[0])
