"""What a run, or an evaluation, ends with: its result in words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmprune_train.reporting.tables import table

KIND_NAMES = {"yes_no": "yes/no"}
ACCURACIES = {
    "accuracy": "accuracy",
    "blind_majority": "blind majority (question alone)",
    "accuracy_blank": "accuracy, image blanked",
}
STAGE_NUMBERS = {
    "steps": "steps",
    "samples_available": "samples in the data",
    "samples_used": "of them used",
    "passes": "passes over those",
    "samples": "samples trained on",
    "samples_truncated": "of them cut to max_length",
    "tokens_truncated": "tokens cut off",
    "steps_skipped": "steps not applied (not finite)",
    "loss": "loss (last 10 steps)",
    "step_seconds": "seconds per step (median)",
    "samples_per_second": "samples per second",
    "data_share": "share of it waiting for data",
    "mfu": "MFU",
    "train_minutes": "training minutes",
    "keep_ratio": "keep ratio in training",
    "micro_batches": "micro-batches per step",
    "budget_use": "use of the token budget",
    "budget_overruns": "micro-batches over the budget",
    "padding_tokens": "padding tokens",
}
"""What the summary of a stage has, and what it is called."""


def stage_rows(stages: Mapping[str, Mapping[str, Any]]) -> list[list[Any]]:
    """What is known of training stages, a row each: what it is called, and each stage's."""
    names = {key: text for key, text in STAGE_NUMBERS.items() if any(key in stage for stage in stages.values())}
    return [[text, *(stage.get(key) for stage in stages.values())] for key, text in names.items()]


def result_text(result: dict[str, Any]) -> str:
    """The tables that a run ends with."""
    text = table(stage_rows(result["stages"]), ["Training", *result["stages"]])
    if "evaluate" in result:
        text += "\n\n" + result_table(result["evaluate"])
    return text


def accuracies(result: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Kinds of questions, and a row each of what was measured for them: its name, then the numbers."""
    kinds = list(result.get("accuracy", {}))
    rows = [[text, *map(result[key].get, kinds)] for key, text in ACCURACIES.items() if key in result]
    return [KIND_NAMES.get(kind, kind) for kind in kinds], rows


def result_table(result: Mapping[str, Any]) -> str:
    """Accuracies by kind, then tokens."""
    kinds, rows = accuracies(result)
    scores = table(rows, ["", *kinds], f"Evaluation: {asked_text(result)}")
    names = {
        "tokens_dense": "tokens, dense",
        "tokens_stage1": "tokens after stage 1",
        "tokens_stage2": "tokens after stage 2",
        "tokens_layer_mean": "tokens, layer mean",
        "keep_ratio": "keep ratio",
    }
    tokens = table([[name, float(result[key])] for key, name in names.items()], ["per question (mean)", ""])
    return f"{scores}\n\n{tokens}"


def asked_apart(results: Mapping[str, Mapping[str, Any]]) -> str:
    """What the evaluations of several runs, by name, were asked, where that is not the same; else empty."""
    groups: dict[tuple[str, str], list[str]] = {}
    files: dict[str, str] = {}
    for name, result in results.items():
        if asked := result.get("asked"):
            files[asked["sha256"]] = Path(asked["annotations"]).name
            groups.setdefault((asked["sha256"], asked_text(result)), []).append(name)
    if len(groups) < 2:
        return ""
    told = [f"{', '.join(names)}: {text} of {files[content]}" for (content, text), names in groups.items()]
    return f"accuracies are of different questions and do not compare: {' | '.join(told)}"


def asked_text(result: Mapping[str, Any]) -> str:
    """How many questions of how many, why not more, and what could not be scored."""
    asked = result.get("asked")
    if asked is None:  # of a run from before this was recorded
        return f"{result['questions']:,} questions"
    counts = {KIND_NAMES.get(kind, kind): count for kind, count in asked["questions"].items()}
    parts = [f"{count['asked']:,} of {count['available']:,} {kind}" for kind, count in counts.items()]
    notes = []
    if any(0 < count["asked"] < count["available"] for count in counts.values()):
        notes.append("evaluate.limit=null asks all")
    if left := [kind for kind, count in counts.items() if not count["asked"]]:
        notes.append(f"evaluate.kinds leaves out {', '.join(left)}")
    if asked["turns"] == "first":
        notes.append("first turns alone (evaluate.turns)")
    if asked["records"] is not None:
        notes.append(f"the first {asked['records']:,} records (data.evaluate.limit)")
    unknown = [f"{count['without_answer']:,} {kind}" for kind, count in counts.items() if count["without_answer"]]
    if unknown:
        notes.append(f"not scored, without an answer: {', '.join(unknown)}")
    return "; ".join([f"{', '.join(parts)} questions", *notes])
