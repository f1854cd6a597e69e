"""`task=doctor`: what this machine offers a run, what it lacks and why, and whether a training step works on it."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from mmprune_train.config.command import Command
from mmprune_train.config.identity import run_dir
from mmprune_train.config.schema import Config
from mmprune_train.doctor import backends, machine
from mmprune_train.doctor.machine import Ask, Note
from mmprune_train.reporting.tables import table
from mmprune_train.storage.files import write_json

TEST = "self-test"
SECTIONS: dict[str, Callable[[Config], dict[str, Ask]]] = {
    "versions": machine.versions,
    "processor": machine.processor,
    "GPUs": machine.gpus,
    "precision": backends.precision,
    "attention": backends.attention,
    "loss and adapters": backends.losses,
    "strategies": backends.strategies,
    "DeepSpeed's operators": backends.operators,
    "loggers and accounts": backends.loggers,
    "disk": machine.disk,
    "limits and environment": machine.limits,
    TEST: backends.self_test,
}
"""In the order of the page; the self-test last."""


class Failure(Note):
    """What went wrong in finding a row."""


def run(config: Config, command: Command = Command()) -> dict[str, Any]:
    """Write `doctor/result.json` to the run directory, section by section; SystemExit with code 1 where the self-test
    fails."""
    result: dict[str, Any] = {"sections": {}, "failed": []}
    file = run_dir(config) / "doctor" / "result.json"

    def save() -> str:
        write_json(file, result)
        return str(file)

    saved = ""
    for title, rows_of in SECTIONS.items():
        rows = dict(examined(title, rows_of, config))
        told = [["!" if isinstance(says, Note) else "", name, str(says)] for name, says in rows.items()]
        print(f"{table(told, ['', title, ''])}\n", flush=True)
        result["sections"][title] = {
            name: {"says": str(says), "note": isinstance(says, Note)} for name, says in rows.items()
        }
        if title == TEST:
            result["failed"] = [name for name, says in rows.items() if isinstance(says, Failure)]
        saved = attempt(save, config.debug)
    print(f"result.json {saved}" if isinstance(saved, Failure) else saved, flush=True)
    if result["failed"]:
        print(f"error: a training step does not work here: {', '.join(result['failed'])} (see above)", file=sys.stderr)
        raise SystemExit(1)
    return result


def examined(title: str, rows_of: Callable[[Config], dict[str, Ask]], config: Config) -> Iterator[tuple[str, str]]:
    """Each row of a section and what it says."""
    asks: dict[str, Ask] = {}

    def name_rows() -> str:
        asks.update(rows_of(config))
        return ""

    if failure := attempt(name_rows, config.debug):
        yield title, failure
    for name, ask in asks.items():
        yield name, attempt(ask, config.debug)


def attempt(ask: Ask, debug: bool = False) -> str:
    """What a row says, or how finding it failed, in a line. `debug`: with a traceback on standard error."""
    try:
        with _hushed():
            return ask()
    except (Exception, SystemExit) as error:  # a library may end the process for what is broken in it alone
        if debug:
            traceback.print_exc()
        lines = str(error).strip().splitlines()
        return Failure(f"failed: {type(error).__name__}{f': {lines[0]}' if lines else ''}")


def _hushed() -> AbstractContextManager[None]:
    try:
        from mmprune_train.quiet import quiet
    except Exception:
        return nullcontext()
    return quiet()
