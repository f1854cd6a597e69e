"""Every budget on one sample: what it keeps as it is set, and with which parameter it meets the target."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmprune_train.components.declare import KEYS, REQUIRED, Component
from mmprune_train.components.registry import find, names
from mmprune_train.config.knee import arguments_of, budget_of, with_method, with_value
from mmprune_train.config.pruner_schema import KneeConfig, PrunerConfig
from mmprune_train.config.task_schema import CalibrateConfig
from mmprune_train.evaluation.calibration import SamplePasses, keep_ratio, solve_keep_ratio, with_knee
from mmprune_train.progress import progress
from mmprune_train.pruning.calibration import ScoredImages, Solution, searched


def distribution(kept: Tensor) -> dict[str, float]:
    """Mean, standard deviation and percentiles of tokens kept [I]."""
    percentiles = torch.quantile(kept.double(), torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
    return {
        "mean": float(kept.double().mean()),
        "std": float(kept.double().std(correction=0)),
        "min": int(kept.min()),
        **dict(zip(("p5", "p50", "p95"), percentiles, strict=True)),
        "max": int(kept.max()),
    }


@dataclass
class BudgetRow:
    """One budget on the sample."""

    knee: KneeConfig
    problem: str = ""
    """Why the budget cannot be used here; all below is empty then."""
    kept: Tensor | None = None
    """[I] tokens kept of each image (of each sample where stage 2 runs alone)."""
    share: float | None = None
    """Share kept in all: of the visual tokens, or the keep ratio where stage 2 runs alone."""
    solution: Solution | None = None
    kept_at_target: Tensor | None = None
    """[I] the same with the solution's parameter."""

    @property
    def name(self) -> str:
        return self.knee.method

    @property
    def solved(self) -> KneeConfig | None:
        """The budget with the parameter that meets the target; None where there is none."""
        if self.solution is None or self.solution.value is None:
            return None
        return with_value(self.knee, self.solution.parameter.name, self.solution.value)

    @property
    def setting(self) -> str:
        """`sensitivity=1.0`; empty for a budget without a parameter."""
        component, parameter = budget_of(self.knee), searched(self.knee, 1)
        if parameter is None:
            return ""
        return f"{parameter.name}={component.value(parameter.name, arguments_of(self.knee, component))}"


@dataclass
class Report:
    """All budgets on one sample of images."""

    asked: CalibrateConfig
    pruner: PrunerConfig
    stage: str
    """Whose budget is calibrated: `vision`, or `language` where stage 2 runs alone."""
    images: int
    samples: int
    patches: int
    """Visual tokens of an image."""
    token: float
    """Share that one token makes: of an image, or of an average sample."""
    rows: list[BudgetRow] = field(default_factory=list)
    keep_ratio: float | None = None
    """Of the run's own budget, at the target where it was solved."""
    tokens: dict[str, float] = field(default_factory=dict)
    """Means over the samples behind `keep_ratio`."""

    @property
    def own(self) -> BudgetRow:
        """The run's own budget."""
        return next(row for row in self.rows if row.name == getattr(self.pruner, self.stage).knee.method)


def report_budgets(
    asked: CalibrateConfig,
    pruner: PrunerConfig,
    scored: ScoredImages | None,
    passes: SamplePasses | None,
    images: int,
    samples: int,
    patches: int,
) -> Report:
    """Look at every budget that is asked for, and solve for the target.

    Args:
        scored: stage 1's scores; None: stage 1 is off.
        passes: for `measure=layer_mean`.
        patches: of an image.
    """
    stage = "vision" if scored is not None else "language"
    knee: KneeConfig = getattr(pruner, stage).knee
    methods = list(dict.fromkeys([*budgets_asked(asked), knee.method]))
    token = 1 / patches if passes is None else passes.token
    score = find(KEYS[f"pruner.{stage}.score"], getattr(pruner, stage).score, f"pruner.{stage}.score")
    rows = [BudgetRow(with_method(knee, name), _problem(name, score, scored is not None)) for name in methods]
    report = Report(asked, pruner, stage, images, samples, patches, token, rows)
    usable = [row for row in rows if not row.problem]
    if scored is not None:
        for row in progress(usable, "calibrate", "budgets"):
            row.kept, row.share = scored.kept(row.knee), scored.share(row.knee)
            if asked.target is not None and passes is None:
                row.solution = scored.solve(row.knee, asked.target)
                row.kept_at_target = None if row.solved is None else scored.kept(row.solved)
    else:
        assert passes is not None
        for row in usable:
            counts = passes(with_knee(pruner, stage, row.knee), row.name)
            row.kept, row.share = counts["stage2"].long(), keep_ratio(counts)
    if passes is not None:
        own = report.own
        if asked.target is not None:
            own.solution = solve_keep_ratio(passes, pruner, scored, asked.target)
        counts = passes(with_knee(pruner, stage, own.solved or own.knee), own.name)
        report.tokens = {name: float(values.mean()) for name, values in counts.items()}
        report.keep_ratio = keep_ratio(counts)
        if own.solved is not None:
            own.kept_at_target = counts["stage2"].long() if scored is None else scored.kept(own.solved)
    return report


def budgets_asked(asked: CalibrateConfig) -> list[str]:
    """Budgets to report beside the run's own, in the order of all."""
    return [name for name in names("budget") if name in (asked.budgets or names("budget"))]


def _problem(method: str, score: Component, of_images: bool) -> str:
    budget = find("budget", method, "calibrate.budgets")
    if budget.divides_sum and score.signed:
        return f"needs scores >= 0, and {score.name} can be negative"
    if of_images and "features" in budget.reads:
        return "looks at features, which are not kept"
    if any(one.default is REQUIRED for one in budget.parameters):
        return "has parameters without a default"
    return ""
