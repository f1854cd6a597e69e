"""What must be found bad: a kind of cases that is wrong in every way that the harness looks for."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from fuzz.harness import Case, Fault

from mmprune_train.errors import UserError

PLAIN = 1


def warm(root: Path) -> None:
    """There is nothing to prepare."""


def plain(rng: random.Random, folder: Path, number: int) -> Case:
    """Nothing at all."""
    return Case("nothing", [], lambda: "accepted")


def case(rng: random.Random, folder: Path, number: int) -> Case:
    """The one of that number."""
    return Case(HARMFUL[number].__name__, ["a.json"], HARMFUL[number])


def _accepts() -> str:
    return "accepted"


def _refuses() -> str:
    raise UserError("a.json: something is wrong; mend it")


def _computes() -> str:
    while True:
        pass


def _waits() -> str:
    subprocess.run(["sleep", "100"], check=True)
    return "accepted"


def _takes_memory() -> str:
    return f"accepted {len(bytearray(300 << 20))}"


def _breaks() -> str:
    return str(1 / 0)


def _dies() -> str:
    import ctypes

    return str(ctypes.string_at(0))


def _names_nothing() -> str:
    raise UserError("something is wrong")


def _talks() -> str:
    raise UserError("a.json\n" * 4)


def _finds() -> str:
    raise Fault("another result")


def _takes_a_moment() -> str:
    time.sleep(0.1)
    return "accepted"


HARMFUL: tuple[Callable[[], str], ...] = (
    _accepts, _refuses, _takes_a_moment, _computes, _waits, _takes_memory, _breaks, _dies, _names_nothing, _talks,
    _finds,
)  # fmt: skip
