"""What the user did wrong comes out of other processes in one line, whichever kind of process it was."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import pytest

from mmprune_train.errors import NotHere, UserError
from mmprune_train.workers import Ranks, read_by_workers

SAYS = "images/3.png is missing; put it back"


def read(indices: Sequence[int]) -> list[int]:
    if 3 in indices:
        raise NotHere(SAYS)
    return [10 * index for index in indices]


@pytest.mark.parametrize("workers", [0, 2])
def test_readers_hand_on_what_they_read_and_what_is_wrong(workers: int) -> None:
    batches = [[0, 1], [2], [4], [3, 5], [6]]
    found = read_by_workers(read, batches, workers)
    assert [next(found) for _ in range(3)] == [[0, 10], [20], [40]]
    with pytest.raises(UserError) as caught:
        next(found)
    assert type(caught.value) is NotHere and str(caught.value) == SAYS


def rank_of_two(pipe: Connection, rank: int, work: Callable[[], Any]) -> None:
    """One of two processes: what its `each` gives or raises goes into the pipe, as do its messages to the other."""

    def exchange(value: Any) -> list[Any]:
        pipe.send(value)
        return pipe.recv()

    try:
        pipe.send(Ranks(rank, 2, exchange).each(work))
    except Exception as error:
        pipe.send((type(error).__name__, str(error)))


def fail_by(error: Exception) -> Callable[[], Any]:
    def work() -> Any:
        raise error

    return work


@pytest.mark.parametrize(
    ("works", "ends"),
    [
        ((lambda: "a", lambda: "b"), [["a", "b"]] * 2),
        ((lambda: "a", fail_by(UserError(SAYS))), [("UserError", SAYS)] * 2),
        ((fail_by(UserError(SAYS)), fail_by(UserError("other"))), [("UserError", SAYS)] * 2),
        ((lambda: 1, fail_by(KeyError("k"))), [("RuntimeError", "rank 1 failed: KeyError: 'k'"), ("KeyError", "'k'")]),
    ],
    ids=["both", "one", "first", "ours"],
)
def test_ranks_end_together_by_the_same_line(works: tuple[Callable[[], Any], ...], ends: list[Any]) -> None:
    forked, here = multiprocessing.get_context("fork"), []
    for rank, work in enumerate(works):
        ours, theirs = forked.Pipe()
        forked.Process(target=rank_of_two, args=(theirs, rank, work), daemon=True).start()
        here.append(ours)
    told = [pipe.recv() for pipe in here]
    for pipe in here:
        pipe.send(told)
    assert [pipe.recv() for pipe in here] == ends
