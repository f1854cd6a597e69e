"""The end of a run in the middle of it, in the process of the test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from mmprune_train.training.callbacks import MetricsWriter


class Killed(BaseException):
    """Not an Exception: nothing on the way may catch it and save something."""


@contextmanager
def killed_after(step: int) -> Iterator[None]:
    """What trains in here must die after that step's row is written."""
    write = MetricsWriter.on_step_end

    def die(self: MetricsWriter, trainer: Any, module: Any) -> None:
        write(self, trainer, module)
        if trainer.global_step == step:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(MetricsWriter, "on_step_end", die)
        yield
