"""The text of `--help`: tasks, config groups with their options, and examples, read from where they are defined."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from mmprune_train.components.declare import KEYS, KINDS, Component
from mmprune_train.components.registry import declared, find
from mmprune_train.config.docs import keys
from mmprune_train.config.typed import as_typed
from mmprune_train.storage.conf import conf_dir, default_options, options
from mmprune_train.tasks import ANYWHERE, TASKS, task_named

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
  mmprune pruner.vision.merge=prumerge --help            what a component does, and its parameters
  mmprune task=report +experiment=smoke                  one page over all its runs
  eval "$(mmprune --shell-completion install=bash)"      completion of keys and options

More: --hydra-help (flags of Hydra), --cfg job --resolve (with every value filled in).
Exit codes: 0 done, 2 wrong input (config, data, checkpoint; debug=true adds the traceback), 75 ended by a signal that
asks a run to save (USR1, USR2, TERM; the same command continues), 1 anything else."""


def usage(arguments: Sequence[str] = ()) -> str:
    """Everything `--help` prints: of one task, where `task=` is among the arguments, of one component, where a key that
    names one is, else of all.

    Raises UserError for an unknown task or component.
    """
    named = [argument.partition("=")[2] for argument in arguments if argument.startswith("task=")]
    if named:
        return task_usage(named[-1])
    for key, _, name in (argument.partition("=") for argument in arguments):
        if kind := KEYS.get("knee.method" if key.endswith("knee.method") else key):
            return component_usage(kind, key, name)
    return all_tasks()


def component_usage(kind: str, key: str, name: str) -> str:
    """What a component is and which parameters it has. Raises UserError for an unknown one."""
    one = find(kind, name, key)
    args = f"{key.removesuffix('.method')}.args" if kind == "budget" else f"{key}_args"
    lines = [f"{key}={name}: {KINDS[kind].told}{f' of package {one.package}' if one.package else ''}", ""]
    for paragraph in one.doc.split("\n\n"):
        lines += [*_indented(paragraph, 112), ""]
    if one.needs:
        lines += [f"Needs an encoder with {' and '.join(one.needs)}.", ""]
    lines += [f"Parameters, each {args}.NAME=VALUE:" if one.parameters else "It has no parameters."]
    for parameter in one.parameters:
        lines.append(f"  {parameter}")
        lines += _indented(parameter.doc, 108, 6)
    return "\n".join(lines)


def task_usage(name: str) -> str:
    """Where a task writes, what it does, the keys that it reads, an example."""
    task = task_named(name)
    lines = _indented(f"task={name} writes {task.writes}", 112)
    lines += ["", f"It does: {task.help}", "", "Keys it reads:"]
    known = {key.name: key for key in keys()}
    sections = [reads for reads in task.reads if known[reads].section and reads not in OWN]
    for reads in task.reads:
        below = [key for name, key in known.items() if reads in OWN and name.startswith(f"{reads}.")]
        for key in below or ([] if reads in sections else [known[reads]]):
            lines += [f"  {key.name}={as_typed(key.default)}", *_indented(key.says, 108, 6)]
    if sections:
        lines += _indented(f"and those of {', '.join(sections)} (--cfg job prints them)", 70, 2)
    if more := [reads for reads in task.without_ckpt if reads not in task.reads]:
        lines += _indented(
            f"without ckpt= also {', '.join(more)}: they say what is built, or which run is meant", 112, 2
        )
    lines.append(f"  as every task: +experiment=NAME, {', '.join(key for key in ANYWHERE if key != 'experiment')}")
    lines += ["", "Example:", f"  {task.example}", "", "mmprune --help lists all tasks and config groups."]
    return "\n".join(lines)


def _indented(text: str, width: int, by: int = 0) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=" " * by, subsequent_indent=" " * by, break_on_hyphens=False)


OWN = ("evaluate", "generate", "export", "bench", "calibrate", "plan", "report", "sweep")
"""Sections whose keys are told one by one."""


def all_tasks() -> str:
    """Tasks, config groups with their options, examples."""
    lines = ["Train LLaVA-style models with dynamic two-stage visual token pruning.", ""]
    lines += ["usage: mmprune [task=TASK] [+experiment=NAME] [GROUP=OPTION ...] [KEY=VALUE ...]"]
    lines += ["       (or python -m mmprune_train ...)", "", "Tasks:"]
    lines += [f"  {name:<12}{task.help}{' (default)' if name == 'train' else ''}" for name, task in TASKS.items()]
    lines += ["", "mmprune task=TASK --help says where a task writes and which keys it reads."]
    lines += ["", f"Config groups (* default), from {conf_dir()}:"]
    chosen = default_options()
    for group in GROUPS:
        names = [name + "*" if name in chosen.get(group, []) else name for name in options(group)]
        lines += textwrap.wrap("  ".join(names), width=100, initial_indent=f"  {group:<12}", subsequent_indent=" " * 14)
    lines += ["", "Components (* default) with their parameters, or a function of yours as module:function:"]
    for key, kind in KEYS.items():
        if ".recover." not in key:
            told = [_told(one, one.default_for == key) for one in declared()[kind].values()]
            lines += textwrap.wrap("  ".join(told), 100, initial_indent=f"  {key}  ", subsequent_indent=" " * 6)
    return "\n".join([*lines, "", _EXAMPLES])


def _told(one: Component, chosen: bool) -> str:
    names = ",".join(parameter.name for parameter in one.parameters)
    return f"{one.name}{'*' if chosen else ''}{f'({names})' if names else ''}"
