"""The rules of published stage-2 methods, one sample at a time in plain loops, for `plain.walk`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from plain import State, best
from tiny import PATCHES, annotate
from torch import Tensor

from mmprune_train.pruning import Kind

COUNTS = [7, 4, 2]
"""Visual tokens that SparseVLM keeps at its three layers."""


class Slow:
    """The rule of one method for one sample of one turn, whose last prompt token is at `end` - 1."""

    renumber = True

    def __init__(self, ids: Tensor, end: int) -> None:
        kind, _ = annotate(ids[:end])
        self.visual = [t for t in range(end) if kind[t] == Kind.VISUAL]
        self.question = [t for t in range(end) if kind[t] == Kind.PROMPT]
        self.end = end

    def __call__(self, state: State) -> tuple[list[int], Tensor]:
        everything = list(range(len(state.tokens)))
        candidates = [i for i in everything if state.tokens[i] in self.visual]
        if not candidates:
            return everything, state.hidden
        return self.drop(state, everything, candidates)

    def drop(self, state: State, everything: list[int], candidates: list[int]) -> tuple[list[int], Tensor]:
        raise NotImplementedError

    def without(self, everything: list[int], candidates: list[int], scores: list[float], count: int) -> list[int]:
        kept = {candidates[i] for i in best(scores, count)}
        return [i for i in everything if i in kept or i not in candidates]


class FastV(Slow):
    renumber = False

    def drop(self, state: State, everything: list[int], candidates: list[int]) -> tuple[list[int], Tensor]:
        if state.layer != 2:
            return everything, state.hidden
        assert state.previous is not None
        row = state.previous[state.tokens.index(self.end - 1)]
        half = math.floor(len(candidates) / 2 + 0.5)
        return self.without(everything, candidates, [float(row[i]) for i in candidates], half), state.hidden


class PyramidDrop(Slow):
    def drop(self, state: State, everything: list[int], candidates: list[int]) -> tuple[list[int], Tensor]:
        if state.layer == 0:
            return everything, state.hidden
        row = state.attention[state.tokens.index(self.end - 1)]
        half = math.floor(len(candidates) / 2 + 0.5)
        return self.without(everything, candidates, [float(row[i]) for i in candidates], half), state.hidden


class SparseVLM(Slow):
    def raters(self, first: Tensor) -> list[int]:
        total = dict.fromkeys(self.question, 0.0)
        for v in self.visual:
            weights = torch.stack([first[v] @ first[t] for t in self.question]).softmax(0)
            for t, weight in zip(self.question, weights, strict=True):
                total[t] += float(weight) / len(self.visual)
        mean = sum(total.values()) / len(total)
        return [t for t in self.question if total[t] > mean]

    def drop(self, state: State, everything: list[int], candidates: list[int]) -> tuple[list[int], Tensor]:
        if state.layer == 0:
            return everything, state.hidden
        assert state.previous is not None
        raters = [state.tokens.index(t) for t in self.raters(state.first)]
        last = state.tokens.index(self.end - 1)
        scores = []
        for i in candidates:
            votes = [float(state.previous[r, i]) for r in raters if r >= i] or [float(state.previous[last, i])]
            scores.append(sum(votes) / len(votes))
        keep = self.without(everything, candidates, scores, COUNTS[state.layer - 1])
        gone = sorted((i for i in candidates if i not in keep), key=lambda i: -scores[candidates.index(i)])
        if not gone:
            return keep, state.hidden
        gone = gone[: min(int(len(gone) * 0.6) + 1, len(gone))]
        hidden = state.hidden.clone()
        found = clusters(state.hidden[gone].double(), min(len(gone) // 3 + 1, len(gone)))
        made = sorted(gone[centre] for centre in found)
        for place, members in zip(made, found.values(), strict=True):
            hidden[place] = state.hidden[[gone[m] for m in members]].mean(0)
        image = {i: (state.tokens[i] - 2) // PATCHES for i in candidates}
        end = {image[i]: i for i in sorted([*keep, *made]) if i in image}
        return sorted([*keep, *made], key=lambda i: (end[image[i]] + 0.5 if i in made else i, i)), hidden


class Dart(Slow):
    renumber = False

    def drop(self, state: State, everything: list[int], candidates: list[int]) -> tuple[list[int], Tensor]:
        if state.layer != 2:
            return everything, state.hidden
        assert state.keys is not None
        norm = [float(key.abs().sum()) for key in state.keys]
        text = [i for i in everything if candidates[-1] < i and state.tokens[i] < self.end]
        mine = sorted(candidates, key=lambda i: -norm[i])[:2]
        pivots = list(set(mine + sorted(text, key=lambda i: -norm[i])[:1]))
        kept = set(mine)
        for number, pivot in enumerate(pivots):
            left = [i for i in candidates if i not in kept]
            left.sort(key=lambda i: float(torch.cosine_similarity(state.normed[pivot], state.normed[i], dim=0)))
            kept.update(left[: 4 // len(pivots) + (number < 4 % len(pivots))])  # six are kept, two are pivots
        return [i for i in everything if i in kept or i not in candidates], state.hidden


class Pool(Slow):
    renumber = False

    def drop(self, state: State, everything: list[int], candidates: list[int]) -> tuple[list[int], Tensor]:
        if state.layer != 2:
            return everything, state.hidden
        size = len(candidates)
        count = math.floor(size / 4 + 0.5)
        starts = {candidates[math.ceil(run * size / count)] for run in range(count)}
        starts |= set(candidates[::PATCHES])  # every image's first
        hidden, run = state.hidden.clone(), []
        for i in reversed(candidates):
            run.append(i)
            if i in starts:
                hidden[i] = state.hidden[run].mean(0)
                run = []
        return [i for i in everything if i in starts or i not in candidates], hidden


def clusters(points: Tensor, count: int) -> dict[int, list[int]]:
    """DPC-KNN in plain loops: each centre with its members, the best centre first."""
    size = len(points)
    apart = [[float((a - b).norm()) / points.shape[1] ** 0.5 for b in points] for a in points]
    density = [math.exp(-sum(d * d for d in sorted(row)[:count]) / count) for row in apart]
    peak = []
    for i in range(size):
        denser = [apart[i][j] for j in range(size) if (density[j], -j) > (density[i], -i)]
        peak.append(density[i] * (min(denser) if denser else max(map(max, apart))))
    centres = best(peak, count)
    home = [i if i in centres else min(centres, key=lambda c: apart[i][c]) for i in range(size)]
    return {c: [i for i in range(size) if home[i] == c] for c in sorted(centres, key=lambda c: -peak[c])}


SLOW: dict[str, Callable[[Tensor, int], Slow]] = {
    "fastv": FastV,
    "pyramiddrop": PyramidDrop,
    "sparsevlm": SparseVLM,
    "dart": Dart,
    "pool": Pool,
}
