"""`task=evaluate`: answers to the evaluation questions, their scores, and what a blind guess would reach."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmprune_train.config.command import Command
from mmprune_train.config.schema import Config
from mmprune_train.data.records import IMAGE_PLACEHOLDER, read_annotations
from mmprune_train.data.sources import data_root, split_files
from mmprune_train.errors import UserError
from mmprune_train.evaluation.asking import Asker
from mmprune_train.evaluation.questions import Question, check_images, choose, counts_by_kind, read_questions
from mmprune_train.evaluation.run import Measured, evaluate
from mmprune_train.reporting.text import result_table
from mmprune_train.storage.assets import sha256_of
from mmprune_train.storage.run_files import read_result
from mmprune_train.tasks import evaluate_benchmarks
from mmprune_train.tasks.checkpoint import Checkpoint, Results, find_checkpoint
from mmprune_train.tasks.prepare import prepare_data
from mmprune_train.tasks.scoring import Questions, score, text_of, which_pruners
from mmprune_train.training.cluster import rank_here
from mmprune_train.training.precision import choose_accelerator
from mmprune_train.training.processes import processes_asked, start_ranks

FOLDER = "evaluate"
"""Of an evaluation in its run directory; what is not the run's own case adds to the name."""


@dataclass(frozen=True)
class QuestionSet:
    """The questions that are asked, and what they were chosen from."""

    chosen: list[Question]
    asked: dict[str, Any]
    """For result.json: the file with its checksum, turns, and questions of each kind."""


def run(config: Config, command: Command = Command()) -> dict[str, Any]:
    """Evaluate `ckpt=` (a run directory, an exported or a llava-hf folder), by default this config's own run. Of
    several processes each answers its share; the first prints, writes and returns what was found."""
    devices, nodes = processes_asked(config.trainer, command)
    with heard(rank_here(devices) == 0):
        found = find_checkpoint(config, command)
        answers = training_answers(found.config, command)
        if found.config.evaluate.benchmarks:
            questions = evaluate_benchmarks.questions(found, answers)
            name = evaluate_benchmarks.folder_name(found)
        else:
            own = question_set(found.config)
            questions, name = own_questions(found, own, answers), folder_name(found, own.asked["annotations"])
        results = Results(found.home / name)
        ranks = start_ranks(devices, nodes, choose_accelerator(config.trainer.accelerator))
        result = score(found, questions, results, ranks)
        if ranks.rank == 0:
            print(f"\n{text_of(result, questions)}\n\n{results.place}", flush=True)
    return result


@contextmanager
def heard(aloud: bool) -> Iterator[None]:
    """Let what is printed be heard, or not: of several processes one tells it all."""
    if aloud:
        yield
        return
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def question_set(config: Config) -> QuestionSet:
    """The questions of `data.evaluate` that `evaluate.kinds`, `turns` and `limit` choose; UserError for what is missing
    or malformed, images that are not there included. No model is needed."""
    annotations, images = prepare_data(config, "evaluate")
    settings, records = config.evaluate, config.data.evaluate.limit
    questions = read_questions(annotations, images, records, settings.turns)
    chosen = choose(questions, settings.kinds, settings.limit)
    check_images(chosen, images)
    asked = {
        "annotations": str(annotations),
        "sha256": sha256_of(annotations),
        "records": records,
        "turns": settings.turns,
        "limit": settings.limit,
        "questions": counts_by_kind(questions, chosen),
    }
    return QuestionSet(chosen, asked)


def folder_name(found: Checkpoint, annotations: str) -> str:
    """`evaluate`, with what makes this another evaluation than the run's own: its name, else that of another file, the
    training stage, the pruner or `pruners`."""
    parts = [FOLDER, found.config.evaluate.name or _other_case(found, annotations), found.stage, which_pruners(found)]
    return "-".join(part for part in parts if part)


def _other_case(found: Checkpoint, annotations: str) -> str | None:
    """A name for what is not the run's own case: the file that it was trained to be asked or, where there is none, the
    file and model of the evaluation that lies in `evaluate`. None: this is it."""
    data, model = found.config.data, Path(found.model)
    own, file = dict[str, Any](), found.trained and found.trained.data.evaluate.annotations
    if found.trained is not None and file:
        own = {"annotations": str(data_root(found.trained.data) / Path(file).expanduser())}
    else:
        own = (read_result(found.home / FOLDER / "result.json", _asked) or {}).get("asked", {})
        if found.trained is not None:
            own = {"annotations": own.get("annotations")}
    names = []
    if Path(own.get("ckpt") or model) != model:
        names.append(model.name)
    if (kept := own.get("annotations")) and Path(kept).resolve() != Path(annotations).resolve():
        names.append(data.name if Path(annotations).name == Path(kept).name else Path(annotations).stem)
    return "-".join(names) or None


def _asked(result: dict[str, Any]) -> list[str]:
    return [Path(result.get("asked", {}).get(key) or "").name for key in ("ckpt", "annotations")]


def evaluate_checkpoint(found: Checkpoint, questions: QuestionSet, results: Results) -> dict[str, Any]:
    """Ask a model the questions of a run, after its training. predictions.jsonl and result.json go to `results`."""
    return score(found, own_questions(found, questions, training_answers(found.config, found.command)), results)


def own_questions(found: Checkpoint, questions: QuestionSet, training: list[tuple[str, str]]) -> Questions:
    """A run's own questions, with the answers of its training data for the blind majority."""
    settings = found.config.evaluate

    def measure(ask: Asker, blank: bool) -> Measured:
        measured = evaluate(ask, questions.chosen, training, settings, blank)
        return replace(measured, result={"asked": {"ckpt": str(found.model), **questions.asked}, **measured.result})

    return Questions(questions.chosen, settings.max_new_tokens, measure, result_table)


def training_answers(config: Config, command: Command) -> list[tuple[str, str]]:
    """(question, answer) of the instruction data, all of it; empty where there is none.

    Raises UserError where it is malformed, or named by the command and not there.
    """
    file = config.data.blind or config.data.instruct.annotations
    if not file:
        return []
    data = replace(config.data, instruct=replace(config.data.instruct, annotations=file))
    try:
        annotations, images = split_files(data, "instruct")
    except UserError as error:
        if "data.blind" in command.keys:
            raise UserError(f"data.blind: {error}") from None
        print(f"note: no blind majority, its data are not here: {error}", file=sys.stderr, flush=True)
        return []
    unseen = replace(images, outside=True)  # its answers alone are read
    turns = [turn for record in read_annotations(annotations, unseen).records for turn in record.turns]
    return [(turn.question.replace(IMAGE_PLACEHOLDER, "").strip(), turn.answer) for turn in turns]
