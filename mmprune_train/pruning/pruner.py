"""The pruner: settings in, masks out. It owns no weights, so any model can carry any pruner."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mmprune_train.config.checks import DIVERSE_SELECTIONS
from mmprune_train.config.schema import KneeConfig, PrunerConfig
from mmprune_train.errors import UserError
from mmprune_train.pruning.budgets import budget_parameters, find_knee, needs_features
from mmprune_train.pruning.merging import MERGES, merge
from mmprune_train.pruning.packed import IGNORE, Kind, PackedSequence
from mmprune_train.pruning.schedule import OWN, Pace, spare
from mmprune_train.pruning.scores import LANGUAGE_SCORES, VISION_SCORES, LanguageView, VisionView, full_precision
from mmprune_train.pruning.selection import SELECTIONS, columns, pad, selection, top_mask


def _lookup(table: dict, name: str, key: str) -> Callable:
    if name not in table:
        raise UserError(f"{key}={name} is not known; available: {', '.join(sorted(table))}")
    return table[name]


def counts_of(
    scores: Tensor, lengths: Tensor | None, knee: KneeConfig, pace: Pace, features: Callable[[], Tensor]
) -> Tensor:
    """Counts [B] of one stage.

    Args:
        scores: [B, N]. lengths: [B], or None for all N.
        features: makes the tokens' [B, N, D], for the budgets that look at them.
    """
    if pace.ratio is not None:
        knee = replace(knee, method="fixed_ratio", ratio=pace.ratio)
    wanted = {*budget_parameters(knee.method), "min_tokens", "max_tokens"}
    params = {f.name: getattr(knee, f.name) for f in fields(knee) if f.name in wanted}
    seen = features() if needs_features(knee.method) else None
    counts = find_knee(scores, knee.method, lengths, features=seen, **params)
    whole = torch.full_like(counts, scores.shape[1]) if lengths is None else lengths
    return spare(counts, whole, pace.spared, knee.max_tokens) if pace.spared else counts


@dataclass
class Groups:
    """The rows of stage 2: one per turn of a sample that has something to drop and someone to vote."""

    candidate: Bool[Tensor, " T"]
    """[T] bool: may be dropped."""
    group: Int64[Tensor, " T"]
    """[T] row of each token, -1: in none."""
    segment: Int64[Tensor, " G"]
    """[G] sample of each row."""
    raters: Int64[Tensor, " R"]
    """[R] voting tokens, sorted by row."""
    closing: Int64[Tensor, " G"]
    """[G] last prompt token of each row."""


def turn_groups(sequence: PackedSequence, visual_only: bool, lone_images: bool) -> Groups:
    """Split a batch into the (sample, turn) rows that stage 2 scores.

    A turn's candidates are its visual and prompt tokens (system text counts to the first turn) and only its own
    question votes on them, so no turn sees a later one's vote and no answer votes at all. A turn without a visual
    token is left alone. Never a candidate: special tokens and role markers, answers, tokens with a target, the last
    token before each answer, and the last token of a sample.

    Args:
        visual_only: text tokens are not candidates.
        lone_images: also take turns without question text; their closing token is the only voter.
    """
    count = len(sequence)
    device = sequence.ids.device
    turn = sequence.turn.clamp(min=1)
    most = int(turn.max()) + 1 if count else 1
    key = sequence.segment * most + turn
    last = torch.ones(count, dtype=torch.bool, device=device)
    last[:-1] = sequence.segment[1:] != sequence.segment[:-1]
    answer = sequence.kind == Kind.ANSWER
    before_answer = torch.zeros_like(last)
    before_answer[:-1] = answer[1:] & ~answer[:-1] & ~last[:-1]
    protected = last | before_answer | (sequence.target != IGNORE)
    visual, prompt = sequence.visual, sequence.kind == Kind.PROMPT
    rater = prompt & (sequence.turn >= 1)
    candidate = (visual | (prompt & (not visual_only))) & ~protected

    size = sequence.samples * most
    has_visual = torch.zeros(size, dtype=torch.bool, device=device).index_put_(
        (key[visual & ~protected],), torch.tensor(True, device=device)
    )
    has_rater = torch.zeros_like(has_visual).index_put_((key[rater],), torch.tensor(True, device=device))
    active = has_visual & (has_rater | lone_images)
    row = torch.where(active, active.cumsum(0) - 1, -1)  # [size]
    group = row[key]
    rows = active.nonzero().squeeze(1)
    order = torch.arange(count, device=device)
    closing = torch.full((size,), -1, dtype=torch.long, device=device)
    reply = torch.full((size,), count, dtype=torch.long, device=device)
    reply = reply.scatter_reduce(0, key[answer], order[answer], "amin")  # where each turn's answer begins
    open_text = ~answer & (order < reply[key])
    closing = closing.scatter_reduce(0, key[open_text], order[open_text], "amax")
    return Groups(
        candidate=candidate & (group >= 0),
        group=group,
        segment=rows // most,
        raters=(rater & (group >= 0)).nonzero().squeeze(1),
        closing=closing[rows],
    )


class Pruner:
    """Both stages of arXiv 2409.01162's method, with every unpublished detail a setting (see `docs/method.md`).

    Args:
        settings: scores, budgets, layers and positions of both stages.
    """

    def __init__(self, settings: PrunerConfig) -> None:
        self.settings = settings
        self._pace = OWN
        if settings.vision.enabled:
            self._vision_score = _lookup(VISION_SCORES, settings.vision.score, "pruner.vision.score")
            _lookup(SELECTIONS, settings.vision.selection, "pruner.vision.selection")
            self._select = selection(settings.vision.selection, settings.vision.share)
            if self.merges:
                _lookup(MERGES, settings.vision.merge, "pruner.vision.merge")
            budget_parameters(settings.vision.knee.method)
        if settings.language.enabled:
            self._language_score = _lookup(LANGUAGE_SCORES, settings.language.score, "pruner.language.score")
            budget_parameters(settings.language.knee.method)

    @contextmanager
    def paced(self, pace: Pace) -> Iterator[None]:
        """Move the budgets of the stages that the schedule applies to, as long as the context lasts."""
        self._pace = pace
        try:
            yield
        finally:
            self._pace = OWN

    def _pace_of(self, stage: str) -> Pace:
        return self._pace if stage in self.settings.schedule.applies_to else OWN

    @property
    def layers(self) -> list[int]:
        """LLM layers that stage 2 prunes before, ascending."""
        if not self.settings.language.enabled:
            return []
        layer = self.settings.language.layer
        return sorted({int(index) for index in (layer if isinstance(layer, list | tuple) else [layer])})

    def check_layers(self, depth: int) -> None:
        """Raise UserError where a pruning layer does not exist in an LLM of `depth` layers."""
        for layer in self.layers:
            if not 0 <= layer < depth:
                raise UserError(f"pruner.language.layer={layer}: this LLM has layers 0..{depth - 1}")

    @property
    def merges(self) -> bool:
        """Whether stage 1 merges dropped patches."""
        return self.settings.vision.enabled and self.settings.vision.merge != "none"

    @property
    def projects(self) -> bool:
        """Whether stage 1 looks at what the projector makes of all patches."""
        vision = self.settings.vision
        return vision.enabled and vision.space == "projected" and vision.selection in DIVERSE_SELECTIONS

    @torch.no_grad()
    def score_patches(self, view: VisionView) -> Float[Tensor, "I N"]:
        """[I, N] stage-1 scores."""
        return self._vision_score(view)

    @torch.no_grad()
    def keep_patches(
        self,
        view: VisionView,
        projected: Callable[[], Tensor] | None = None,
        scores: Float[Tensor, "I N"] | None = None,
    ) -> tuple[Bool[Tensor, "I N"], Float[Tensor, "I N"] | None]:
        """Stage 1, score -> budget -> selection: bool [I, N] of kept patches, and the scores [I, N] (None where stage 1
        is off).

        Args:
            projected: what the projector makes of the patches [I, N, D], for `space=projected`.
            scores: those of an earlier call, which need not be computed again.
        """
        images, patches = view.patches.shape[:2]
        if not self.settings.vision.enabled:
            return torch.ones((images, patches), dtype=torch.bool, device=view.patches.device), None
        scores = self.score_patches(view) if scores is None else scores
        counts = counts_of(scores, None, self.settings.vision.knee, self._pace_of("vision"), lambda: view.patches)
        seen = projected() if self.projects and projected is not None else view.patches
        with full_precision(scores):
            return self._select(scores, counts, seen), scores

    def merge_patches(
        self,
        features: Float[Tensor, "I N D"],
        kept: Bool[Tensor, "I N"],
        scores: Float[Tensor, "I N"] | None,
        view: VisionView,
    ) -> tuple[Float[Tensor, "I N D"], Bool[Tensor, "I N"]]:
        """The last part of stage 1: features with what dropped patches leave in them, and the mask with the places of
        made tokens. Gradients flow through the features."""
        if not self.merges or scores is None:
            return features, kept
        stage = self.settings.vision
        with full_precision(features):
            return merge(stage.merge, stage.merge_count)(features, kept, scores, view.patch_keys())

    @torch.no_grad()
    def entry_order(
        self, kept: Bool[Tensor, "I N"], merged: Bool[Tensor, "I N"], scores: Float[Tensor, "I N"] | None
    ) -> Int64[Tensor, "I N"]:
        """[I, N] an image's patches in the order in which they enter the LLM; those that stay out come last.

        Args:
            kept: before merging. merged: with the made tokens, which come behind all kept patches in `order=rank`.
        """
        order = torch.arange(kept.shape[1], device=kept.device).expand(kept.shape)
        if scores is not None and self.settings.vision.order == "rank":
            order = scores.masked_fill(merged & ~kept, -torch.inf).sort(dim=1, descending=True, stable=True).indices
        outside = (~merged).gather(1, order).int()
        return order.gather(1, outside.sort(dim=1, stable=True).indices)

    @torch.no_grad()
    def keep_tokens(
        self,
        sequence: PackedSequence,
        hidden: Float[Tensor, "T D"],
        query_keys: Callable[[Tensor], tuple[Tensor, Tensor]],
    ) -> tuple[Bool[Tensor, " T"], Float[Tensor, " T"] | None]:
        """Stage 2 before one LLM layer: bool [T] of kept tokens, and the candidates' scores [T] (NaN elsewhere).

        Returns (all true, None) where no sample has anything to drop.
        """
        stage = self.settings.language
        everything = torch.ones(len(sequence), dtype=torch.bool, device=hidden.device)
        lone = stage.no_text == "last_token_attention"
        groups = turn_groups(sequence, stage.candidates == "visual", lone)
        if len(groups.segment) == 0:
            return everything, None
        raters = groups.raters
        if lone:  # turns without text are voted on by their closing token
            voted = torch.zeros(len(groups.segment), dtype=torch.bool, device=hidden.device)
            voted[groups.group[raters]] = True
            raters = torch.cat([raters, groups.closing[~voted]]).sort().values
        view = LanguageView(sequence, hidden, query_keys, groups.group, groups.segment, raters, groups.closing)
        scores = self._language_score(view)
        rows = groups.group[groups.candidate]  # [M]
        if stage.ranking == "per_kind":  # a turn's visual tokens are one row, its text tokens another
            rows = 2 * rows + (~sequence.visual[groups.candidate])
        row, order = rows.unique(return_inverse=True)[1].sort(stable=True)
        table, lengths = pad(scores[groups.candidate][order], row, int(row[-1]) + 1)
        pace = self._pace_of("language")
        counts = counts_of(
            table, lengths, stage.knee, pace, lambda: pad(hidden[groups.candidate][order], row, len(lengths))[0]
        )
        kept = top_mask(table, counts, lengths)
        column, _ = columns(row, len(lengths))
        chosen = torch.zeros_like(rows, dtype=torch.bool)
        chosen[order] = kept[row, column]
        everything[groups.candidate] = chosen
        return everything, scores.masked_fill(~groups.candidate, torch.nan)
