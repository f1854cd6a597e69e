"""Calibration: what each budget would keep of scored images, and the parameter with which it keeps a wanted share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mmprune_train.config.pruner_schema import KneeConfig, VisionStageConfig
from mmprune_train.pruning.budgets import bounded, refuse_unsound, scaled_rank
from mmprune_train.pruning.pruner import counts_of
from mmprune_train.pruning.schedule import OWN
from mmprune_train.pruning.selection import top_and_uniform

Value = int | float
"""Of a parameter."""


@dataclass(frozen=True)
class Knob:
    """The parameter that moves a budget's counts, and the range in which to look for it."""

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

    def turned(self, knee: KneeConfig, value: Value) -> KneeConfig:
        """The budget with this value of its parameter."""
        changed: dict[str, Any] = {self.name: value}
        return replace(knee, **changed)


def knob_of(method: str, longest: int) -> Knob | None:
    """The parameter of a budget for rows of up to `longest` tokens; None: it has none that moves its counts."""
    knobs = {
        "kneedle": Knob("sensitivity", 0.0, 2.0 * longest),  # no fall of the difference curve is larger
        "iqr": Knob("factor", 0.0, 1e6),
        "lof": Knob("neighbors", 1, max(1, longest - 1), whole=True),
        "cumulative_mass": Knob("mass", 1e-6, 1.0),
        "attention_entropy": Knob("scale", 0.5 / longest, longest),
        "effective_rank": Knob("scale", 0.5 / longest, longest),
        "fixed_ratio": Knob("ratio", 0.5 / longest, 1.0),
        "fixed_count": Knob("count", 1, longest, whole=True),
    }
    return knobs.get(method)


@dataclass(frozen=True)
class Solution:
    """The value of a knob that comes nearest to a target, or why there is none."""

    knob: Knob
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
    knob: Knob,
    target: float,
    token: float,
    slack: float = 0.0,
    scan: int = 9,
) -> Solution:
    """The value of a knob at which a share meets a target.

    The share may stand still and jump, but must go one way (to a token). The range is scanned first; where the target
    is crossed the interval is shrunk by false position and by halving in turn, until the share is within `slack` or no
    value lies between.

    Args:
        share: the share kept at a value of the knob.
        token: share that one token makes: what counts as meeting the target, and as going one way.
        scan: points to begin with; 2 where a measurement is dear.
    """
    seen = {value: share(value) for value in dict.fromkeys(knob.at(i / (scan - 1)) for i in range(scan))}
    shares = list(seen.values())
    reachable = (min(shares), max(shares))
    sign = 1 if shares[-1] >= shares[0] else -1
    if any(sign * (after - before) < -token for before, after in pairwise(shares)):
        return Solution(knob, reachable, problem=f"{knob.name} does not move it one way")
    if not reachable[0] - token <= target <= reachable[1] + token:
        return Solution(knob, reachable, problem="out of reach")
    sides = [(a, b) for a, b in pairwise(seen) if (seen[a] - target) * (seen[b] - target) <= 0]
    a, b = sides[0] if sides else (min(seen, key=lambda value: abs(seen[value] - target)),) * 2
    halve = False
    while min(abs(seen[a] - target), abs(seen[b] - target)) > slack:
        part = 0.5 if halve or seen[a] == seen[b] else (target - seen[a]) / (seen[b] - seen[a])
        middle = knob.rounded(a + (b - a) * part)
        if middle in (a, b):
            middle = knob.rounded((a + b) / 2)
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
    return Solution(knob, reachable, best, seen[best], jump)


@dataclass
class ScoredImages:
    """Stage-1 scores of a sample of images: enough to tell what any budget keeps of them."""

    stage: VisionStageConfig
    scores: Float[Tensor, "I N"]
    spread: Float[Tensor, " I"] | None = None
    """[I] effective ranks of the images' features; needed for that budget alone."""

    def kept(self, knee: KneeConfig) -> Int64[Tensor, " I"]:
        """[I] tokens that enter the LLM of each image under a budget, with what selection and merging add."""
        whole = torch.full((len(self.scores),), self.scores.shape[1])
        if knee.method == "effective_rank":
            assert self.spread is not None
            counts = bounded(scaled_rank(self.spread, knee.scale), whole, knee.min_tokens, knee.max_tokens)
        else:
            refuse_unsound(self.scores, whole, knee.method)
            counts = counts_of(self.scores, None, knee, OWN, self._no_features)
        return tokens_left(self.stage, self.scores, counts)

    def share(self, knee: KneeConfig) -> float:
        """Tokens kept of all images together, as a share of their patches."""
        return float(self.kept(knee).sum()) / self.scores.numel()

    def solve(self, knee: KneeConfig, target: float) -> Solution | None:
        """The parameter with which the budget keeps the share `target`; None: it has no parameter."""
        size = self.scores.shape[1]
        knob = knob_of(knee.method, size)
        if knob is None:
            return None
        return solve(lambda value: self.share(knob.turned(knee, value)), knob, target, 1 / size)

    @staticmethod
    def _no_features() -> Tensor:
        raise AssertionError("effective_rank alone looks at features, and its ranks are at hand")


def tokens_left(
    stage: VisionStageConfig, scores: Float[Tensor, "I N"], counts: Int64[Tensor, " I"]
) -> Int64[Tensor, " I"]:
    """[I] tokens of each image that enter the LLM when its budget says `counts`."""
    size = scores.shape[1]
    if stage.selection == "top_and_uniform":  # the only selection that keeps more than it is told
        counts = top_and_uniform(scores, counts, scores[..., None]).sum(1)
    dropped = size - counts
    if stage.merge in ("mean_token", "prumerge"):
        return counts + dropped.clamp(max=1)
    return counts + dropped.clamp(max=stage.merge_count) if stage.merge == "contextual" else counts
