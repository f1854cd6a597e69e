"""A further turn of a chat on the cache of those before: whether the same stays as in reading anew, and what stayed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mmprune_train.components.declare import KEYS
from mmprune_train.components.registry import find
from mmprune_train.config.pruner_schema import LanguageStageConfig
from mmprune_train.errors import UserError
from mmprune_train.model.cache import READ_ANEW, PrunedCache
from mmprune_train.pruning import IGNORE, PackedSequence, Pruner, PruningTrace
from mmprune_train.pruning.turns import candidates_and_queries, question_text

Parts = list[tuple[Tensor, Tensor, Tensor]]
"""Ids, kinds and turns of each sample's dense tokens."""

_FAR = 1 << 40


def flat(parts: Parts) -> PackedSequence:
    """The samples as one sequence, as far as questions and candidates go."""
    ids, kind, turn = (torch.cat(part) for part in zip(*parts, strict=True))
    segment = torch.repeat_interleave(torch.tensor([len(row) for row, _, _ in parts]))
    slot, none = torch.arange(len(ids)), torch.full_like(ids, -1)
    target = torch.full_like(ids, IGNORE)
    return PackedSequence(ids, slot, segment, kind, none, none, turn, target, slot, len(parts))


def _named(sequence: PackedSequence, tokens: Tensor) -> Tensor:
    """Tokens by sample and place in it, so that those of two sequences can be compared."""
    return sequence.segment[tokens] * _FAR + sequence.within()[tokens]


def _choice(sequence: PackedSequence, stage: LanguageStageConfig) -> tuple[Tensor, Tensor]:
    """What stage 2 may drop, and the query tokens; one that scores nothing is none."""
    lone = stage.no_text != "keep_all"
    only = stage.candidates == "visual"
    candidate, groups = candidates_and_queries(sequence, only, lone, stage.turns, stage.turns_in_generation)
    queries = torch.cat([_named(sequence, groups.tokens), _named(sequence, groups.closing)])
    return _named(sequence, candidate.nonzero().squeeze(1)), queries


def _asked(sequence: PackedSequence, of: PackedSequence) -> Tensor:
    """The question text of those turns that have an image in the sequence `of`."""
    most = int(max(sequence.turn.max(), of.turn.max())) + 1
    shown = torch.zeros(of.samples * most, dtype=torch.bool)
    shown[(of.segment * most + of.turn.clamp(min=1))[of.visual]] = True
    asking = question_text(sequence) & shown[sequence.segment * most + sequence.turn.clamp(min=1)]
    return _named(sequence, asking.nonzero().squeeze(1))


def deciding(parts: Parts, pruner: Pruner) -> list[int]:
    """Per sample, how many of its first tokens decide what is dropped of it."""
    sequence = flat(parts)
    deciders = [torch.zeros(0, dtype=torch.long)]
    if pruner.settings.language.enabled:
        deciders += _choice(sequence, pruner.settings.language)
    if pruner.reads_text:
        deciders.append(_asked(sequence, sequence))
    last = torch.full((len(parts),), -1)
    named = torch.cat(deciders)
    last = last.scatter_reduce(0, named // _FAR, named % _FAR, "amax")
    return (last + 1).tolist()


def check_turn(cache: PrunedCache, whole: Parts, pruner: Pruner) -> None:
    """Raise UserError where reading the conversation anew, further turn included, would keep other tokens than the
    cache holds."""
    settings, name = pruner.settings, f"pruner={pruner.settings.name}"
    for number, ((ids, _, _), (read, _, _), settled) in enumerate(zip(whole, cache.read, cache.settled, strict=True)):
        if not torch.equal(ids[:settled], read[:settled]):
            raise UserError(
                f"sample {number}: other tokens come back than the {settled} by which {name} dropped some; {READ_ANEW}"
            )
    before, after = flat(cache.read), flat(whole)
    if pruner.reads_text and not torch.equal(_asked(before, before), _asked(after, before)):
        raise UserError(f"{name}: the new text belongs to the question by which an earlier image was cut; {READ_ANEW}")
    stage = settings.language
    if not stage.enabled:
        return
    (could, queried), (can, queries) = _choice(before, stage), _choice(after, stage)
    for key, chosen in (("pruner.language.score", stage.score), ("pruner.language.selection", stage.selection)):
        part = find(KEYS[key], chosen, key)
        if len(could) and (part.own or part.package):
            raise UserError(f"{key}={chosen} may look at the new turn when it judges the earlier ones; {READ_ANEW}")
    if torch.equal(could, can) and (
        not {"query_tokens", "closing_token"} & pruner.language_reads or torch.equal(queried, queries)
    ):
        return
    turns_of = after.turn[torch.isin(_named(after, after.slot), can)]
    key = "turns_in_generation" if stage.turns_in_generation else "turns"
    if getattr(stage, key) != "first" and torch.equal(could, can):
        raise UserError(
            f"pruner.language.{key}={getattr(stage, key)}: the new question scores tokens of earlier images, and "
            f"the cache has dropped some; set pruner.language.{key}=first, or {READ_ANEW}"
        )
    if len(can) > len(could) and len(turns_of) and int(turns_of.max()) > int(before.turn.max()):
        raise UserError(
            f"pruner.language.enabled=true: the new turn has an image, which {name} scores beside tokens that the "
            f"cache may have dropped; {READ_ANEW}"
        )
    raise UserError(
        f"{name}: the new text changes what could be dropped of the turns before (it goes on with a question that was "
        f"read already); {READ_ANEW}"
    )


def whole_trace(cache: PrunedCache, image_token: int, layers: Iterable[int], encoded: int) -> PruningTrace:
    """What the cache holds of whole conversations, as the trace of reading them anew, `encoded` of their images;
    without scores. Stage 2 prunes before `layers`."""
    entering = cache.entered(None)

    def count(held: list[Tensor]) -> tuple[Tensor, Tensor]:
        visual = [(ids[row] == image_token).sum() for ids, row in zip(cache.rows, held, strict=True)]
        return torch.tensor([len(row) for row in held]), torch.stack(visual)

    def places(held: list[Tensor]) -> list[Tensor]:
        return [torch.searchsorted(first, row) for first, row in zip(entering, held, strict=True)]

    trace = PruningTrace(*count([torch.arange(len(ids)) for ids in cache.rows]), *count(entering), encoded=encoded)
    held = [cache.entered(index) for index in range(len(cache))]
    trace.layers, trace.layers_visual = (list(part) for part in zip(*map(count, held), strict=True))
    trace.language_entered = {index: places(held[index]) for index in layers}
    trace.language_kept = places(held[-1])
    images = [image for sample in cache.images for image in sample]
    trace.vision_kept, trace.vision_order = [kept for kept, _ in images], [order for _, order in images]
    return trace
