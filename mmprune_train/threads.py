"""Threads of OpenMP spin for microseconds while they wait for each other, then sleep.

By default they spin for milliseconds: beside other work on the same cores a thread that waits keeps the one that it
waits for from running. The library reads this once, when torch loads it; processes started from here inherit it.
"""

from __future__ import annotations

from collections.abc import Container, MutableMapping

SHORT_SPIN = {"GOMP_SPINCOUNT": "2000"}
"""For libgomp, which torch's wheels bring. Our choice: to sleep at once (OMP_WAIT_POLICY=PASSIVE) is a little better
beside other work and a fifth to a third slower on an idle machine (experiments/throughput)."""
OWN = (*SHORT_SPIN, "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
"""Variables by which users say how their threads wait."""


def spin_shortly(environment: MutableMapping[str, str], loaded: Container[str]) -> None:
    """Ask for it, unless one of `OWN` is set or torch is among the `loaded` modules, when it is too late."""
    if "torch" not in loaded and not any(name in environment for name in OWN):
        environment.update(SHORT_SPIN)
