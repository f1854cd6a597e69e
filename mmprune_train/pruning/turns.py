"""Turns: what stage 2 may drop, which query tokens score it, and how several turns' scores become one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mmprune_train.packed.host import upload
from mmprune_train.packed.padding import pad, unpad
from mmprune_train.packed.sequence import IGNORE, Kind, PackedSequence


@dataclass
class QueryGroups:
    """The query tokens of a batch, in groups: one for each (sample, turn) that scores, sorted by both. On the host.

    With `turns=first` a token is scored by its own turn alone, so no turn depends on a later one. With `mean` and `max`
    all turns from its own on score it, with `last` the sample's last one does. Answers never do.
    """

    turns: str
    """`first`, `mean`, `max` or `last`."""
    own: Bool[Tensor, " G"]
    """[G] whether a group scores the tokens of its own turn alone."""
    segment: Int64[Tensor, " G"]
    """[G] sample of each group."""
    turn: Int64[Tensor, " G"]
    """[G] turn of each group, from 1."""
    tokens: Int64[Tensor, " R"]
    """[R] the query tokens, in ascending order, so sorted by group."""
    group: Int64[Tensor, " R"]
    """[R] group of each query token."""
    closing: Int64[Tensor, " G"]
    """[G] the last prompt token of each group's turn."""

    def combine(self, sequence: PackedSequence, scores: Float[Tensor, "G L"]) -> Float[Tensor, " T"]:
        """[T] the score of each token, 0 where no group scores it.

        Args:
            scores: [G, L] of the tokens of each group's sample by that group, padded.
        """
        turn, _ = pad(sequence.turn.clamp(min=1), sequence.segment, sequence.samples)  # [B, L]
        own, scoring = turn[self.segment], self.turn[:, None]
        mask = upload(torch.where(self.own[:, None], own == scoring, own <= scoring), scores.device)  # [G, L]
        given, _ = pad(scores.masked_fill(~mask, 0), self.segment, sequence.samples)  # [B, groups of a sample, L]
        known, _ = pad(mask, self.segment, sequence.samples)
        if self.turns == "max":
            table = given.masked_fill(~known, -torch.inf).amax(1)
            table = table.masked_fill(~known.any(1), 0)
        else:
            table = given.sum(1) / known.sum(1).clamp(min=1)
        return unpad(table, sequence.segment)


def question_text(sequence: PackedSequence) -> Bool[Tensor, " T"]:
    """[T] bool, the text of questions; system text belongs to none."""
    return (sequence.kind == Kind.PROMPT) & (sequence.turn >= 1)


def candidates_and_queries(
    sequence: PackedSequence,
    visual_only: bool,
    lone_images: bool,
    turns: str = "first",
    turns_in_generation: str | None = None,
) -> tuple[Bool[Tensor, " T"], QueryGroups]:
    """What may be dropped, and what scores it.

    Candidates are the visual and prompt tokens (system text counts to the first turn) of turns that have a visual token
    and a query token to score it. Never a candidate: special tokens, role markers, answers, tokens with a target, the
    last token before each answer, and the last token of a sample.

    Args:
        visual_only: text tokens are not candidates.
        lone_images: a turn without question text scores, too, by its closing token.
        turns: `first`, `mean`, `max` or `last`.
        turns_in_generation: `first` or `last`, for samples without a target whose last turn has no answer; None: as the
            others.
    Returns:
        candidate [T], and the query groups; no candidate where there is no group.
    """
    count = len(sequence)
    turn = sequence.turn.clamp(min=1)
    most = int(turn.max()) + 1 if count else 1
    key = sequence.segment * most + turn
    last = torch.ones(count, dtype=torch.bool)
    last[:-1] = sequence.segment[1:] != sequence.segment[:-1]
    answer = sequence.kind == Kind.ANSWER
    before_answer = torch.zeros_like(last)
    before_answer[:-1] = answer[1:] & ~answer[:-1] & ~last[:-1]
    protected = last | before_answer | (sequence.target != IGNORE)
    visual, prompt = sequence.visual, sequence.kind == Kind.PROMPT
    query = question_text(sequence)
    if sequence.query is not None:
        query = query & sequence.query
    candidate = (visual | (prompt & (not visual_only))) & ~protected

    size = sequence.samples * most

    def some(tokens: Bool[Tensor, " T"]) -> Bool[Tensor, "B K"]:
        table = torch.zeros(size, dtype=torch.bool)
        return table.index_fill_(0, key[tokens], True).view(-1, most)

    order = torch.arange(count)
    reply = torch.full((size,), count, dtype=torch.long)
    reply = reply.scatter_reduce(0, key[answer], order[answer], "amin")  # where each turn's answer begins
    asking = ~answer & (order < reply[key])
    closing = torch.full((size,), -1, dtype=torch.long)
    closing = closing.scatter_reduce(0, key[asking], order[asking], "amax")
    asked = some(query)
    able = (asked | lone_images) & (closing >= 0).view(-1, most)
    shown = some(visual & ~protected)
    final = torch.zeros(sequence.samples, dtype=torch.long).scatter_reduce(0, sequence.segment, turn, "amax")
    trained = torch.zeros(sequence.samples, dtype=torch.bool)
    trained = trained.index_fill_(0, sequence.segment[sequence.target != IGNORE], True)  # cut in a question, too
    open_ended = ~some(answer).gather(1, final[:, None]) & ~trained[:, None]  # [B, 1]

    def ruled(name: str) -> Bool[Tensor, "B 1"]:
        """Of each sample, whether these are its turns."""
        return torch.where(open_ended, (turns_in_generation or turns) == name, turns == name)

    later = able.flip(1).int().cumsum(1).flip(1)  # [B, K] turns from this one on that can score
    active = shown & torch.where(ruled("first"), able, later > 0)
    scoring = torch.where(ruled("first"), active, able & active.int().cummax(1).values.bool())
    scoring = scoring & (~ruled("last") | (later == 1))
    rows = scoring.flatten().nonzero().squeeze(1)
    group = torch.where(scoring, scoring.flatten().cumsum(0).view_as(scoring) - 1, -1).flatten()
    silent = rows[~asked.flatten()[rows]]  # turns that score by their closing token alone
    query = query.index_fill(0, closing[silent], True) & (group[key] >= 0)
    tokens = query.nonzero().squeeze(1)
    own = ruled("first").squeeze(1)[rows // most]
    groups = QueryGroups(turns, own, rows // most, rows % most, tokens, group[key[tokens]], closing[rows])
    return candidate & active.flatten()[key], groups
