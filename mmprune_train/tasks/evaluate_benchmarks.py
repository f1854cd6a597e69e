"""`task=evaluate evaluate.benchmarks=[pope,textvqa]`: public benchmarks from their official files."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mmprune_train.config.task_schema import EvaluateConfig
from mmprune_train.errors import NotHere, UserError, unknown_name
from mmprune_train.evaluation.benchmarks.declared import BENCHMARKS, Benchmark
from mmprune_train.evaluation.benchmarks.item import Item, Loaded
from mmprune_train.evaluation.benchmarks.load import choose, load
from mmprune_train.evaluation.benchmarks.run import Answer, answers, counts, main_number, numbers, prediction_lines
from mmprune_train.evaluation.generate import answer, check_room
from mmprune_train.evaluation.run import token_counts
from mmprune_train.reporting.benchmarks import benchmarks_table
from mmprune_train.storage.assets import sha256_of
from mmprune_train.storage.atomic import write_atomically
from mmprune_train.storage.files import write_json
from mmprune_train.tasks.checkpoint import Checkpoint, Results, prompt_template
from mmprune_train.tasks.checkpoint import load as load_checkpoint

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


def run(found: Checkpoint) -> dict[str, Any]:
    """Ask a model all benchmarks that are there; those that are not are told."""
    settings = asked_settings(found)
    sets, missing = read_benchmarks(settings)
    results = Results(found.home / folder_name(found))
    model, processor, precision = load_checkpoint(found)
    given = "evaluate.max_new_tokens" in found.command.keys
    tokens = {s.name: settings.max_new_tokens if given else s.benchmark.new_tokens for s in sets}
    check_room("evaluate.max_new_tokens", max(tokens.values()), model)
    ask = partial(
        answer, model, processor, prompt_template(processor), batch_size=settings.batch_size, dtype=precision.dtype
    )
    told: dict[str, Any] = {}
    for one in sets:
        limited = partial(ask, max_new_tokens=tokens[one.name], title=one.name)
        answered = answers(one.items, one.benchmark.metric, limited)
        result = {"pruner": model.pruner.settings.name, **benchmark_result(one, answered, settings, str(found.model))}
        with results.writing() as folder:
            write_benchmark(folder / one.name, one, answered, result)
        told[one.name] = result
    whole = {"pruner": model.pruner.settings.name, "ckpt": str(found.model), "benchmarks": told, "missing": missing}
    with results.writing() as folder:
        write_json(folder / "result.json", whole, checked=True)
    print(f"\n{benchmarks_table(whole)}\n\n{results.place}", flush=True)
    return whole


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
        for note in loaded.notes:
            print(f"note: {BENCHMARKS[name].title}: {note}", file=sys.stderr, flush=True)
        sets.append(BenchmarkSet(name, loaded, choose(loaded.items, settings.kinds, settings.limit, name)))
    if not sets:
        raise UserError("; ".join(missing.values()))
    return sets, missing


def folder_name(found: Checkpoint) -> str:
    """`evaluate-benchmarks`, or by `evaluate.name`, with the training stage and the pruner as for any evaluation."""
    parts = [FOLDER, found.config.evaluate.name or "benchmarks", found.stage]
    parts.append(None if found.pruner is None else found.pruner.name)
    return "-".join(part for part in parts if part)


def benchmark_result(
    one: BenchmarkSet, answered: Sequence[Answer], settings: EvaluateConfig, ckpt: str
) -> dict[str, Any]:
    """For result.json: what was asked, the score that papers print, and all other numbers."""
    benchmark, metric = one.benchmark, one.benchmark.metric
    scores = numbers(answered, metric)
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
        **token_counts([one.prediction for one in answered]),
    }


def write_benchmark(folder: Path, one: BenchmarkSet, answered: Sequence[Answer], result: dict[str, Any]) -> None:
    """predictions.jsonl, result.json and what a server or judge takes."""
    write_atomically(folder / "predictions.jsonl", prediction_lines(answered))
    if one.benchmark.submit is not None:
        told = [(answer.item, answer.prediction.text) for answer in answered]
        result["submission"] = [path.name for path in one.benchmark.submit(folder, told, one.loaded)]
    write_json(folder / "result.json", result, checked=True)
