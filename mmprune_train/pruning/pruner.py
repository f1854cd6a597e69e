"""The pruner: settings in, masks out. It owns no weights, so any model can carry any pruner."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from inspect import signature

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mmprune_train.config.pruner import TEXT_SCORES, projects, pruned_layers, reads_text, with_amount
from mmprune_train.config.pruner_schema import KneeConfig, PrunerConfig
from mmprune_train.errors import UserError
from mmprune_train.packed.host import fetch, take, upload
from mmprune_train.packed.padding import pad, unpad
from mmprune_train.packed.sequence import PackedSequence
from mmprune_train.pruning import answers
from mmprune_train.pruning.budgets import (
    FIXED,
    budget_parameters,
    count_tokens,
    needs_features,
    poison,
    refuse_unsound,
    sound_rows,
)
from mmprune_train.pruning.components import find_component
from mmprune_train.pruning.merging import merge
from mmprune_train.pruning.raters import relevant_raters
from mmprune_train.pruning.recycling import recycle
from mmprune_train.pruning.schedule import OWN, Pace, spare
from mmprune_train.pruning.scores import LANGUAGE_SCORES, VISION_SCORES, LanguageView, VisionView, full_precision
from mmprune_train.pruning.selection import selection, top_mask
from mmprune_train.pruning.turns import candidates_and_voters


def counts_of(
    scores: Tensor,
    lengths: Tensor | None,
    knee: KneeConfig,
    pace: Pace,
    features: Callable[[], Tensor],
    key: str = "knee",
) -> Tensor:
    """Counts [B] of one stage, on the scores' device; rows that are not sound (`sound_rows`) get some count.

    Args:
        scores: [B, N]. lengths: [B], or None for all N.
        features: makes the tokens' [B, N, D], for the budgets that look at them.
        key: of this budget, for the messages.
    """
    knee = _paced(knee, pace)
    wanted = {*budget_parameters(knee.method), "min_tokens", "max_tokens"}
    params = {f.name: getattr(knee, f.name) for f in fields(knee) if f.name in wanted}
    seen = features() if needs_features(knee.method) else None
    if lengths is None:
        lengths = torch.full(scores.shape[:1], scores.shape[1], dtype=torch.int64, device=scores.device)
    counts = count_tokens(scores, knee.method, lengths, features=seen, key=f"{key}.method", **params)
    return spare(counts, lengths, pace.spared, knee.max_tokens) if pace.spared else counts


def _paced(knee: KneeConfig, pace: Pace) -> KneeConfig:
    return knee if pace.ratio is None else replace(knee, method="fixed_ratio", ratio=pace.ratio)


class Pruner:
    """Both stages of arXiv 2409.01162's method, with every unpublished detail a setting (see `docs/method.md`).

    Each stage makes the host wait for the device once, to learn what stays; `docs/budgets.md` names the settings that
    do so more often. Scores that cannot be ranked are found then, too: a row of which nothing stays.

    Args:
        settings: scores, budgets, layers and positions of both stages.
    """

    def __init__(self, settings: PrunerConfig) -> None:
        self.settings = settings
        self._pace = OWN
        if settings.vision.enabled:
            key, recover = "pruner.vision", settings.vision.recover
            self._vision_score = find_component(
                VISION_SCORES, settings.vision.score, f"{key}.score", answers.vision_scores
            )
            self._select = selection(settings.vision.selection, settings.vision.share)
            self._recover_score = find_component(
                VISION_SCORES, recover.score, f"{key}.recover.score", answers.vision_scores
            )
            if self.merges:
                self._merge = merge(settings.vision.merge, settings.vision.merge_count)
            budget_parameters(settings.vision.knee.method, f"{key}.knee.method")
            if recover.enabled:
                budget_parameters(recover.knee.method, f"{key}.recover.knee.method")
        if settings.language.enabled:
            key = "pruner.language"
            self._language_score = find_component(
                LANGUAGE_SCORES, settings.language.score, f"{key}.score", answers.language_scores
            )
            budget_parameters(settings.language.knee.method, f"{key}.knee.method")

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

    def layers(self, depth: int) -> dict[int, int]:
        """LLM layers that stage 2 prunes before, ascending, each with its place in `pruner.language.layer`.

        Raises UserError where one does not exist in an LLM of `depth` layers.
        """
        return pruned_layers(self.settings.language, depth) if self.settings.language.enabled else {}

    @property
    def looks_back(self) -> bool:
        """Whether stage 2 scores by the queries and keys of the layer before the one that it prunes before."""
        return self.settings.language.signal == "previous"

    @property
    def merges(self) -> bool:
        """Whether stage 1 merges dropped patches."""
        return self.settings.vision.enabled and self.settings.vision.merge != "none"

    @property
    def reads_text(self) -> bool:
        """Whether stage 1 reads the question, so that an image is cut anew for each."""
        return reads_text(self.settings.vision)

    @property
    def projects(self) -> bool:
        """Whether stage 1 looks at what the projector makes of all patches."""
        return projects(self.settings.vision)

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
        """Stage 1, score -> budget -> selection, and perhaps a second pass: bool [I, N] of kept patches, and the first
        pass's scores [I, N] (None where stage 1 is off).

        Args:
            projected: what the projector makes of the patches [I, N, D], for `space=projected`.
            scores: those of an earlier call, which need not be computed again.
        """
        images, patches = view.patches.shape[:2]
        if not self.settings.vision.enabled:
            return torch.ones((images, patches), dtype=torch.bool, device=view.patches.device), None
        scores = self.score_patches(view) if scores is None else scores
        knee, pace = self.settings.vision.knee, self._pace_of("vision")
        counts = counts_of(scores, None, knee, pace, lambda: view.patches, "pruner.vision.knee")
        seen = projected() if self.projects and projected is not None else view.patches
        more = {}
        if "known" in signature(self._select).parameters and _paced(knee, pace).method in FIXED:
            more["known"] = counts_of(torch.zeros(images, patches), None, knee, pace, lambda: view.patches)
        with full_precision(scores):
            kept = self._select(scores, counts, seen, **more)
        kept = kept & self._sound(scores, knee, pace)
        drawn = self._pace_of("vision").ratio is not None  # that ratio is the whole stage's
        recovers = self.settings.vision.recover.enabled and not drawn
        return (self._recover(view, kept) if recovers else kept), scores

    @staticmethod
    def _sound(scores: Float[Tensor, "I N"], knee: KneeConfig, pace: Pace) -> Bool[Tensor, "I 1"]:
        """[I, 1] images whose scores can be ranked; of others nothing is kept."""
        whole = torch.full(scores.shape[:1], scores.shape[1], device=scores.device)
        return sound_rows(scores, whole, _paced(knee, pace).method)[:, None]

    def refuse_patches(self, scores: Float[Tensor, "I N"], lost: Bool[Tensor, " I"], training: bool) -> None:
        """Raise UserError: of some images nothing was kept.

        Args:
            scores: of the first pass. lost: those images, on the host.
            training: let scores pass of which no row is finite: what diverges while it trains is not the user's input.
                The caller keeps all of such an image, as NaN (`poison`).
        """
        whole = torch.full(scores.shape[:1], scores.shape[1], device=scores.device)
        if training and not bool(fetch(sound_rows(scores, whole))[lost].any()):
            return
        method, score = _paced(self.settings.vision.knee, self._pace_of("vision")).method, self.settings.vision.score
        refuse_unsound(scores, whole, method, f"pruner.vision.score={score}: ")
        raise UserError(
            f"pruner.vision.recover.score={self.settings.vision.recover.score} gave NaN, infinite, or negative values "
            "that its budget cannot share out; check the model's precision or the score"
        )

    def _recover(self, view: VisionView, kept: Bool[Tensor, "I N"]) -> Bool[Tensor, "I N"]:
        """The second pass: dropped patches come back by its own score and budget, none for want of a question."""
        stage = self.settings.vision.recover
        scores = self._recover_score(view)
        left = (~kept).sum(1)
        order = kept.int().sort(dim=1, stable=True).indices  # dropped patches first
        dropped = scores.gather(1, order)
        counts = counts_of(
            dropped,
            left.clamp(min=1),
            stage.knee,
            OWN,
            lambda: view.patches.gather(1, order[..., None].expand_as(view.patches)),
            "pruner.vision.recover.knee",
        ).minimum(left)
        if stage.score in TEXT_SCORES and view.asked is not None:
            counts = torch.where(view.asked, counts, 0)
        sound = self._sound(scores, stage.knee, OWN) & kept.any(1, keepdim=True)
        return (kept | top_mask(scores.masked_fill(kept, -torch.inf), counts)) & sound

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
        recover, more = self.settings.vision.recover, {}
        if recover.enabled and recover.score in TEXT_SCORES and "text" in signature(self._merge).parameters:
            more["text"] = self._recover_score(view)
        with full_precision(features):
            return self._merge(features, kept, scores, view.patch_keys(), **more)

    @torch.no_grad()
    def entry_order(
        self, kept: Bool[Tensor, "I N"], merged: Bool[Tensor, "I N"], scores: Float[Tensor, "I N"] | None
    ) -> Int64[Tensor, "I N"]:
        """[I, N] an image's patches in the order in which they enter the LLM, and -1 behind the last. Nothing but -1:
        its scores cannot be ranked.

        Args:
            kept: before merging. merged: with the made tokens, which come behind all kept patches in `order=rank`.
        """
        order = torch.arange(kept.shape[1], device=kept.device).expand(kept.shape)
        if scores is not None and self.settings.vision.order == "rank":
            order = scores.masked_fill(merged & ~kept, -torch.inf).sort(dim=1, descending=True, stable=True).indices
        merged = merged & kept.any(1, keepdim=True)
        outside = (~merged).gather(1, order).int()
        order = order.gather(1, outside.sort(dim=1, stable=True).indices)
        place = torch.arange(kept.shape[1], device=kept.device)
        return order.masked_fill(place >= merged.sum(1, keepdim=True), -1)

    @torch.no_grad()
    def enter_language(self, sequence: PackedSequence, hidden: Float[Tensor, "T D"]) -> PackedSequence:
        """The sequence, with what stage 2 must know of the states [T, D] that enter the LLM."""
        stage = self.settings.language
        if not stage.enabled or stage.raters == "all":
            return sequence
        return replace(sequence, rater=relevant_raters(sequence, hidden))

    def prune_tokens(
        self,
        sequence: PackedSequence,
        hidden: Float[Tensor, "T D"],
        query_keys: Callable[[Tensor], tuple[Tensor, Tensor]],
        place: int = 0,
        training: bool = False,
    ) -> tuple[Float[Tensor, "T D"], Bool[Tensor, " T"], Float[Tensor, " T"]] | None:
        """Stage 2 before one LLM layer; None where no sample has anything to drop.

        Args:
            place: which of `pruner.language.layer` this layer is.
            training: tokens whose scores are not finite all stay, as NaN: what diverges while it trains is not the
                user's input, and every rank must come to know of it by the loss. Elsewhere that is a UserError, as are
                scores of the user's own that are not finite where the states are.
        Returns:
            the states with what each turn's dropped visual tokens leave in them, through which gradients flow; the kept
            tokens, those that merging made among them, on the host; the candidates' scores (NaN elsewhere).
        """
        stage = self.settings.language
        lone = stage.no_text == "last_token_attention"
        candidate, voters = candidates_and_voters(sequence, stage.candidates == "visual", lone, stage.turns)
        if len(voters.segment) == 0:
            return None
        places = candidate.nonzero().squeeze(1)  # [M]
        rows = _turn_rows(sequence)[places]
        if stage.ranking == "per_kind":  # a turn's visual tokens are one row, its text tokens another
            rows = 2 * rows + (~sequence.visual[places])
        row, order = rows.unique(return_inverse=True)[1].sort(stable=True)
        places = places[order]
        with torch.no_grad():
            scores = self._language_score(LanguageView(sequence, hidden.detach(), query_keys, voters))
            table, lengths = pad(take(scores, places), row, int(row[-1]) + 1)
            lengths = upload(lengths, hidden.device)
            knee, pace = self._knee(place), self._pace_of("language")
            counts = counts_of(
                table,
                lengths,
                knee,
                pace,
                lambda: pad(take(hidden, places), row, len(table))[0],
                "pruner.language.knee",
            )
            ranked = table
            if stage.min_per_image:
                first = pad(self._first_of_images(sequence, places, scores), row, len(table))[0]
                ranked, counts = table.masked_fill(first, torch.inf), counts.maximum(first.sum(1))
            kept = unpad(top_mask(ranked, counts, lengths), row)  # [M]
            method = _paced(knee, pace).method
            sound = unpad(sound_rows(table, lengths, method)[:, None].expand_as(table), row)
        if stage.merge != "none":
            hidden, kept = self._recycle(sequence, hidden, places, kept, scores)
        stays = fetch(kept & sound)
        lost = torch.zeros(len(table)).index_add(0, row, stays.float()) == 0  # [rows]
        if bool(lost.any()):
            own = ":" in stage.score and bool(hidden.isfinite().all())
            if own or not training or bool(fetch(sound_rows(table, lengths))[lost].any()):
                refuse_unsound(table, lengths, method, f"pruner.language.score={stage.score}: ")
            stays = stays | lost[row]
            bad = poison(torch.zeros(len(sequence), dtype=torch.bool).index_fill(0, places[lost[row]], True))
            hidden = hidden * upload(bad, hidden.device)[:, None].to(hidden.dtype)
        mask = torch.ones(len(sequence), dtype=torch.bool)
        mask[places] = stays
        return hidden, mask, scores.masked_fill(upload(~candidate, scores.device), torch.nan)

    def _first_of_images(
        self, sequence: PackedSequence, places: Int64[Tensor, " M"], scores: Float[Tensor, " T"]
    ) -> Bool[Tensor, " M"]:
        """Which of the candidates at `places` are the best of their image, as many as `min_per_image` needs beside its
        visual tokens that are no candidates."""
        assert sequence.picture is not None
        chosen = torch.zeros(len(places), dtype=torch.bool, device=scores.device)
        index = sequence.visual[places].nonzero().squeeze(1)
        index = index[places[index].argsort()]
        if not len(index):
            return chosen
        picture, images = sequence.picture[places[index]], int(sequence.picture.max()) + 1
        table, lengths = pad(take(scores, places[index]), picture, images)
        safe = torch.bincount(sequence.picture[sequence.visual], minlength=images) - lengths
        needed = (self.settings.language.min_per_image - safe).clamp(min=0).minimum(lengths)
        best = top_mask(table, upload(needed, scores.device), upload(lengths, scores.device))
        return chosen.index_copy(0, upload(index, scores.device), unpad(best, picture))

    def _recycle(
        self,
        sequence: PackedSequence,
        hidden: Float[Tensor, "T D"],
        places: Int64[Tensor, " M"],
        kept: Bool[Tensor, " M"],
        scores: Float[Tensor, " T"],
    ) -> tuple[Float[Tensor, "T D"], Bool[Tensor, " M"]]:
        """Merge each turn's dropped visual tokens: the states, and which of the candidates at `places` stay."""
        stage = self.settings.language
        index = sequence.visual[places].nonzero().squeeze(1)  # of the visual tokens among the candidates
        row, order = _turn_rows(sequence)[places[index]].unique(return_inverse=True)[1].sort(stable=True)
        index = index[order]
        sights, among = places[index], take(kept, index)
        hidden, made = recycle(hidden, sights, row, ~among, take(scores, sights), stage.merge_share, stage.merge_size)
        return hidden, kept.index_copy(0, upload(index, kept.device), among | made)

    def _knee(self, place: int) -> KneeConfig:
        """The budget of stage 2 at one of its layers."""
        stage = self.settings.language
        return stage.knee if stage.amounts is None else with_amount(stage.knee, stage.amounts[place])


def _turn_rows(sequence: PackedSequence) -> Int64[Tensor, " T"]:
    """[T] a number for each (sample, turn), in order; system text belongs to the first turn."""
    turn = sequence.turn.clamp(min=1)
    return sequence.segment * (turn.max() + 1) + turn
