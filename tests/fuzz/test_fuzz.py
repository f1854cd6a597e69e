"""Thousands of inputs that are broken, hostile or odd: each is taken, healed, or refused in words that name it.

`make test-fuzz` runs them all, `make test-fuzz ARGS="--fuzz-seed=7"` others, `ARGS="-k records --fuzz-case=12"` one.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fuzz.harness import Outcome, Warm, report

KINDS = {"records": (2000, 100), "images": (1000, 50), "overrides": (500, 10), "flips": (200, 5)}
"""Kind -> cases, and how many of them are one test."""
FEW = {"records": 20, "images": 20}
"""Kind -> cases of every `make test`."""


def bad(process: Warm, kind: str, seed: int, numbers: range) -> str:
    """What is told of cases of which some are bad; empty where none is."""
    outcomes: list[Outcome] = [process.run(seed, number) for number in numbers]
    told = report(outcomes, kind, seed)
    print(told)
    return told if any(outcome.how == "bad" for outcome in outcomes) else ""


def portions(kind: str) -> list[range]:
    cases, size = KINDS[kind]
    return [range(at, min(at + size, cases)) for at in range(0, cases, size)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "numbers" not in metafunc.fixturenames:
        return
    one = metafunc.config.getoption("--fuzz-case", None)
    cases = [(kind, part) for kind in KINDS for part in (portions(kind) if one is None else [range(one, one + 1)])]
    metafunc.parametrize(("kind", "numbers"), cases, ids=[f"{kind}-{part.start}" for kind, part in cases])


@pytest.mark.fuzz
def test_it_is_taken_healed_or_refused_in_words(
    kind: str, numbers: range, seed: int, warm: Callable[[str], Warm]
) -> None:
    assert not bad(warm(kind), kind, seed, numbers)


@pytest.mark.parametrize("kind", FEW)
def test_a_few_of_them(kind: str, warm: Callable[[str], Warm]) -> None:
    assert not bad(warm(kind), kind, 0, range(FEW[kind]))
