"""One case in a process of its own: forked from one that has imported and warmed up, limited in time and memory.

A kind of cases is a module with `warm(root)`, called once; `plain(rng, folder, number)`, which makes one of
`PLAIN` cases where nothing is wrong; and `case(rng, folder, number)`. Nothing else decides what a case is.
"""

from __future__ import annotations

import importlib
import io
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mmprune_train.errors import UserError

CPU_SECONDS = 10
"""A case that computes for longer hangs."""
WALL_SECONDS = 40.0
"""So does one that waits for longer, also on a machine that is busy with other work."""
EXTRA_BYTES = 1 << 30
"""What a case may take above the normal."""
GUARD_BYTES = 4 << 30
"""Address space above that of the warm process: beyond it allocations fail, so that no case takes the machine along."""
LINES, CHARACTERS = 3, 1500
"""Of a message, at most."""
LIBRARIES = ["mmprune_train.__main__", "mmprune_train.tasks.train", "mmprune_train.training.run"]


@dataclass(frozen=True)
class Case:
    """What is tried."""

    told: str
    """What was changed, for people."""
    names: Sequence[str]
    """What a refusal must name one of: file, key or sample. Empty: anything."""
    run: Callable[[], str]
    """Says `accepted`, `healed`, or how else it went well. Raises UserError where it refuses, else what is wrong."""


@dataclass(frozen=True)
class Outcome:
    number: int
    told: str
    how: str
    """`accepted`, `healed`, `refused`, ...; `bad`."""
    why: str = ""
    """The refusal, or what is bad."""
    bytes: int = 0
    """Peak of the memory of the process."""
    seconds: float = 0.0
    """Of CPU time."""


Make = Callable[[random.Random, Path, int], Case]
"""Of a random state, a folder of its own, and the number of the case."""


class Fault(AssertionError):
    """Something that must not happen, in words."""


@dataclass
class Warm:
    """The process that cases are forked from. Limits can be made narrower for tests of this module."""

    module: str
    cpu_seconds: int = CPU_SECONDS
    wall_seconds: float = WALL_SECONDS
    extra_bytes: int = EXTRA_BYTES
    _process: Any = field(default=None, init=False)
    _connection: Any = field(default=None, init=False)

    def __enter__(self) -> Warm:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(LIBRARIES)
        self._connection, inner = context.Pipe()
        limits = (self.cpu_seconds, self.wall_seconds, self.extra_bytes)
        self._process = context.Process(target=_serve, args=(inner, self.module, limits), daemon=False)
        self._process.start()
        inner.close()
        if (fault := self._connection.recv()) is not None:
            raise RuntimeError(f"{self.module} does not warm up:\n{fault}")
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.join()

    def run(self, seed: int, number: int) -> Outcome:
        """The case `number` of a seed."""
        self._connection.send((seed, number))
        outcome: Outcome = self._connection.recv()
        return outcome


def report(outcomes: Sequence[Outcome], module: str, seed: int) -> str:
    """How many went how, and each bad one with the way to run it alone."""
    counts: dict[str, int] = {}
    for outcome in outcomes:
        counts[outcome.how] = counts.get(outcome.how, 0) + 1
    lines = [f"{module}, seed {seed}: " + ", ".join(f"{count} {how}" for how, count in sorted(counts.items()))]
    for bad in (outcome for outcome in outcomes if outcome.how == "bad"):
        lines.append(f"\n--fuzz-seed={seed} --fuzz-case={bad.number}: {bad.told}\n    {bad.why}")
    return "\n".join(lines)


def fault_of(message: str, names: Sequence[str]) -> str | None:
    """What is wrong with the words of a refusal; None: nothing."""
    lines, listed = message.splitlines(), re.match(r"(\d+) things that this run needs", message)
    if not message.strip() or len(lines) > (1 + LINES * int(listed[1]) if listed else LINES):
        return f"a message of {len(lines)} lines:\n{message}"
    if len(message) > CHARACTERS:
        return f"a message of {len(message)} characters: {message[:300]}"
    if "Traceback (most" in message:
        return f"a traceback:\n{message}"
    if names and not any(name in message for name in names):
        return f"a message that names none of {', '.join(names)}: {message}"
    return None


def command(*arguments: str) -> str:
    """The command line in this process: what it says on both outputs. UserError where it exits with 2; Fault for a
    traceback; SystemExit for another code."""
    from mmprune_train.__main__ import main

    sys.argv = ["mmprune", *arguments]
    said, wrong, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(said), redirect_stderr(wrong):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    text = said.getvalue() + wrong.getvalue()
    if "Traceback (most" in text:
        raise Fault(_brief(text))
    if re.search(r"\x1b|\x00", text):
        raise Fault(f"control characters on the terminal: {text[-500:]!r}")
    if code == 2:
        message = wrong.getvalue()
        raise UserError(message[message.find("error: ") :].removeprefix("error: ").strip())
    if code:
        raise SystemExit(f"exit code {code}: {wrong.getvalue().strip()[-500:]}")
    return text


