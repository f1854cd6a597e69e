"""Threads of OpenMP sleep while they wait for each other.

By default they spin, for milliseconds: beside other work on the same cores a thread that waits keeps the one that it
waits for from running. The library reads this once, when torch loads it; processes started from here inherit it.
"""

from __future__ import annotations

from collections.abc import Container, MutableMapping

PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}
OWN = (*PASSIVE, "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables by which users say how their threads wait."""


def sleep_while_waiting(environment: MutableMapping[str, str], loaded: Container[str]) -> None:
    """Ask for it, unless one of `OWN` is set or torch is among the `loaded` modules, when it is too late."""
    if "torch" not in loaded and not any(name in environment for name in OWN):
        environment.update(PASSIVE)
