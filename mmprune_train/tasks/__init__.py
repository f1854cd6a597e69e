"""What the command line can do: one module a task, found by name and imported only when it is run."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from mmprune_train.config.explain import unknown_name
from mmprune_train.errors import UserError

if TYPE_CHECKING:
    from mmprune_train.config.schema import Config

    Run = Callable[[Config], dict[str, Any] | float | None]


class Task(NamedTuple):
    where: str
    """`module:function`; the function takes the Config and returns what a sweeper may optimise."""
    help: str
    """One line for `--help`."""


TASKS = {
    "train": Task(
        "mmprune_train.tasks.train:run", "run the experiment's stages in order; continues an interrupted run"
    ),
    "prepare": Task("mmprune_train.tasks.prepare:run", "get and convert the data and weights an experiment needs"),
    "plan": Task(
        "mmprune_train.tasks.plan:run", "tokens, FLOPs, memory, hours and disk of a run, before it is started"
    ),
    "calibrate": Task(
        "mmprune_train.tasks.calibrate:run", "tokens each budget would keep of a sample, and the parameter for a target"
    ),
    "evaluate": Task("mmprune_train.tasks.evaluate:run", "generate answers and score them (ckpt=FOLDER)"),
    "generate": Task(
        "mmprune_train.tasks.generate:run", "answer one question about images (ckpt=FOLDER generate.images=[FILE])"
    ),
    "bench": Task(
        "mmprune_train.tasks.bench:run",
        "seconds, memory, FLOPs of a step, beside Hugging Face (bench.pruners=[NAME,...])",
    ),
    "inspect": Task(
        "mmprune_train.tasks.inspect:run", "draw what both stages kept (ckpt=FOLDER generate.images=[FILE])"
    ),
    "report": Task("mmprune_train.tasks.report:run", "one HTML page over runs or a sweep (report.runs=[FOLDER,...])"),
}
"""Every task by the name that `task=` takes. A new task is one line here and one module beside this file."""


def find_task(name: str) -> Run:
    """The function of a task, importing its module. Raises UserError for an unknown name."""
    if name not in TASKS:
        raise UserError(unknown_name("task", name, TASKS))
    module, function = TASKS[name].where.split(":")
    return getattr(importlib.import_module(module), function)
