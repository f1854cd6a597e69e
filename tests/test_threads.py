"""Threads do not spin for long while they wait, unless the user says how they are to wait."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmprune_train.threads import OWN, SHORT_SPIN, spin_shortly

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("own", [{}, {"OMP_NUM_THREADS": "2"}])
def test_threads_spin_shortly_where_the_user_says_nothing(own: dict[str, str]) -> None:
    environment = dict(own)
    spin_shortly(environment, {"numpy"})
    assert environment == own | SHORT_SPIN


@pytest.mark.parametrize(
    ("own", "loaded"),
    [*(({name: "ACTIVE"}, "numpy") for name in OWN), ({"OMP_WAIT_POLICY": ""}, "numpy"), ({}, "torch")],
)
def test_what_the_user_set_and_a_torch_that_runs_are_left_alone(own: dict[str, str], loaded: str) -> None:
    environment = dict(own)
    spin_shortly(environment, {loaded})
    assert environment == own


def clean(**more: str) -> dict[str, str]:
    unset = (*OWN, "MAKEFLAGS", "MFLAGS")  # make's own hold what the tests' make was given
    return {name: value for name, value in os.environ.items() if name not in unset} | {"PYTHONPATH": str(ROOT)} | more


def test_the_command_line_says_it_before_torch_loads() -> None:
    code = "import mmprune_train.__main__, sys; assert 'torch' not in sys.modules; import torch"
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean(OMP_DISPLAY_ENV="verbose"), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "GOMP_SPINCOUNT = '2000'" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("own", "found"), [({}, "2000"), ({"GOMP_SPINCOUNT": "9"}, "9"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "")]
)
def test_make_says_it_to_the_tests(own: dict[str, str], found: str) -> None:
    rules = f"include {ROOT / 'Makefile'}\nshow:\n\t@echo waits=$$GOMP_SPINCOUNT\n"
    done = subprocess.run(
        ["make", "-s", "-f", "-", "show"], input=rules, env=clean(**own), capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == f"waits={found}", done.stderr
