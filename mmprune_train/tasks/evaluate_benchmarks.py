"""`task=evaluate evaluate.benchmarks=[pope,textvqa]`: public benchmarks from their official files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mmprune_train.config.task_schema import EvaluateConfig
from mmprune_train.errors import NotHere, UserError, unknown_name
from mmprune_train.evaluation.asking import Asker, costs
from mmprune_train.evaluation.benchmarks.declared import BENCHMARKS, Benchmark
from mmprune_train.evaluation.benchmarks.item import Item, Loaded
from mmprune_train.evaluation.benchmarks.load import choose, load
from mmprune_train.evaluation.benchmarks.run import (
    Answer,
    answers,
    counts,
    judged,
    main_number,
    numbers,
    prediction_lines,
    scored,
)
from mmprune_train.evaluation.generate import Prediction
from mmprune_train.evaluation.metrics.exact import blind_guess
from mmprune_train.evaluation.run import BLANKED, BLIND, Measured, ask_blank, token_counts
from mmprune_train.evaluation.significance import Scored
from mmprune_train.reporting.benchmarks import benchmarks_table
from mmprune_train.storage.assets import sha256_of
from mmprune_train.storage.atomic import write_atomically
from mmprune_train.storage.files import write_json
from mmprune_train.tasks.checkpoint import Checkpoint
from mmprune_train.tasks.scoring import Questions, which_pruners

FOLDER = "evaluate"
MOST_CHECKSUMS = 32
"""Files of a benchmark whose checksums are told: MME has two thousand."""


@dataclass(frozen=True)
class BenchmarkSet:
    """A benchmark that was found."""

    name: str
    loaded: Loaded
    items: list[Item]
    """Those of `loaded` that are asked."""

    @property
    def benchmark(self) -> Benchmark:
        return BENCHMARKS[self.name]


def questions(found: Checkpoint, training: Sequence[tuple[str, str]]) -> Questions:
    """The questions of all benchmarks that are there; those that are not are told.

    Args:
        training: (question, answer) of the training data, for the blind majority; may be empty.
    """
    settings = asked_settings(found)
    sets, missing = read_benchmarks(settings)
    given = "evaluate.max_new_tokens" in found.command.keys
    tokens = {s.name: settings.max_new_tokens if given else s.benchmark.new_tokens for s in sets}
    guess = blind_guess(training) if training else None

    def measure(ask: Asker, blank: bool) -> Measured:
        told, columns = dict[str, Any](), dict[str, Scored]()
        baselines, seen = dict[str, dict[str, float]](), list[Answer]()
        parts = list[tuple[BenchmarkSet, list[Answer]]]()
        for one in sets:
            title, metric = one.benchmark.title, one.benchmark.metric
            answered = answers(one.items, metric, partial(ask, max_new_tokens=tokens[one.name], what=one.name))
            result = {"pruner": ask.pruner, **benchmark_result(one, answered, settings, str(found.model))}
            known = [answer.item for answer in answered if answer.score is not None]
            if metric and (column := scored(answered, metric)) is not None:
                columns[title] = column
                result["intervals"] = column.intervals
            if metric and known and guess:
                told_blind = judged(known, metric, [_guessed(item, guess) for item in known])
                _add(baselines, BLIND, title, result, "score_blind", main_number(numbers(told_blind, metric), metric))
            if metric and known and blank and settings.blank:
                unseen = ask_blank(ask, [item.question for item in known], tokens[one.name], one.name)
                number = main_number(numbers(judged(known, metric, unseen), metric), metric)
                _add(baselines, BLANKED.format(ask.pruner), title, result, "score_blank", number)
            told[one.name] = result
            seen += answered
            parts.append((one, answered))

        def write(folder: Path) -> None:
            for one, answered in parts:
                write_benchmark(folder / one.name, one, answered, told[one.name])

        whole = {"ckpt": str(found.model), "benchmarks": told, "missing": missing}
        return Measured(whole, columns, baselines, [answer.prediction for answer in seen], write)

    chosen = [item.question for one in sets for item in one.items]
    return Questions(chosen, max(tokens.values()), measure, benchmarks_table)


def _guessed(item: Item, guess: Callable[[str], str]) -> Prediction:
    """The answer of who never looks."""
    return Prediction(item.question, guess(item.prompt), {})


def _add(
    baselines: dict[str, dict[str, float]], name: str, title: str, result: dict[str, Any], key: str, value: float | None
) -> None:
    result[key] = value
    if value is not None:
        baselines.setdefault(name, {})[title] = value


def asked_settings(found: Checkpoint) -> EvaluateConfig:
    """Without the limits that a run has for its own questions, unless the command asks for them."""
    settings = found.config.evaluate
    if found.trained is None:
        return settings
    limit = settings.limit if "evaluate.limit" in found.command.keys else None
    return replace(settings, limit=limit, kinds=settings.kinds if "evaluate.kinds" in found.command.keys else [])


def read_benchmarks(settings: EvaluateConfig) -> tuple[list[BenchmarkSet], dict[str, str]]:
    """Those of `evaluate.benchmarks` that are there, and of the others why not. No model is needed.

    Raises UserError where a file is damaged, or none is there.
    """
    names = list(dict.fromkeys(settings.benchmarks))
    for key in ("splits", "prompts"):
        for name in getattr(settings, key):
            if name not in names:
                raise UserError(unknown_name(f"evaluate.{key}", name, names))
    if settings.root is None:
        raise UserError("evaluate.benchmarks: evaluate.root is not set; name the folder that holds them")
    root = Path(settings.root).expanduser()
    if not root.is_dir():
        raise UserError(f"evaluate.root={root}: there is no such folder; name the one that holds the benchmarks")
    sets, missing = list[BenchmarkSet](), dict[str, str]()
    for name in names:
        prompt, split = settings.prompts.get(name), settings.splits.get(name)
        try:
            loaded = load(name, root, prompt, split, settings.ocr_tokens, settings.box_frame)
        except NotHere as error:
            missing[name] = str(error)
            print(f"note: {error}", file=sys.stderr, flush=True)
            continue
        chosen = choose(loaded.items, settings.kinds, settings.limit, name)
        if BENCHMARKS[name].submit is not None and (left := len(loaded.ids) - len(chosen)):
            note = f"{left:,} of {len(loaded.ids):,} questions have no answer in the file for a server or judge"
            loaded = replace(loaded, notes=(*loaded.notes, note))
        for note in loaded.notes:
            print(f"note: {BENCHMARKS[name].title}: {note}", file=sys.stderr, flush=True)
        sets.append(BenchmarkSet(name, loaded, chosen))
    if not sets:
        raise UserError("; ".join(missing.values()))
    return sets, missing


def folder_name(found: Checkpoint) -> str:
    """`evaluate-benchmarks`, or by `evaluate.name`, with the training stage and the pruner as for any evaluation."""
    parts = [FOLDER, found.config.evaluate.name or "benchmarks", found.stage, which_pruners(found)]
    return "-".join(part for part in parts if part)


def benchmark_result(
    one: BenchmarkSet, answered: Sequence[Answer], settings: EvaluateConfig, ckpt: str
) -> dict[str, Any]:
    """For result.json: what was asked, the score that papers print, and all other numbers."""
    benchmark, metric = one.benchmark, one.benchmark.metric
    scores, seen = numbers(answered, metric), [one.prediction for one in answered]
    asked: dict[str, Any] = {
        "ckpt": ckpt,
        "split": ", ".join(dict.fromkeys(item.split for item in one.items if item.split)),
        "prompt": settings.prompts.get(one.name) or benchmark.prompt,
        "files": {str(file): sha256_of(file) for file in one.loaded.files[:MOST_CHECKSUMS]},
        "limit": settings.limit,
        "questions": counts(one.loaded.items, one.items),
    }
    if one.name == "textvqa":
        asked["ocr_tokens"] = settings.ocr_tokens
    if one.name == "refcoco":
        asked["box_frame"] = settings.box_frame
    return {
        "title": benchmark.title,
        "asked": asked,
        "notes": list(one.loaded.notes),
        "metric": metric and metric.main,
        "agrees_with": metric and metric.agrees_with,
        "score": main_number(scores, metric),
        "scores": scores,
        "questions": len(answered),
        **token_counts(seen),
        **costs(seen),
    }


def write_benchmark(folder: Path, one: BenchmarkSet, answered: Sequence[Answer], result: dict[str, Any]) -> None:
    """predictions.jsonl, result.json and what a server or judge takes."""
    write_atomically(folder / "predictions.jsonl", prediction_lines(answered))
    if one.benchmark.submit is not None:
        told = [(answer.item, answer.prediction.text) for answer in answered]
        result["submission"] = [path.name for path in one.benchmark.submit(folder, told, one.loaded)]
    write_json(folder / "result.json", result, checked=True)
