"""`task=evaluate`: answers to the evaluation questions, their scores, and what a blind guess would reach."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmprune_train.config.command import Command
from mmprune_train.config.schema import Config
from mmprune_train.data.records import IMAGE_PLACEHOLDER, read_annotations
from mmprune_train.data.sources import data_root, split_files
from mmprune_train.errors import UserError
from mmprune_train.evaluation.generate import check_room
from mmprune_train.evaluation.questions import Question, check_images, choose, counts_by_kind, read_questions
from mmprune_train.evaluation.run import evaluate, write_predictions
from mmprune_train.reporting.text import result_table
from mmprune_train.storage.assets import sha256_of
from mmprune_train.storage.files import write_json
from mmprune_train.storage.run_files import read_result
from mmprune_train.tasks import evaluate_benchmarks
from mmprune_train.tasks.checkpoint import Checkpoint, Results, find_checkpoint, load, prompt_template
from mmprune_train.tasks.prepare import prepare_data

FOLDER = "evaluate"
"""Of an evaluation in its run directory; what is not the run's own case adds to the name."""


@dataclass(frozen=True)
class QuestionSet:
    """The questions that are asked, and what they were chosen from."""

    chosen: list[Question]
    asked: dict[str, Any]
    """For result.json: the file with its checksum, turns, and questions of each kind."""


def run(config: Config, command: Command = Command()) -> dict[str, Any]:
    """Evaluate `ckpt=` (a run directory, an exported or a llava-hf folder), by default this config's own run."""
    found = find_checkpoint(config, command)
    if found.config.evaluate.benchmarks:
        return evaluate_benchmarks.run(found)
    questions = question_set(found.config)
    results = Results(found.home / folder_name(found, questions.asked["annotations"]))
    result = evaluate_checkpoint(found, questions, results)
    print(f"\n{result_table(result)}\n\n{results.place}", flush=True)
    return result


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
    training stage, the pruner."""
    parts = [FOLDER, found.config.evaluate.name or _other_case(found, annotations), found.stage]
    parts.append(None if found.pruner is None else found.pruner.name)
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
    """Ask a model the questions. predictions.jsonl and result.json go to `results`; an earlier evaluation there is
    moved aside when the answers are there, not before."""
    config = found.config
    answers = training_answers(config, found.command)
    model, processor, precision = load(found)
    check_room("evaluate.max_new_tokens", config.evaluate.max_new_tokens, model)

    def save(predictions: Any) -> None:
        with results.writing() as folder:
            write_predictions(folder / "predictions.jsonl", predictions)

    template = prompt_template(processor)
    scores = evaluate(model, processor, template, questions.chosen, answers, config.evaluate, save, precision.dtype)
    asked = {"ckpt": str(found.model), **questions.asked}
    result = {"pruner": model.pruner.settings.name, "asked": asked, **scores}
    with results.writing() as folder:
        write_json(folder / "result.json", result, checked=True)
    return result


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
