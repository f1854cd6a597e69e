"""An evaluation in words."""

from __future__ import annotations

from typing import Any

from mmprune_train.reporting.tables import table


def result_table(result: dict[str, Any], title: str = "Evaluation") -> str:
    """Accuracies by kind, then tokens."""
    kinds = list(result["accuracy"])
    rows: list[list[object]] = []
    for key, name in (
        ("accuracy", "accuracy"),
        ("blind_majority", "blind majority (question alone)"),
        ("accuracy_blank", "accuracy, image blanked"),
    ):
        if key in result:
            rows.append([name, *(result[key].get(kind) for kind in kinds)])
    scores = table(
        rows, ["", *(kind.replace("yes_no", "yes/no") for kind in kinds)], f"{title}: {result['questions']:,} questions"
    )
    names = {
        "tokens_dense": "tokens, dense",
        "tokens_stage1": "tokens after stage 1",
        "tokens_stage2": "tokens after stage 2",
        "tokens_layer_mean": "tokens, layer mean",
        "keep_ratio": "keep ratio",
    }
    tokens = table([[name, float(result[key])] for key, name in names.items()], ["per question (mean)", ""])
    return f"{scores}\n\n{tokens}"
