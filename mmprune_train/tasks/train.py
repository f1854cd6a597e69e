"""`task=train`: the experiment's stages in order, then the result table. The same command continues a run."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmprune_train.config.checks import check_stage_names
from mmprune_train.config.command import Command
from mmprune_train.config.compose import config_from_file
from mmprune_train.config.identity import run_dir, without_effect
from mmprune_train.config.schema import Config
from mmprune_train.config.task_schema import OF_BENCHMARKS
from mmprune_train.data.sources import data_root
from mmprune_train.errors import NotFinite, UserError
from mmprune_train.reporting.text import result_text
from mmprune_train.storage.assets import sha256_of
from mmprune_train.storage.locks import alone_in
from mmprune_train.training.cluster import is_next_turn, join, rank_here
from mmprune_train.training.rundir import RunDirectory, discard_unstarted, open_run
from mmprune_train.training.sources import check_sources, told

if TYPE_CHECKING:
    from mmprune_train.training.preemption import Preemption


def run(config: Config, command: Command = Command()) -> dict[str, Any]:
    """Train what is not yet trained; returns the run's result.

    Raises Preempted, with the exit code, where a signal asks the run to end.
    """
    check_stage_names(config)
    if config.restart and is_next_turn():
        config = replace(config, restart=False)  # this very command has made the run that it would move aside
    main = rank_here(config.trainer.devices) == 0
    asked = _questions(config, main)
    found = RunDirectory(run_dir(config), writable=False)
    todo = [name for name in config.stages if config.restart or not found.finished(name)]
    result = None if todo else found.result
    if result is None or (asked is not None and _asked_otherwise(config, asked, result)):
        result = _make(config, todo, asked, main, command)
    else:
        directory = open_run(config, writable=main)  # says where the settings are not the run's
        check_sources(config, directory)
        if main:
            idle = without_effect(config_from_file(directory.path / "config.yaml"), config)
            more = f", {', '.join(idle)} has no effect" if idle else ""
            print(f"this run has ended before: nothing is trained{more} (restart=true starts over)", flush=True)
    if not main:
        return {}
    print(f"\n{result_text(result)}\n\n{found.path}", flush=True)
    return result


def _questions(config: Config, main: bool) -> dict[str, Any] | None:
    """What decides the evaluation after training; None: there is none."""
    if not config.evaluate.after_train:
        return None
    if config.data.evaluate.annotations is None:
        if main:
            print("data.evaluate.annotations is not set: nothing will be evaluated after training", flush=True)
        return None
    own = {key: value for key, value in asdict(config.evaluate).items() if key not in OF_BENCHMARKS}
    return {"evaluate": own, "data": asdict(config.data.evaluate)}


def _asked_otherwise(config: Config, asked: dict[str, Any], result: dict[str, Any]) -> bool:
    """Whether a finished run was evaluated with other settings or questions; those of a lost file were the same."""
    if asked != result.get("evaluated_with"):
        return True
    file = data_root(config.data) / Path(config.data.evaluate.annotations or "").expanduser()
    known = result["evaluate"].get("asked", {}).get("sha256")
    return known is not None and file.is_file() and sha256_of(file) != known


def _make(
    config: Config, todo: list[str], asked: dict[str, Any] | None, main: bool, command: Command
) -> dict[str, Any]:
    """Train and evaluate; what is imported here takes seconds, and a finished run is shown without."""
    from mmprune_train.training.preemption import Preemption
    from mmprune_train.training.processes import end_with_parent

    end_with_parent()
    join(config.trainer.devices)
    with Preemption() as preemption:
        from mmprune_train.tasks.preflight import check_inputs

        check_inputs(config, todo, asked is not None, command)
        with alone_in(run_dir(config)) if main else nullcontext():
            new = main and (config.restart or not run_dir(config).exists())
            directory = open_run(config, writable=main)
            try:
                if not config.restart:
                    check_sources(config, directory)
                if todo:
                    _train(config, directory, todo, main, preemption)
            except (NotFinite, UserError):
                if new:
                    discard_unstarted(directory)
                raise
            return _evaluated(config, directory, asked, command) if main else {}


def _evaluated(
    config: Config, directory: RunDirectory, asked: dict[str, Any] | None, command: Command
) -> dict[str, Any]:
    """The result of a trained run, after the evaluation that is asked for."""
    result: dict[str, Any] = {"run": str(directory.path), "stages": stage_summaries(directory, config.stages)}
    if asked is not None:
        from mmprune_train.tasks.checkpoint import Checkpoint, Results
        from mmprune_train.tasks.evaluate import evaluate_checkpoint, folder_name, question_set

        alone = replace(config, evaluate=replace(config.evaluate, pruners=[], budgets=[]))
        trained = Checkpoint(directory.model(config.stages[-1]), directory.path, alone, None, config, command=command)
        questions = question_set(config)
        results = Results(directory.path / folder_name(trained, questions.asked["annotations"]))
        result["evaluate"] = evaluate_checkpoint(trained, questions, results)
        result["evaluated_with"] = asked
    directory.write_result(result)
    return result


def _train(config: Config, directory: RunDirectory, todo: list[str], main: bool, preemption: Preemption) -> None:
    from mmprune_train.training.base_weights import base_weights
    from mmprune_train.training.run import run_stage
    from mmprune_train.training.starts import begins_anew, note_start, parts_of, start_of

    recorded = {} if config.restart else directory.manifest.get("base_weights", {})
    if main or recorded:  # all processes end where the weights are others, and one alone reads them the first time
        anew = [name for name in todo if begins_anew(config, todo, name)]
        parts = set().union(*(parts_of(config, start_of(config, directory, name)) for name in anew))
        directory.update(base_weights=base_weights(config, recorded, parts))
    for name in todo:
        start = start_of(config, directory, name)
        if main:
            words = start.words() if start else "the base weights and a new projector"
            print(f"\n{name} starts from {words}", flush=True)
        if main or not config.restart:  # what the others see may be the old run, on its way aside
            note_start(directory, name, start)
        run_stage(config, name, directory, start, preemption)


NOT_TOLD = ("state", "start", "data", "components", "files")
"""What the manifest keeps of a stage for its own use."""


def stage_summaries(directory: RunDirectory, stages: list[str]) -> dict[str, Any]:
    """What the manifest says of each stage."""
    summaries = {}
    for name in stages:
        state = directory.stage_state(name)
        data = {"data": told(state["data"])} if "data" in state else {}
        summaries[name] = {**{k: v for k, v in state.items() if k not in NOT_TOLD}, **data}
    return summaries
