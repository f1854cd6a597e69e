"""The command line in a process forked from one that has imported the libraries: a start in seconds, many times."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

LIBRARIES = ["mmprune_train.__main__", "mmprune_train.tasks.train", "mmprune_train.training.run"]


def start(arguments: list[str], log: Path, dies_while_saving: int | None = None) -> BaseProcess:
    """Args:
    dies_while_saving: the step whose checkpoint is cut off by a SIGKILL in the middle of a file.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    process = context.Process(target=_run, args=(arguments, log, dies_while_saving), daemon=True)
    process.start()
    return process


def _run(arguments: list[str], log: Path, dies_while_saving: int | None) -> None:
    import torch

    from mmprune_train.__main__ import main

    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    if dies_while_saving is not None:
        _cut_off(f"step-{dies_while_saving:08d}.")
    sys.argv = ["mmprune", *arguments]
    main()


def _cut_off(name: str) -> None:
    import torch

    save = torch.save

    def half(content: Any, path: Any, *arguments: Any, **more: Any) -> None:
        if name not in str(path):
            save(content, path, *arguments, **more)
            return
        buffer = io.BytesIO()
        save(content, buffer)
        Path(path).write_bytes(buffer.getvalue()[: buffer.tell() // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half
