"""How far a long piece of work is."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from operator import length_hint
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress(
    items: Iterable[Item], title: str, unit: str = "batches", lines: int = 10, total: int | None = None
) -> Iterator[Item]:
    """A bar on a terminal, about `lines` plain lines elsewhere; `total` for items that have no length."""
    if sys.stderr.isatty():
        yield from tqdm(items, desc=title, total=total)
        return
    count = length_hint(items) if total is None else total
    every = max(1, -(-count // lines))
    for index, item in enumerate(items, 1):
        yield item
        if index % every == 0 or index == count:
            print(f"{title} {index}/{count} {unit}", flush=True)
