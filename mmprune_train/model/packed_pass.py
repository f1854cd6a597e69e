"""The packed pass: one sequence of all samples' tokens through projector and LLM, with the pruner in the loop."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmprune_train.errors import UserError
from mmprune_train.model.attention import Borders, backend_for
from mmprune_train.model.cache import PrunedCache
from mmprune_train.model.images import ImageSide
from mmprune_train.model.language import ScoringKeys, gathered, looking, rotary
from mmprune_train.model.loss import cross_entropy_sum
from mmprune_train.model.question import Words, image_questions
from mmprune_train.model.rows import rounded_up
from mmprune_train.packed.host import take, upload
from mmprune_train.packed.patches import Patches
from mmprune_train.pruning import IGNORE, PackedSequence, PruningTrace


@dataclass
class PackedOutput:
    """Result of one packed pass."""

    hidden: Tensor
    """[T2, D] normalised states of the tokens that left the last layer."""
    sequence: PackedSequence
    """Those tokens, on the host."""
    row: Tensor
    """[T] the row in the trace's lists of stage 1 of each token of the dense batch, -1 where it is not visual; on the
    host."""
    trace: PruningTrace
    loss_sum: Tensor
    """Scalar, float32: sum of the cross-entropies at supervised tokens."""
    supervised: Tensor
    """Scalar, int64: how many those are; on the host."""
    penalty: Tensor | None = None
    """Scalar, float32: what the pruner adds to their mean; None: nothing."""


def _in_order(sequence: PackedSequence, kept: Tensor, order: Tensor) -> PackedSequence:
    """Let the j-th kept place of an image hold patch order[image, j]. All on the host.

    Args:
        sequence: after stage 1, patches in raster order.
        kept: [I, N] bool.
        order: [I, N] the kept patches, and behind them anything.
    """
    visual = sequence.visual
    image = sequence.image[visual]
    place = kept.cumsum(1)[image, sequence.patch[visual]] - 1
    return replace(sequence, patch=sequence.patch.masked_scatter(visual, order[image, place]))


class PackedPass(ImageSide):
    """How a `PackedLlava` runs a packed sequence; it owns the members below."""

    words: Words | None

    def forward_packed(
        self,
        sequence: PackedSequence,
        pixel_values: Tensor | None,
        cache: PrunedCache | None = None,
        patches: Patches | None = None,
        least_passes: int = 0,
    ) -> PackedOutput:
        """Embed, prune, run the layers, and take the loss where there is a target.

        Which tokens there are is kept on the host, so that only a pruning stage waits for the device: once, to learn
        what stays.

        Args:
            sequence: the dense batch on the host, without embeddings.
            pixel_values: [I, 3, H, W], or None or empty for text alone.
            cache: filled with every layer's keys and values, for generation.
            patches: visual tokens kept by vision-side pruning of the images that `sequence.image` names, in place of
                `pixel_values`: the encoder does not run, not even for a batch without images.
            least_passes: as `select_patches` takes it.
        """
        dense, dense_visual = self._count(sequence)
        ids, asked, encoded = sequence.ids, None, 0
        if patches is None and pixel_values is not None and len(pixel_values):
            if self.pruner.reads_text:
                assert self.words is not None, "question without words"
                pairs = image_questions(sequence, self.words, self.pruner.asked_until)
                sequence = replace(sequence, image=pairs.row)
                asked = self.ask(pairs)
            patches, encoded = self.select_patches(pixel_values, asked, least_passes), len(pixel_values)
        row = sequence.image
        if patches is not None:
            kept = patches.kept
            visual = sequence.visual
            written = int(sequence.patch.max()) + 1
            if written not in (0, kept.shape[1]):
                raise UserError(f"{written} image tokens are written for an image of {kept.shape[1]} image features")
            mask = torch.ones_like(visual)
            mask[visual] = kept[sequence.image[visual], sequence.patch[visual]]
            sequence = _in_order(sequence.keep(mask), kept, patches.order)
            if self.pruner.settings.vision.positions == "contiguous":
                sequence = replace(sequence, position=sequence.within())
            projected: Tensor | None = self.visual_tokens(patches)
            row_of = (kept.flatten().cumsum(0) - 1).view_as(kept)  # [I, N]
        else:
            projected, row_of = self.absent_image(least_passes), None
        stage1, stage1_visual = self._count(sequence)
        trace = PruningTrace(dense, dense_visual, stage1, stage1_visual, encoded=encoded)
        trace.asked = asked.shape if asked is not None else (0, 0)
        if patches is not None:
            trace.vision_kept, trace.vision_order = patches.indices, patches.entering
            trace.vision_scores = patches.scores
        hidden = self._embed(sequence, projected, row_of)
        if cache is not None and cache.prompt_is_in:
            sequence, hidden = self._run_turn(sequence, hidden, list(ids.split(dense.tolist())), cache)
        else:
            sequence, hidden = self._run_layers(replace(sequence, entry=sequence.within()), hidden, trace, cache)
        supervised = (sequence.target != IGNORE).nonzero().squeeze(1)
        targets = upload(sequence.target[supervised], hidden.device)
        loss_sum = cross_entropy_sum(self.hf.lm_head, take(hidden, supervised), targets, self.execution.logits_chunk)
        penalty = None if patches is None else self.pruner.penalty(patches.excess)
        return PackedOutput(hidden, sequence, row, trace, loss_sum, torch.tensor(len(supervised)), penalty)

    @staticmethod
    def _count(sequence: PackedSequence) -> tuple[Tensor, Tensor]:
        visual = torch.bincount(sequence.segment[sequence.visual], minlength=sequence.samples)
        return sequence.lengths, visual

    def _embed(self, sequence: PackedSequence, projected: Tensor | None, row_of: Tensor | None) -> Tensor:
        visual = sequence.visual
        ids = upload(sequence.ids.masked_fill(visual, 0), self.hf.lm_head.weight.device)
        embeddings = self.hf.model.language_model.embed_tokens(ids)  # [T, D]
        if projected is None:
            return embeddings
        if row_of is None:
            return embeddings + 0.0 * projected.sum()
        rows = row_of[sequence.image[visual], sequence.patch[visual]]
        places = upload(visual.nonzero().squeeze(1), embeddings.device)
        return embeddings.index_copy(0, places, take(projected, rows).to(embeddings.dtype))

    def _run_layers(
        self, sequence: PackedSequence, hidden: Tensor, trace: PruningTrace, cache: PrunedCache | None
    ) -> tuple[PackedSequence, Tensor]:
        """All decoder layers, shortening the sequence before those the pruner names."""
        language: Any = self.hf.model.language_model
        prune_before = self.pruner.layers(len(language.layers))
        sequence = self.pruner.enter_language(sequence, hidden.detach())
        hidden, position, rotation, borders, counts = self._enter(sequence, hidden, cache)
        entered = hidden  # what entered the layer before
        for index, layer in enumerate(language.layers):
            if index in prune_before:
                tokens = slice(len(sequence))
                states = hidden[tokens]
                before = self.pruner.scores_previous_layer
                scoring, seen = (language.layers[index - 1], entered) if before else (layer, hidden)
                keys = ScoringKeys(scoring, seen[tokens].detach(), rotation[0][0, tokens], rotation[1][0, tokens])
                normed = None
                if "normed" in self.pruner.language_reads:
                    with torch.no_grad(), looking(states.device):
                        normed = language.norm(states.detach())
                with self.execution.timed("selection"), gathered(scoring):
                    place = prune_before[index]
                    pruned = self.pruner.prune_tokens(sequence, states, keys, place, self.training, normed)
                    if self.training and not keys.ran:  # other ranks score: under ZeRO-3 all must run the same modules
                        keys(torch.zeros(1, dtype=torch.long))
                if pruned is not None:
                    states, mask, scores, made = pruned
                    trace.language_scores = scores if trace.language_scores is None else trace.language_scores
                    sequence, states = self.pruner.shortened(sequence, states, mask, made)
                if pruned is not None or self.training:  # as above: other ranks run the rotary module
                    hidden, position, rotation, borders, counts = self._enter(sequence, states, cache)
                trace.language_entered[index] = sequence.entries(counts[0].tolist())
            trace.layers.append(counts[0])
            trace.layers_visual.append(counts[1])
            entered = hidden
            hidden = layer(
                hidden[None],
                attention_mask=None,
                position_ids=position,
                cache=cache,
                use_cache=cache is not None,
                position_embeddings=rotation,
                borders=borders,
            )[0]
        if cache is not None:
            cache.end_prompt()
        trace.language_kept = sequence.entries(counts[0].tolist())
        return sequence, language.norm(hidden[: len(sequence)])

    def _enter(
        self, sequence: PackedSequence, states: Tensor, cache: PrunedCache | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], Borders, tuple[Tensor, Tensor]]:
        """States [T, D] as the layers up to the next pruning compute them, and what these share: positions, rotary
        tables, borders, token counts. Rows behind the tokens (`rounded_up`) see each other, as if they were a sample.
        """
        counts = self._count(sequence)
        hidden = rounded_up(states)
        cu_seqlens, lengths, more = sequence.cu_seqlens, counts[0].tolist(), len(hidden) - len(states)
        if more:
            cu_seqlens, lengths = pad(cu_seqlens, (0, 1), value=len(hidden)), [*lengths, more]
        if cache is not None:
            cache.start_layers(sequence, hidden.device)
        language = self.hf.model.language_model
        position = upload(pad(sequence.position, (0, more)), hidden.device)[None]
        rotation = rotary(language, hidden[None], position)
        backend, _ = backend_for(self.execution.attention, language.config, hidden.device, hidden.dtype)
        borders = Borders(upload(cu_seqlens, hidden.device), lengths, backend)
        return hidden, position, rotation, borders, counts

    def _run_turn(
        self, sequence: PackedSequence, hidden: Tensor, rows: list[Tensor], cache: PrunedCache
    ) -> tuple[PackedSequence, Tensor]:
        """All decoder layers for a further turn's tokens, of which stage 2 drops none; `rows` as in `enter_turn`."""
        place = upload(cache.enter_turn(sequence, rows), hidden.device)
        table = hidden.new_zeros((sequence.samples * int(sequence.lengths.max()), hidden.shape[1]))
        table = table.index_copy(0, place, hidden).view(sequence.samples, -1, hidden.shape[1])
        states = self._run_cached(table, cache)
        cache.end_turn()
        return sequence, states.flatten(0, 1).index_select(0, place)

    def _run_cached(self, hidden: Tensor, cache: PrunedCache) -> Tensor:
        """All decoder layers for further tokens of each sample [B, W, D], against what each layer kept; normalised."""
        language: Any = self.hf.model.language_model
        prune_before = self.pruner.layers(len(language.layers))
        for index, layer in enumerate(language.layers):
            if index == 0 or index in prune_before:  # positions change where what is kept is renumbered
                mask = cache.mask(index, hidden.shape[1])
                position = cache.position(index, hidden.shape[1])
                rotation = rotary(language, hidden, position)
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_ids=position,
                cache=cache,
                use_cache=True,
                position_embeddings=rotation,
            )
        return language.norm(hidden)
