"""How many tokens of a sample enter the LLM: known exactly, or estimated from what training has seen."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmprune_train.data.dataset import ConversationDataset
from mmprune_train.packed.sequence import Kind

VisualTokens = Callable[[Path], int]
"""Visual tokens of an image that stage 1 keeps."""

LAG = 16
"""Optimizer steps between what an estimate knows and the step it plans. Workers are given batches that far ahead, so
the plan of a step does not depend on how many there are."""
MARGIN = 2.0
"""Standard deviations of a micro-batch's visual tokens that are left free above their expected number: a normal sum is
larger in one of 44."""
MEMORY = 0.99
"""What an optimizer step leaves of the weight of those before: about the last hundred count."""
ENOUGH = 32
"""Images that must have been seen before an estimate is one."""


@dataclass(frozen=True)
class Length:
    """Tokens of a sample, or of several."""

    known: int
    images: int = 0
    """Images whose tokens are not among the known ones."""
    variance: int = 0
    """Of their tokens, in variances of one image: as many where they are different ones."""

    def __add__(self, other: Length) -> Length:
        return Length(self.known + other.known, self.images + other.images, self.variance + other.variance)


@dataclass(eq=False)
class SampleLengths:
    """Lengths of a data set's samples. A sample is tokenised when first asked for, and its length remembered."""

    dataset: ConversationDataset
    visual_tokens: VisualTokens | None = None
    """Exact; None: an image counts as unknown."""

    def __post_init__(self) -> None:
        self._seen = np.full((len(self.dataset), 2), -1, dtype=np.int32)  # text tokens, images left after cutting

    def __len__(self) -> int:
        return len(self._seen)

    def __getitem__(self, index: int) -> Length:
        if self._seen[index, 0] < 0:
            example = self.dataset.encode(index)
            self._seen[index] = int((example.kind != Kind.VISUAL).sum()), example.n_images
        text, images = self._seen[index].tolist()
        if self.visual_tokens is None:
            return Length(text, images, images)
        return Length(text + sum(map(self.visual_tokens, self.dataset.records[index].images[:images])))


@dataclass(frozen=True)
class Estimate:
    """What is expected of images: `mean` tokens each with a standard `deviation`, never more than `most`."""

    mean: float
    deviation: float
    most: int

    def expected(self, length: Length) -> float:
        return length.known + length.images * self.mean

    def safe(self, length: Length) -> float:
        """Tokens that samples will hardly exceed: the expected number and MARGIN standard deviations of their sum."""
        visual = length.images * self.mean + MARGIN * self.deviation * math.sqrt(length.variance)
        return length.known + min(visual, length.images * self.most)


@dataclass(eq=False)
class KeptTokens:
    """Running estimate of the visual tokens that stage 1 keeps of an image: all patches until enough have been seen.

    Different images are taken as independent of each other. The plan of a step uses what was known `lag` steps before
    it, which `state_dict` holds, so a resumed run plans the same batches.
    """

    patches: int
    """Of an image, the most that can be left."""
    lag: int = LAG
    enough: int = ENOUGH

    def __post_init__(self) -> None:
        self.skip(0)

    def observe(self, seen: Sequence[float]) -> None:
        """What an optimizer step saw over all ranks.

        Args:
            seen: samples with images; their images M, over all samples; tokens x left of them; sum over samples of
                x^2 / M.
        """
        self._history.append([MEMORY * old + new for old, new in zip(self._history[-1], seen, strict=True)])
        self.steps += 1

    def at(self, step: int) -> Estimate:
        """For the plan of optimizer step `step`, from 0."""
        known = step - self.lag
        assert known <= self.steps, f"step {step} is planned before step {known} is done"
        samples, images, tokens, squares = self._history[known - self.steps - 1] if known > 0 else [0.0] * 4
        if images < self.enough:
            return Estimate(self.patches, 0.0, self.patches)
        mean = tokens / images
        # of a sample with M images E[x^2 / M] = variance + M mean^2
        return Estimate(mean, math.sqrt(max(0.0, (squares - images * mean**2) / samples)), self.patches)

    def skip(self, steps: int) -> None:
        """So many optimizer steps were planned without an estimate: it begins behind them."""
        self.steps = steps
        # totals after step `steps`, last, and after those before it
        self._history: deque[list[float]] = deque([[0.0] * 4] * (self.lag + 1), maxlen=self.lag + 1)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "history": [list(totals) for totals in self._history]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skip(state["steps"])
        self._history.extend(state["history"])
