"""What public benchmarks came to, in a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmprune_train.reporting.tables import table


def benchmarks_table(result: Mapping[str, Any]) -> str:
    """A row a benchmark with the number that papers print, in percent but for MME's points; then what is missing."""
    rows: list[list[Any]] = []
    for found in result["benchmarks"].values():
        asked = found["asked"]["questions"].values()
        number, told = found["score"], found["metric"]
        if number is not None and told != "total":
            number, told = 100 * number, f"{told}, %"
        questions = f"{sum(one['asked'] for one in asked):,} of {sum(one['available'] for one in asked):,}"
        rows.append([found["title"], found["asked"]["split"], questions, told or "-", number, found["keep_ratio"]])
    rows += [[name, "missing", "-", "-", None, None] for name in result["missing"]]
    text = table(rows, ["benchmark", "split", "questions", "score", "", "keep ratio"])
    notes = [f"{found['title']}: {note}" for found in result["benchmarks"].values() for note in found["notes"]]
    return "\n".join([text, *notes, *result["missing"].values()])
