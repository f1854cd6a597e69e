"""Where a question's picture is: a file of its own, or a cell of a table."""

from __future__ import annotations

import base64
import binascii
import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mmprune_train.errors import UserError

LONGEST_CELL = 1 << 30
"""Characters of a cell: a picture has more than the csv module allows by itself."""


def table_rows(lines: Iterable[str]) -> Iterator[list[str]]:
    """Cells of the rows of a TSV text; csv.Error for a broken one."""
    csv.field_size_limit(LONGEST_CELL)
    return csv.reader(lines, delimiter="\t", strict=True)


@dataclass(frozen=True)
class TablePicture:
    """A picture in base64 in a row of a TSV file, read when it is asked for, so that no table is held in memory."""

    file: Path
    start: int
    """Byte where the row begins, behind which the next one does at `stop`."""
    stop: int
    column: int
    line: int
    """Of the file, for messages."""
    part: int = 0
    """Of several pictures in the cell."""

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}"

    @property
    def name(self) -> str:
        return f"{self.file.name}, line {self.line}"

    def content(self) -> bytes:
        """The image file's bytes; UserError where the cell does not hold any."""
        with self.file.open("rb") as file:
            file.seek(self.start)
            text = file.read(self.stop - self.start).decode()
        (row,) = table_rows([text])
        cell = encoded_parts(row[self.column])[self.part]
        try:
            return base64.b64decode(cell, validate=True)
        except binascii.Error as error:
            raise UserError(f"{self}: the image is no base64 ({error}); get the file again") from None


Picture = Path | TablePicture


def encoded_parts(cell: str) -> list[str]:
    """The base64 texts of a cell: one, or those of a list as Python or JSON writes it."""
    if not cell.startswith("["):
        return [cell]
    return [part.strip().strip("'\"") for part in cell.strip("[] \n").split(",")]
