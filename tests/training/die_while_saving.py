"""`python die_while_saving.py STEP ARGUMENTS`: the command line, killed in the middle of writing STEP's checkpoint."""

from __future__ import annotations

import io
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

step = sys.argv.pop(1)
save = torch.save


def cut_off(content: Any, path: Any, *arguments: Any, **more: Any) -> None:
    if f"step-{int(step):08d}." not in str(path):
        save(content, path, *arguments, **more)
        return
    buffer = io.BytesIO()
    save(content, buffer)
    Path(path).write_bytes(buffer.getvalue()[: buffer.tell() // 2])
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    from mmprune_train.__main__ import main

    torch.save = cut_off  # type: ignore[assignment]
    main()
