"""A training run in words."""

from __future__ import annotations

from typing import Any

from mmprune_train.reporting.evaluation import result_table
from mmprune_train.reporting.tables import table

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


def result_text(result: dict[str, Any]) -> str:
    """The tables that a run ends with."""
    stages = result["stages"]
    names = {key: text for key, text in STAGE_NUMBERS.items() if any(key in stages[s] for s in stages)}
    rows = [[text, *(stages[s].get(key) for s in stages)] for key, text in names.items()]
    text = table(rows, ["Training", *stages])
    if "evaluate" in result:
        text += "\n\n" + result_table(result["evaluate"])
    return text
