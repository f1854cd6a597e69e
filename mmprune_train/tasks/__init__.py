"""What the command line can do: one module a task, found by name and imported only when it is run."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple

from mmprune_train.config.schema import DataConfig
from mmprune_train.config.typed import key_of
from mmprune_train.errors import UserError, unknown_name

if TYPE_CHECKING:
    from mmprune_train.config.command import Command
    from mmprune_train.config.schema import Config

    Run = Callable[[Config, Command], dict[str, Any] | float | None]

ANYWHERE = ("task", "experiment", "experiment_name", "run_id", "runs_dir", "seed", "trust_components", "debug")
"""Keys that every task reads."""
STARTS = ("init_from", "init_adapters")
BUILT = ("encoder", "llm", "projector", "knee", "pruner", "data", "stage", "stages", "peft", *STARTS)
TRAINED = (*BUILT, "strategy", "optim", "logger", "trainer", "evaluate", "restart")
COMPUTED = ("trainer.accelerator", "trainer.precision", "trainer.attention", "trainer.vision_chunk")
DATA_KEYS = {item.name for item in fields(DataConfig)}
ORIENTATION = "data.exif_orientation"
"""Of the images that any task reads; no option of the group sets it."""
DATA = ("data.name", "data.root", "data.source", "data.how_to_get", "data.outside_images", "data.instruct")
LOADED = ("ckpt", "stages", "pruner", "knee", "encoder.text", "encoder.path", "llm.path", ORIENTATION)
ASKED = (*LOADED, *COMPUTED)
STEPS = (*COMPUTED, "trainer.logits_chunk", "trainer.compile", "trainer.num_workers")
HERE = "in the run directory that ckpt= names, else in this config's"
QUESTION = ("generate.images", "generate.question", "generate.question_file")


class Task(NamedTuple):
    help: str
    """One line for `--help`."""
    writes: str
    """What it writes, and where."""
    reads: tuple[str, ...]
    """Keys, or sections of keys, that it reads beside `ANYWHERE` (and `sweep`, where there is one)."""
    without_ckpt: tuple[str, ...] = ()
    """More that it reads where `ckpt=` is not given: what builds the model, or finds this config's own run."""
    example: str = ""


TASKS = {
    "train": Task(
        "run the experiment's stages in order; continues an interrupted run",
        "result.json, manifest.json, evaluate/ and a folder a stage, in runs/EXPERIMENT/RUN_ID",
        TRAINED,
        example="mmprune +experiment=demo pruner.language.layer=3",
    ),
    "prepare": Task(
        "get and convert the data and weights an experiment needs",
        "data and weights to this project's cache, prepare/result.json to the run directory of the training command",
        TRAINED,
        example="mmprune task=prepare +experiment=demo",
    ),
    "plan": Task(
        "tokens, FLOPs, memory, hours and disk of a run, before it is started",
        "plan/result.json, in the run directory of the training command",
        ("plan", *TRAINED),
        example="mmprune task=plan +experiment=llava7b_twostage plan.device=a100_80gb",
    ),
    "calibrate": Task(
        "tokens each budget would keep of a sample, and the parameter for a target",
        f"calibrate/ (result.json, budgets.png, presets), {HERE}",
        ("calibrate", *ASKED, *DATA, "data.pretrain", "stage"),
        TRAINED,
        "mmprune task=calibrate +experiment=demo calibrate.target=0.22",
    ),
    "evaluate": Task(
        "generate answers and score them (ckpt=FOLDER)",
        "evaluate/ (result.json, predictions.jsonl, table.md, table.tex; with evaluate.name=NAME evaluate-NAME/, with "
        "another pruner evaluate-PRUNER/, with several evaluate-pruners/, with evaluate.benchmarks=[NAME,...] "
        f"evaluate-benchmarks/), {HERE}",
        ("evaluate", *ASKED, "trainer.devices", "trainer.num_nodes", *DATA, "data.evaluate", "data.blind"),
        (*BUILT, "strategy", "optim", "trainer"),
        "mmprune task=evaluate ckpt=runs/demo/RUN_ID data.evaluate.annotations=held_out.json evaluate.name=held_out",
    ),
    "generate": Task(
        "answer one question about images (ckpt=FOLDER generate.images=[FILE])",
        f"generate/ (answers.jsonl, a line a question; result.json, the last), {HERE}",
        (*QUESTION, "generate.max_new_tokens", *ASKED),
        example="mmprune task=generate ckpt=runs/demo/RUN_ID generate.images=[photo.png] "
        'generate.question="what\'s in it, a (red) shape?"',
    ),
    "export": Task(
        "write a model for others (ckpt=FOLDER export.out=FOLDER): Hugging Face, PEFT or LLaVA's own layout",
        f"export.out (weights, configs, tokenizer, a model card), and export/ (result.json), {HERE}",
        ("export", *LOADED, "encoder", "llm", "projector"),
        example="mmprune task=export ckpt=runs/demo/RUN_ID export.out=my_model export.dtype=bf16",
    ),
    "bench": Task(
        "seconds, memory, FLOPs of a step, beside Hugging Face (bench.pruners=[NAME,...])",
        f"bench/ (result.json, bench.png), {HERE}",
        ("bench", *LOADED, *DATA, "data.pretrain", "stage", "peft", *STEPS),
        BUILT,
        "mmprune task=bench +experiment=throughput bench.pruners=[none,twostage,fastv]",
    ),
    "inspect": Task(
        "draw what both stages kept (ckpt=FOLDER generate.images=[FILE])",
        f"inspect/ (pruning.png, result.json; earlier ones move to inspect.old1), {HERE}",
        (*QUESTION, *ASKED),
        example="mmprune task=inspect ckpt=runs/demo/RUN_ID generate.images=[photo.png]",
    ),
    "doctor": Task(
        "what this machine offers, what it lacks and why; a short self-test on each device",
        "doctor/result.json, in the run directory of the training command",
        ("llm", "strategy", "logger", "trainer"),
        example="mmprune task=doctor llm=smollm2_135m",
    ),
    "report": Task(
        "one HTML page over runs or a sweep (report.runs=[FOLDER,...])",
        "report/ (report.html, result.json), in the one folder given, else the experiment's, or report.output=",
        ("report", "sweep"),
        example="mmprune task=report +experiment=smoke",
    ),
}
"""Every task by the name that `task=` takes. A new task is one entry here and one module beside this file."""


