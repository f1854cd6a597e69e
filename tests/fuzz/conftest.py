"""Which cases are run, and the processes that they are forked from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from fuzz.harness import Warm


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-seed", type=int, default=0, help="other cases than those of seed 0")
    parser.addoption("--fuzz-case", type=int, default=None, help="one case alone, by the number that a failure tells")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--fuzz-seed", 0))


@pytest.fixture(scope="session")
def warm() -> Iterator[Callable[[str], Warm]]:
    """The process that cases of a kind are forked from: one at a time, kept until another kind is asked for."""
    with ExitStack() as stack:
        kept: dict[str, Warm] = {}

        def get(kind: str) -> Warm:
            if kind not in kept:
                kept.clear()
                stack.close()
                kept[kind] = stack.enter_context(Warm(f"fuzz.{kind}"))
            return kept[kind]

        yield get
