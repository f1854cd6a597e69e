"""Work that several processes share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from mmprune_train.errors import UserError

Item = TypeVar("Item")


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclass(frozen=True)
class _Failed:
    rank: int
    why: str


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the work."""

    rank: int = 0
    world: int = 1
    exchange: Callable[[Any], list[Any]] = _alone
    """A picklable value of each rank -> the values of all, by rank; every rank must call it."""

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This rank's part of what all ranks know."""
        return items[self.rank :: self.world]

    def each(self, work: Callable[[], Item]) -> list[Item]:
        """What the ranks' work gave, by rank; a barrier, too.

        Where one fails all do, so that none waits for another that has stopped: by the first rank's UserError, else by
        a RuntimeError that names the rank, whose own error says more.
        """
        mine: Item | UserError | _Failed
        own: Exception | None = None
        try:
            mine = work()
        except UserError as error:
            mine = error
        except Exception as error:
            mine, own = _Failed(self.rank, f"{type(error).__name__}: {error}"), error
        found: list[Any] = self.exchange(mine)
        if own is not None:
            raise own
        for value in found:
            if isinstance(value, UserError):
                raise value
            if isinstance(value, _Failed):
                raise RuntimeError(f"rank {value.rank} failed: {value.why}")
        return found

    def all(self, part: Callable[[Sequence[Any]], Sequence[Item]], items: Sequence[Any]) -> list[Item]:
        """`part` of all items, each rank doing its share, in the order of the items."""
        results: list[Any] = [None] * len(items)
        for rank, found in enumerate(self.each(lambda: part(self.share(items)))):
            results[rank :: self.world] = found
        return results
