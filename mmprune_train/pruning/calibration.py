"""Calibration: what each budget would keep of scored images, and the parameter with which it keeps a wanted share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from jaxtyping import Float, Int64
from torch import Tensor

from mmprune_train.components.registry import find
from mmprune_train.config.knee import budget_of, with_value
from mmprune_train.config.pruner_schema import KneeConfig, VisionStageConfig
from mmprune_train.pruning.budgets import Budget, refuse_unsound, whole_lengths
from mmprune_train.pruning.parts import load_part

Value = int | float
"""Of a parameter."""


@dataclass(frozen=True)
class Searched:
    """A parameter to solve for, and the range in which to look for it."""

    name: str
    low: Value
    high: Value
    whole: bool = False
    """Integers only."""

    def at(self, way: Value) -> Value:
        """The value at a way 0..1 through the range, ever wider apart: some ranges span orders of magnitude."""
        return self.rounded(self.low + (self.high - self.low) * math.expm1(9 * way) / math.expm1(9))

    def rounded(self, value: Value) -> Value:
        """An integer, or six digits: what is found is to be read and typed."""
        return round(value) if self.whole else float(f"{value:.6g}")


def searched(knee: KneeConfig, longest: int) -> Searched | None:
    """The parameter of a budget for rows of up to `longest` tokens; None: it has none that moves its counts."""
    component = budget_of(knee)
    if component.calibrated is None:
        return None
    name, ends = component.calibrated
    parameter = component.parameter(name)
    assert parameter is not None
    return Searched(name, *ends(longest), whole=parameter.type == "int")


@dataclass(frozen=True)
class Solution:
    """The value of a parameter that comes nearest to a target, or why there is none."""

    parameter: Searched
    reachable: tuple[float, float]
    """Smallest and largest share that was seen."""
    value: Value | None = None
    reached: float | None = None
    """Share at that value."""
    jump: tuple[float, float] | None = None
    """Where no value meets the target to the token: the shares just below and above it."""
    problem: str = ""


def solve(
    share: Callable[[Value], float],
    parameter: Searched,
    target: float,
    token: float,
    slack: float = 0.0,
    scan: int = 9,
) -> Solution:
    """The value of a parameter at which a share meets a target.

    The share may stand still and jump, but must go one way (to a token). The range is scanned first; where the target
    is crossed the interval is shrunk by false position and by halving in turn, until the share is within `slack` or no
    value lies between.

    Args:
        share: the share kept at a value of the parameter.
        token: share that one token makes: what counts as meeting the target, and as going one way.
        scan: points to begin with; 2 where a measurement is dear.
    """
    seen = {value: share(value) for value in dict.fromkeys(parameter.at(i / (scan - 1)) for i in range(scan))}
    shares = list(seen.values())
    reachable = (min(shares), max(shares))
    sign = 1 if shares[-1] >= shares[0] else -1
    if any(sign * (after - before) < -token for before, after in pairwise(shares)):
        return Solution(parameter, reachable, problem=f"{parameter.name} does not move it one way")
    if not reachable[0] - token <= target <= reachable[1] + token:
        return Solution(parameter, reachable, problem="out of reach")
    sides = [(a, b) for a, b in pairwise(seen) if (seen[a] - target) * (seen[b] - target) <= 0]
    a, b = sides[0] if sides else (min(seen, key=lambda value: abs(seen[value] - target)),) * 2
    halve = False
    while min(abs(seen[a] - target), abs(seen[b] - target)) > slack:
        part = 0.5 if halve or seen[a] == seen[b] else (target - seen[a]) / (seen[b] - seen[a])
        middle = parameter.rounded(a + (b - a) * part)
        if middle in (a, b):
            middle = parameter.rounded((a + b) / 2)
            if middle in (a, b):
                break
        seen[middle] = share(middle)
        halve = not halve
        if (seen[middle] - target) * (seen[a] - target) <= 0:
            b = middle
        else:
            a = middle
    best = min(seen, key=lambda value: abs(seen[value] - target))  # of equals the first: less often a step's very edge
    low, high = sorted((seen[a], seen[b]))
    jump = (low, high) if abs(seen[best] - target) > max(token, slack) else None
    return Solution(parameter, reachable, best, seen[best], jump)


@dataclass
class ScoredImages:
    """Stage-1 scores of a sample of images: enough to tell what any budget keeps of them."""

    stage: VisionStageConfig
    scores: Float[Tensor, "I N"]
    feature_rank: Float[Tensor, " I"] | None = None
    """[I] effective ranks of the images' features; needed for budgets that read them alone."""

    def kept(self, knee: KneeConfig) -> Int64[Tensor, " I"]:
        """[I] tokens that enter the LLM of each image under a budget, with what selection and merging add."""
        whole, budget = whole_lengths(self.scores), Budget(knee, "knee")
        refuse_unsound(self.scores, whole, budget.rule())
        counts = budget.counts(self.scores, whole, feature_rank=self.feature_rank)
        return tokens_left(self.stage, self.scores, counts)

    def share(self, knee: KneeConfig) -> float:
        """Tokens kept of all images together, as a share of their patches."""
        return float(self.kept(knee).sum()) / self.scores.numel()

    def solve(self, knee: KneeConfig, target: float) -> Solution | None:
        """The parameter with which the budget keeps the share `target`; None: it has no parameter."""
        size = self.scores.shape[1]
        parameter = searched(knee, size)
        if parameter is None:
            return None
        return solve(lambda value: self.share(with_value(knee, parameter.name, value)), parameter, target, 1 / size)


def tokens_left(
    stage: VisionStageConfig, scores: Float[Tensor, "I N"], counts: Int64[Tensor, " I"]
) -> Int64[Tensor, " I"]:
    """[I] tokens of each image that enter the LLM when its budget says `counts`."""
    select = load_part("selection", stage.selection, "pruner.vision.selection", stage.selection_args)
    if select.component.exceeds:  # by how much does not depend on the features
        counts = select(scores, counts, scores[..., None]).sum(1)
    most, made = scores.shape[1], int(stage.keep_cls)
    if stage.merge == "none":
        return counts + (most - counts).clamp(max=made)
    merge = find("merge", stage.merge, "pruner.vision.merge")
    given = merge.arguments("pruner.vision.merge_args", stage.merge_args)
    merged = merge.value(merge.makes, given) if isinstance(merge.makes, str) else merge.makes
    assert isinstance(merged, int)
    return counts + (most - counts).clamp(max=made + merged)
