"""The command line, run inside the tests' process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmprune_train.__main__ import main

Command = Callable[..., tuple[int, str, str]]


def steady(result: Any) -> Any:
    """A result without what a clock has said."""
    if not isinstance(result, dict):
        return [steady(value) for value in result] if isinstance(result, list) else result
    clocked = ("when", "phases", "s / question")
    return {key: steady(value) for key, value in result.items() if "second" not in key and key not in clocked}


@pytest.fixture
def mmprune(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Command:
    """`mmprune("task=evaluate", ...)`: exit code, stdout and stderr, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONSAFEPATH", "1")  # as `main` sets it, and not beyond the test

    def start(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mmprune", *arguments])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        return (code, *capfd.readouterr())

    return start
