"""Work that other processes do, the readers of a DataLoader or the other ranks of a run. A UserError of theirs is
handed on as a value and raised here: raised there it would arrive wrapped in a traceback, or not at all."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, Dataset

from mmprune_train.errors import UserError

Item = TypeVar("Item")


def caught(work: Callable[[], Item]) -> Item | UserError:
    """What some work gives, or what the user did wrong."""
    try:
        return work()
    except UserError as error:
        return error


def told(found: Item | UserError) -> Item:
    """What `caught` work gave; raises what the user did wrong."""
    if isinstance(found, UserError):
        raise found
    return found


class _Read(Dataset[Any], Generic[Item]):
    def __init__(self, read: Callable[[Sequence[int]], Item]) -> None:
        self.read = read

    def __getitems__(self, indices: Sequence[int]) -> Item | UserError:
        return caught(lambda: self.read(indices))


def read_by_workers(
    read: Callable[[Sequence[int]], Item],
    batches: Iterable[list[int]],
    num_workers: int,
    ahead: int = 2,
    pin: bool = False,
) -> Iterator[Item]:
    """`read` of each batch of indices, in their order; here where there are no workers.

    Args:
        ahead: batches that each worker reads ahead.
        pin: into pinned memory.
    """
    loader = DataLoader(
        _Read(read),
        batch_sampler=batches,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        worker_init_fn=_outlive_signals,
        prefetch_factor=ahead if num_workers else None,
        pin_memory=pin,
    )
    return map(told, loader)


def _as_it_is(batch: Any) -> Any:
    return batch


def _outlive_signals(worker: int) -> None:
    """Keep a reader alive until its parent ends it: Slurm and torchrun send what asks a run to save and end to all its
    processes, and the running step still needs data."""
    for each in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(each, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS, which has neither of the two
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = os.getppid()

    def end_with_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the work."""

    rank: int = 0
    world: int = 1
    exchange: Callable[[Any], list[Any]] = lambda value: [value]
    """A picklable value of each rank -> the values of all, by rank; every rank must call it."""

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This rank's part of what all ranks know."""
        return items[self.rank :: self.world]

    def each(self, work: Callable[[], Item]) -> list[Item]:
        """What the ranks' work gave, by rank; a barrier, too.

        Where one fails all do, so that none waits for another that has stopped: by the first rank's UserError, else by
        a RuntimeError that names the rank, whose own error says more.
        """
        mine: Item | UserError | RuntimeError
        own: Exception | None = None
        try:
            mine = caught(work)
        except Exception as error:
            mine, own = RuntimeError(f"rank {self.rank} failed: {type(error).__name__}: {error}"), error
        found: list[Any] = self.exchange(mine)
        if own is not None:
            raise own
        for value in map(told, found):
            if isinstance(value, RuntimeError):
                raise value
        return found

    def all(self, part: Callable[[Sequence[Any]], Sequence[Item]], items: Sequence[Any]) -> list[Item]:
        """`part` of all items, each rank doing its share, in the order of the items."""
        results: list[Any] = [None] * len(items)
        for rank, found in enumerate(self.each(lambda: part(self.share(items)))):
            results[rank :: self.world] = found
        return results


ALONE = Ranks()
"""One process that shares the work with no other."""
