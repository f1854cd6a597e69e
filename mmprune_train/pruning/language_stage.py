"""Stage 2: which visual and text tokens stay inside the LLM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mmprune_train.config.knee import per_layer
from mmprune_train.config.pruner import pruned_layers
from mmprune_train.config.pruner_schema import PrunerConfig
from mmprune_train.packed.host import fetch, take, upload
from mmprune_train.packed.padding import pad, unpad
from mmprune_train.packed.sequence import PackedSequence
from mmprune_train.pruning.budgets import Budget, poison, refuse_unsound, sound_rows
from mmprune_train.pruning.parts import load_part
from mmprune_train.pruning.query_tokens import relevant_query_tokens
from mmprune_train.pruning.schedule import BudgetOverride
from mmprune_train.pruning.selections import top_mask
from mmprune_train.pruning.turns import candidates_and_queries
from mmprune_train.pruning.views import LanguageView, full_precision


class LanguageStage:
    """Stage 2 of a `Pruner`."""

    settings: PrunerConfig
    override_of: Callable[[str], BudgetOverride | None]

    def load_language_stage(self) -> None:
        """Find its components."""
        key, stage = "pruner.language", self.settings.language
        self._language_merge = None
        self.language_reads: set[str] = set()
        """What its score and its selection read."""
        if not stage.enabled:
            return
        self._language_score = load_part("language_score", stage.score, f"{key}.score", stage.score_args)
        self._select_tokens = load_part("language_selection", stage.selection, f"{key}.selection", stage.selection_args)
        for part in (self._language_score, self._select_tokens):
            self.language_reads.update(part.component.reads)
        self._budgets = [Budget(knee, f"{key}.knee") for knee in per_layer(stage.knee, stage.per_layer_budgets)]
        if stage.merge != "none":
            self._language_merge = load_part("language_merge", stage.merge, f"{key}.merge", stage.merge_args)

    def layers(self, depth: int) -> dict[int, int]:
        """LLM layers that stage 2 prunes before, ascending, each with its place in `pruner.language.layer`.

        Raises UserError where one does not exist in an LLM of `depth` layers.
        """
        return pruned_layers(self.settings.language, depth) if self.settings.language.enabled else {}

    @property
    def reads_keys(self) -> bool:
        """Whether stage 2 computes the keys of all tokens."""
        return "keys" in self.language_reads

    @property
    def scores_previous_layer(self) -> bool:
        """Whether stage 2 scores by the queries and keys of the layer before the one that it prunes before."""
        return self.settings.language.score_layer == "previous"

    @torch.no_grad()
    def enter_language(self, sequence: PackedSequence, hidden: Float[Tensor, "T D"]) -> PackedSequence:
        """The sequence, with what stage 2 must know of the states [T, D] that enter the LLM."""
        stage = self.settings.language
        if not stage.enabled or stage.query_tokens == "all":
            return sequence
        return replace(sequence, query=relevant_query_tokens(sequence, hidden))

    def prune_tokens(
        self,
        sequence: PackedSequence,
        hidden: Float[Tensor, "T D"],
        query_keys: Callable[[Tensor], tuple[Tensor, Tensor]],
        place: int = 0,
        training: bool = False,
        normed: Float[Tensor, "T D"] | None = None,
    ) -> tuple[Float[Tensor, "T D"], Bool[Tensor, " T"], Float[Tensor, " T"], Bool[Tensor, " T"]] | None:
        """Stage 2 before one LLM layer; None where no sample has anything to drop.

        Args:
            place: which of `pruner.language.layer` this layer is.
            training: tokens whose scores are not finite all stay, as NaN: what diverges while it trains is not the
                user's input, and every rank must come to know of it by the loss. Elsewhere that is a UserError, as are
                scores of the user's own that are not finite where the states are.
            normed: [T, D] the states after the LLM's last norm, where `language_reads` has them.
        Returns:
            the states with what each turn's dropped visual tokens leave in them, through which gradients flow; the kept
            tokens, those that merging made among them, on the host; the candidates' scores (NaN elsewhere); which
            tokens merging made, on the host.
        """
        stage = self.settings.language
        lone = stage.no_text != "keep_all"
        candidate, groups = candidates_and_queries(
            sequence, stage.candidates == "visual", lone, stage.turns, stage.turns_in_generation
        )
        if len(groups.segment) == 0:
            return None
        places = candidate.nonzero().squeeze(1)  # [M]
        rows = _turn_rows(sequence)[places]
        if stage.ranking == "per_kind":  # a turn's visual tokens are one row, its text tokens another
            rows = 2 * rows + (~sequence.visual[places])
        row, order = rows.unique(return_inverse=True)[1].sort(stable=True)
        places = places[order]
        with torch.no_grad():
            view = LanguageView(sequence, hidden.detach(), query_keys, groups, normed)
            scores = self._language_score(view)
            table, lengths = pad(take(scores, places), row, int(row[-1]) + 1)
            lengths = upload(lengths, hidden.device)
            budget, override = self._budgets[place % len(self._budgets)], self.override_of("language")
            counts = budget.counts(table, lengths, lambda: pad(take(hidden, places), row, len(table))[0], override)
            ranked, first = scores, torch.zeros_like(places, dtype=torch.bool, device=scores.device)
            if stage.min_per_image:
                first = self._first_of_images(sequence, places, scores)
                raised = take(scores, places).masked_fill(first, torch.inf)
                ranked = scores.index_copy(0, upload(places, scores.device), raised)
                counts = counts.maximum(pad(first, row, len(table))[0].sum(1))
            with full_precision(scores):
                kept = self._select_tokens(ranked, counts, view, places, row) | first  # [M]
            rule = budget.rule(override)
            sound = unpad(sound_rows(table, lengths, rule)[:, None].expand_as(table), row)
        before = kept
        if self._language_merge is not None:
            hidden, kept = self._merge_tokens(sequence, hidden, places, kept, scores)
        stays, made = fetch(torch.stack([kept & sound, kept & sound & ~before]))
        lost = torch.zeros(len(table)).index_add(0, row, stays.float()) == 0  # [rows]
        if bool(lost.any()):
            own = ":" in stage.score and bool(hidden.isfinite().all())
            if own or not training or bool(fetch(sound_rows(table, lengths))[lost].any()):
                refuse_unsound(table, lengths, rule, f"pruner.language.score={stage.score}: ")
            stays = stays | lost[row]
            bad = poison(torch.zeros(len(sequence), dtype=torch.bool).index_fill(0, places[lost[row]], True))
            hidden = hidden * upload(bad, hidden.device)[:, None].to(hidden.dtype)
        mask = torch.ones(len(sequence), dtype=torch.bool)
        mask[places] = stays
        new = torch.zeros_like(mask)
        new[places] = made
        return hidden, mask, scores.masked_fill(upload(~candidate, scores.device), torch.nan), new

    def shortened(
        self,
        sequence: PackedSequence,
        states: Float[Tensor, "T D"],
        mask: Bool[Tensor, " T"],
        made: Bool[Tensor, " T"],
    ) -> tuple[PackedSequence, Float[Tensor, "T2 D"]]:
        """What `prune_tokens` keeps, in the order and at the positions in which the layer sees it."""
        stage = self.settings.language
        sequence, states = sequence.keep_with(mask, states)
        made = made[mask]
        if stage.order == "made_last" and bool(made.any()):
            order = sequence.to_the_end_of_images(made)
            sequence, states = sequence.reordered(order), take(states, order)
        if stage.positions == "contiguous":
            sequence = replace(sequence, position=sequence.within())
        return sequence, states

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

    def _merge_tokens(
        self,
        sequence: PackedSequence,
        hidden: Float[Tensor, "T D"],
        places: Int64[Tensor, " M"],
        kept: Bool[Tensor, " M"],
        scores: Float[Tensor, " T"],
    ) -> tuple[Float[Tensor, "T D"], Bool[Tensor, " M"]]:
        """Merge each turn's dropped visual tokens: the states, and which of the candidates at `places` stay."""
        assert self._language_merge is not None
        index = sequence.visual[places].nonzero().squeeze(1)  # of the visual tokens among the candidates
        row, order = _turn_rows(sequence)[places[index]].unique(return_inverse=True)[1].sort(stable=True)
        index = index[order]
        visual_places, among, more = places[index], take(kept, index), {}
        if "picture" in self._language_merge.component.takes:
            assert sequence.picture is not None
            more["picture"] = sequence.picture[visual_places]
        hidden, made = self._language_merge(hidden, visual_places, row, ~among, take(scores, visual_places), **more)
        return hidden, kept.index_copy(0, upload(index, kept.device), among | made)


def _turn_rows(sequence: PackedSequence) -> Int64[Tensor, " T"]:
    """[T] a number for each (sample, turn), in order; system text belongs to the first turn."""
    turn = sequence.turn.clamp(min=1)
    return sequence.segment * (turn.max() + 1) + turn