def _serve(connection: Connection, name: str, limits: tuple[int, float, int]) -> None:
    """The warm process: forks, waits, ends what takes too long, cleans up."""
    os.environ["HYDRA_FULL_ERROR"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    root = Path(tempfile.mkdtemp(prefix="mmprune-fuzz-"))
    try:
        import torch

        torch.set_num_threads(1)
        module = importlib.import_module(name)
        module.warm(root)
        normal = _normal(module, root, limits)
        connection.send(None)
    except BaseException:
        shutil.rmtree(root, ignore_errors=True)
        connection.send(traceback.format_exc())
        return
    try:
        while True:
            seed, number = connection.recv()
            connection.send(_one(module, root, seed, number, limits, normal))
    except EOFError:
        pass
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _normal(module: Any, root: Path, limits: tuple[int, float, int]) -> int:
    """Bytes that the largest of the module's own unharmed cases takes."""
    outcomes = [_one(module, root, 0, number, (60, 120.0, 1 << 40), 0, module.plain) for number in range(module.PLAIN)]
    bad = [outcome for outcome in outcomes if outcome.how in ("bad", "refused")]
    assert not bad, f"an unharmed case fails: {bad}"
    return max(outcome.bytes for outcome in outcomes)


def _one(
    module: Any,
    root: Path,
    seed: int,
    number: int,
    limits: tuple[int, float, int],
    normal: int,
    make: Make | None = None,
) -> Outcome:
    cpu, wall, extra = limits
    work = root / "work"
    shutil.rmtree(root / "work", ignore_errors=True)
    work.mkdir()
    reader, writer = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        try:
            reader.close()
            os.setsid()
            resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
            _guard()
            rng = random.Random(f"{seed} {module.__name__} {number}")
            _try(lambda: (make or module.case)(rng, work, number), work, writer)
        finally:
            os._exit(0)
    writer.close()
    told, answer = "?", None
    try:
        if reader.poll(wall):
            told = reader.recv()
            answer = reader.recv() if reader.poll(wall) else None
            if answer is None:
                answer = ("bad", f"nothing happened for {wall:.0f} s", 0, 0.0)
    except EOFError:
        pass
    _end(child)
    _, status = os.waitpid(child, 0)
    if answer is None and os.WIFSIGNALED(status):
        number_of, hung = os.WTERMSIG(status), (signal.SIGXCPU, signal.SIGKILL)
        why = f"more than {cpu} s of computing" if number_of in hung else f"ended by signal {number_of}"
        answer = ("bad", why, 0, 0.0)
    how, why, peak, seconds = answer or ("bad", "no answer", 0, 0.0)
    if how != "bad" and peak > normal + extra:
        how, why = "bad", f"{(peak - normal) / 2**30:.2f} GiB more than the normal; it {how}: {why}"
    return Outcome(number, told, how, why, peak, seconds)


def _try(make: Callable[[], Case], work: Path, writer: Connection) -> None:
    os.chdir(work)
    os.environ["HOME"] = str(work)
    try:
        case = make()
    except BaseException as error:
        writer.send("a case that cannot be made")
        writer.send(("bad", _short(error), 0, 0.0))
        return
    writer.send(case.told)
    try:
        how, why = case.run(), ""
    except UserError as error:
        why = str(error)
        fault = fault_of(why, case.names)
        how, why = ("refused", why) if fault is None else ("bad", fault)
    except Fault as error:
        how, why = "bad", str(error)
    except BaseException as error:
        how, why = "bad", _short(error)
    writer.send((how, why, _peak(), time.process_time()))


def _short(error: BaseException) -> str:
    """Where an exception comes from, innermost last, and what it says."""
    frames = traceback.extract_tb(error.__traceback__)[1:]
    places = " > ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[-8:])
    return f"{type(error).__name__}: {str(error)[:400]}\n    {places}"


def _brief(text: str) -> str:
    """The same of a traceback that was printed."""
    places = [f"{Path(file).name}:{line}" for file, line in re.findall(r'File "([^"]+)", line (\d+)', text)]
    last = [line for line in text.splitlines() if line.strip() and not line.startswith(" ")]
    return f"a traceback: {' | '.join(last[-3:])[-500:]}\n    {' > '.join(places[-12:])}"


def _peak() -> int:
    """Bytes; of a forked process its own, from what it had at first."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _guard() -> None:
    if sys.platform.startswith("linux"):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + GUARD_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _end(child: int) -> None:
    """End a case's process group, its own children among it."""
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
