"""The harness finds what it is there to find."""

from __future__ import annotations

from collections.abc import Iterator

import fuzz.harmful as harmful
import pytest
from fuzz.harness import Warm

FOUND = {
    "_accepts": ("accepted", ""),
    "_refuses": ("refused", "a.json: something is wrong; mend it"),
    "_takes_a_moment": ("accepted", ""),
    "_computes": ("bad", "more than 1 s of computing"),
    "_waits": ("bad", "nothing happened for 5 s"),
    "_takes_memory": ("bad", "GiB more than the normal"),
    "_breaks": ("bad", "ZeroDivisionError"),
    "_dies": ("bad", "ended by signal 11"),
    "_names_nothing": ("bad", "names none of a.json: something is wrong"),
    "_talks": ("bad", "a message of 4 lines"),
    "_finds": ("bad", "another result"),
}


@pytest.fixture(scope="module")
def process() -> Iterator[Warm]:
    with Warm("fuzz.harmful", cpu_seconds=1, wall_seconds=5.0, extra_bytes=100 << 20) as started:
        yield started


@pytest.mark.parametrize("number", range(len(FOUND)))
def test_what_is_bad_is_found(number: int, process: Warm) -> None:
    outcome = process.run(0, number)
    assert outcome.told == harmful.HARMFUL[number].__name__
    how, why = FOUND[outcome.told]
    assert outcome.how == how and why in outcome.why, outcome