def task_named(name: str) -> Task:
    """Raises UserError for an unknown name."""
    if name not in TASKS:
        raise UserError(unknown_name("task", name, TASKS))
    return TASKS[name]


def find_task(name: str) -> Run:
    """The function of a task, importing its module; it returns what a sweeper may optimise."""
    return importlib.import_module(f"{__name__}.{name}").run


def unread(name: str, overrides: Sequence[str], sweeping: bool = False) -> list[str]:
    """Those overrides whose keys the task does not read, so that they would change nothing.

    Args:
        overrides: as they were typed; what an experiment sets is not judged.
        sweeping: whether this is a sweep, or a job of one.
    """
    task, given = task_named(name), [key_of(override) for override in overrides]
    known = (*ANYWHERE, *task.reads, *(() if "ckpt" in given else task.without_ckpt), *(("sweep",) if sweeping else ()))
    return [override for key, override in zip(given, overrides, strict=True) if not _covers(known, key)]


def check_keys(name: str, command: Command) -> None:
    """Raise UserError for an override that the task does not read."""
    for override in unread(name, command.overrides, command.sweeping):
        raise UserError(f"{override}: {_no_effect(name, key_of(override))}")


def _covers(known: Sequence[str], key: str) -> bool:
    """Whether one of the known keys is the key, holds it, or lies in it: a group's option sets what is below it."""
    if key.startswith("data.") and key.split(".")[1] not in DATA_KEYS:
        key = "data.pretrain"  # samples of a further training stage
    return any(
        key == one or key.startswith(f"{one}.") or (one.startswith(f"{key}.") and one != ORIENTATION) for one in known
    )


def _no_effect(name: str, key: str) -> str:
    where = " where ckpt= is given" if _covers(TASKS[name].without_ckpt, key) else ""
    readers = [other for other, task in TASKS.items() if _covers((*task.reads, *task.without_ckpt), key)]
    if key.split(".")[0] == "sweep":
        readers.append("every sweep (-m)")
    more = "; the weights that training starts from are init_from=PATH" if key == "ckpt" else ""
    others = [reader for reader in readers if reader != name]
    read = f"{', '.join(others)} {'do' if len(others) > 1 else 'does'}" if others else "no other task does"
    return f"task={name} does not read {key}{where}, so it would change nothing; leave it out ({read}){more}"
