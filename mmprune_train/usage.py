"""The text of `--help`: tasks, config groups with their options, and examples, read from where they are defined."""

from __future__ import annotations

import textwrap

from mmprune_train.config.paths import conf_dir, default_options, options
from mmprune_train.tasks import TASKS

GROUPS = (
    "experiment", "encoder", "llm", "projector", "pruner", "knee", "data", "stage", "strategy", "peft", "optim",
    "logger", "trainer", "sweep",
)  # fmt: skip
"""In the order in which a newcomer needs them."""

_EXAMPLES = """\
Examples:
  mmprune +experiment=demo                               train small real models, then evaluate
  mmprune +experiment=smoke knee=max_chord               another option of a group
  mmprune +experiment=demo pruner.language.layer=3       another value of a key
  mmprune +experiment=demo logger=[wandb,csv]            several loggers
  mmprune task=evaluate +experiment=demo ckpt=runs/demo/RUN_ID
  mmprune +experiment=llava7b_twostage --cfg job         print the whole config, run nothing
  mmprune -m +experiment=smoke knee=kneedle,max_chord    a sweep; +sweep=layer_x_knee is a ready one
                                                         (hydra/launcher=submitit_slurm: a Slurm array)
  mmprune task=report +experiment=smoke                  one page over all its runs
  eval "$(mmprune --shell-completion install=bash)"      completion of keys and options

More: --hydra-help (flags of Hydra), --cfg job --resolve (with every value filled in).
Exit codes: 0 done, 2 wrong input (config, data, checkpoint; debug=true adds the traceback), 75 ended by a signal that
asks a run to save (USR1, USR2, TERM; the same command continues), 1 anything else."""


def usage() -> str:
    """Everything `--help` prints."""
    lines = ["Train LLaVA-style models with dynamic two-stage visual token pruning.", ""]
    lines += ["usage: mmprune [task=TASK] [+experiment=NAME] [GROUP=OPTION ...] [KEY=VALUE ...]"]
    lines += ["       (or python -m mmprune_train ...)", "", "Tasks:"]
    lines += [f"  {name:<12}{task.help}{' (default)' if name == 'train' else ''}" for name, task in TASKS.items()]
    lines += ["", f"Config groups (* default), from {conf_dir()}:"]
    chosen = default_options()
    for group in GROUPS:
        names = [name + "*" if name in chosen.get(group, []) else name for name in options(group)]
        lines += textwrap.wrap("  ".join(names), width=100, initial_indent=f"  {group:<12}", subsequent_indent=" " * 14)
    return "\n".join([*lines, "", _EXAMPLES])
