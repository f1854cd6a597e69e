"""Without the libraries' remarks on what is meant so, and without their progress bars where there is no terminal."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator

import torch
from transformers.utils import logging as transformers_logging

LOGGERS = ("pytorch_lightning", "lightning_fabric", "lightning.fabric", "DeepSpeed")
EXPECTED = (
    ".*in eval mode at the start of training.*",  # the frozen vision tower
    ".*GPU available but not used.*",
    ".*`is_gradient_checkpointing` is deprecated.*",  # peft, of transformers
    ".*does not have many workers.*",
    ".*`srun` command is available.*",  # on a login node, or under torchrun in a job
    ".*Detected call of `lr_scheduler.step.*",  # where the very first step is not applied
    ".*LeafSpec.*",
    ".*each worker will save a shard.*",
    ".*torch.distributed..* is deprecated.*",  # deepspeed, of torch
)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Errors, and warnings that are not among `EXPECTED`, still come through."""
    if not torch.cuda.is_available():  # else DeepSpeed, which other libraries import, warns that it found no GPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), no_bars() if not sys.stderr.isatty() else contextlib.nullcontext():
            for message in EXPECTED:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """Without transformers' progress bars."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
