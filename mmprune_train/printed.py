"""What is printed: without secrets, and without what a terminal would obey instead of show."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmprune_train.storage.secrets import masked

_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but for tab and newline, those that turn the direction of writing, and halves of characters."""
_BAR = re.compile(r"\r|\n*(?:\x1b\[A)*$")
"""How a progress bar begins, or moves to its line and back: on a terminal alone, and nothing else in that text."""


def harmless(text: str) -> str:
    r"""The text with `\x1b` written out, and whatever else a terminal would obey."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), masked(text))


class Printed:
    """A stream whose texts are made harmless."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        bar = _BAR.match(text) if self.stream.isatty() else None
        begin = bar.end() if bar else 0
        with self._named():
            self.stream.write(text[:begin] + harmless(text[begin:]))
        return len(text)

    def flush(self) -> None:
        with self._named():
            self.stream.flush()

    @contextmanager
    def _named(self) -> Iterator[None]:
        """An error of the system (a full disk, a reader that has ended) says which stream it is of, as of any file."""
        try:
            yield
        except OSError as error:
            error.filename = error.filename or getattr(self.stream, "name", None)
            raise

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def harmless_output() -> Iterator[None]:
    """While this lasts, all that is printed is harmless; a stream that is closed stays None. It may be entered again
    inside, by whom has put streams of its own around those that are there."""
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (stream and Printed(stream) for stream in (out, err))  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, err
