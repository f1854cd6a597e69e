"""A calibration in words: its tables, its result.json, and the lines above the preset it writes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmprune_train.config.knee import budget_of
from mmprune_train.evaluation.budgets import BudgetRow, Report, distribution
from mmprune_train.pruning.calibration import Solution
from mmprune_train.reporting.tables import table

WHAT = {
    "vision": "visual tokens kept by stage 1 / dense ones",
    "layer_mean": "tokens entering an LLM layer, averaged over layers / dense ones",
}
"""By `calibrate.measure`."""


def share(value: float) -> str:
    """A share with as many digits as one token needs."""
    return f"{value:.4f}"


def outcome(solution: Solution | None) -> tuple[str, str]:
    """The parameter that meets the target, and what is reached with it; or why there is none."""
    if solution is None:
        return "no parameter", "-"
    low, high = (share(side) for side in solution.reachable)
    if solution.value is None or solution.reached is None:
        return f"{solution.problem}: {low} to {high}", "-"
    jump = f" (jumps from {share(solution.jump[0])} to {share(solution.jump[1])})" if solution.jump else ""
    return f"{solution.parameter.name}={solution.value}", share(solution.reached) + jump


def sentence(report: Report) -> str:
    """What the run's own budget reaches with the parameter that was found."""
    row, asked = report.own, report.asked
    found, reached = outcome(row.solution)
    told = f"{row.name}, {found}: {reached} for a target of {asked.target} ({asked.measure}: {WHAT[asked.measure]})"
    whole = 0 if row.kept_at_target is None else int((row.kept_at_target == report.patches).sum())
    if report.stage == "vision" and whole and not budget_of(row.knee).fixed:
        told += f"\n{whole} of {report.images} images are kept whole at that value"
    return told


def text(report: Report) -> str:
    """The tables."""
    asked, stage = report.asked, getattr(report.pruner, report.stage)
    images = f"{report.images} images of {asked.split}"
    if report.stage == "vision":
        title = f"Tokens of {report.patches} that a budget keeps by {stage.score}: {images}"
    else:
        title = f"Tokens that leave stage 2 by {stage.score}: {report.samples} samples with {images}"
    columns = ["mean", "std", "min", "p5", "p50", "p95", "max"]
    rows = {f"{row.name}{'*' if row is report.own else ''}": row for row in report.rows if not row.problem}
    lines = [[name, row.setting, *_cells(row.kept), row.share] for name, row in rows.items()]
    told = [table(lines, ["budget", "as set", *columns, "share"], title)]
    if report.keep_ratio is not None:
        names = {"dense": "dense", "stage1": "after stage 1", "stage2": "after stage 2", "layer_mean": "layer mean"}
        values = [*(report.tokens[name] for name in names), share(report.keep_ratio)]
        at = "at the target" if report.own.solved else "as set"
        told.append(table([values], [*names.values(), "keep ratio"], f"Tokens a sample, {report.own.name} {at} (mean)"))
    if asked.target is not None:
        solved = {name: row for name, row in rows.items() if row is report.own or asked.measure == "vision"}
        outcomes = [[name, *outcome(row.solution), *_cells(row.kept_at_target)] for name, row in solved.items()]
        told.append(table(outcomes, ["budget", "parameter", "reached", *columns], f"For a target of {asked.target}"))
    told += [f"{row.name} {row.problem}" for row in report.rows if row.problem]
    return "\n\n".join(told) + "\n* the run's own budget"


def _cells(kept: Tensor | None) -> list[float | None]:
    return [None] * 7 if kept is None else list(distribution(kept).values())


def summary(report: Report) -> dict[str, Any]:
    """Everything for result.json."""
    return {
        **{name: getattr(report.asked, name) for name in ("measure", "target", "split")},
        **{name: getattr(report, name) for name in ("images", "samples", "patches", "stage")},
        "score": getattr(report.pruner, report.stage).score,
        "budget": report.own.name,
        **({} if report.keep_ratio is None else {"keep_ratio": report.keep_ratio, "tokens": report.tokens}),
        "budgets": {row.name: _row(row) for row in report.rows},
    }


def _row(row: BudgetRow) -> dict[str, Any]:
    if row.kept is None:
        return {"problem": row.problem}
    found: dict[str, Any] = {"as_set": row.setting, "tokens": distribution(row.kept), "share": row.share}
    if row.solution is not None:
        solution = row.solution
        found["target"] = {
            "parameter": solution.parameter.name,
            **{name: getattr(solution, name) for name in ("value", "reached", "reachable")},
            **({} if row.kept_at_target is None else {"tokens": distribution(row.kept_at_target)}),
            **{name: told for name in ("jump", "problem") if (told := getattr(solution, name))},
        }
    return found
