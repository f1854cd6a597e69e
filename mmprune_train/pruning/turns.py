"""Turns: what stage 2 may drop, who votes on it, and how the votes of several turns become one score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mmprune_train.packed.host import upload
from mmprune_train.packed.padding import pad, unpad
from mmprune_train.packed.sequence import IGNORE, Kind, PackedSequence


@dataclass
class Voters:
    """The ballots of a batch: one for each (sample, turn) that votes, sorted by both. On the host.

    With `turns=first` a token is voted on by its own turn alone, so no turn sees a later one's vote. With `mean` and
    `max` all turns from its own on vote. Answers never do.
    """

    turns: str
    """`first`, `mean` or `max`."""
    segment: Int64[Tensor, " G"]
    """[G] sample of each ballot."""
    turn: Int64[Tensor, " G"]
    """[G] turn of each ballot, from 1."""
    raters: Int64[Tensor, " R"]
    """[R] tokens that vote, in ascending order, so sorted by ballot."""
    ballot: Int64[Tensor, " R"]
    """[R] ballot of each rater."""
    closing: Int64[Tensor, " G"]
    """[G] the last prompt token of each ballot's turn."""

    def count(self, sequence: PackedSequence, ballots: Float[Tensor, "G L"]) -> Float[Tensor, " T"]:
        """[T] the score of each token, 0 where no ballot counts.

        Args:
            ballots: [G, L] what each turn says of the tokens of its sample, padded.
        """
        turn, _ = pad(sequence.turn.clamp(min=1), sequence.segment, sequence.samples)  # [B, L]
        own, voting = turn[self.segment], self.turn[:, None]
        heard = upload(own == voting if self.turns == "first" else own <= voting, ballots.device)  # [G, L]
        said, _ = pad(ballots.masked_fill(~heard, 0), self.segment, sequence.samples)  # [B, ballots of a sample, L]
        known, _ = pad(heard, self.segment, sequence.samples)
        if self.turns == "max":
            table = said.masked_fill(~known, -torch.inf).amax(1)
            table = table.masked_fill(~known.any(1), 0)
        else:
            table = said.sum(1) / known.sum(1).clamp(min=1)
        return unpad(table, sequence.segment)


def question_text(sequence: PackedSequence) -> Bool[Tensor, " T"]:
    """[T] bool, the text of questions; system text belongs to none."""
    return (sequence.kind == Kind.PROMPT) & (sequence.turn >= 1)


def candidates_and_voters(
    sequence: PackedSequence, visual_only: bool, lone_images: bool, turns: str = "first"
) -> tuple[Bool[Tensor, " T"], Voters]:
    """Who may be dropped and who votes.

    Candidates are the visual and prompt tokens (system text counts to the first turn) of turns that have a visual token
    and somebody to vote on it. Never a candidate: special tokens and role markers, answers, tokens with a target, the
    last token before each answer, and the last token of a sample.

    Args:
        visual_only: text tokens are not candidates.
        lone_images: a turn without question text votes, too, through its closing token.
        turns: `first`, `mean` or `max`.
    Returns:
        candidate [T], and the voters; no candidate where there is no voter.
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
    rater = question_text(sequence)
    if sequence.rater is not None:
        rater = rater & sequence.rater
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
    asked = some(rater)
    voice = (asked | lone_images) & (closing >= 0).view(-1, most)
    shown = some(visual & ~protected)
    if turns == "first":
        active = voting = shown & voice
    else:
        active = shown & voice.flip(1).int().cummax(1).values.flip(1).bool()
        voting = voice & active.int().cummax(1).values.bool()
    rows = voting.flatten().nonzero().squeeze(1)
    ballot = torch.where(voting, voting.flatten().cumsum(0).view_as(voting) - 1, -1).flatten()
    silent = rows[~asked.flatten()[rows]]  # turns that vote through their closing token alone
    rater = rater.index_fill(0, closing[silent], True) & (ballot[key] >= 0)
    raters = rater.nonzero().squeeze(1)
    voters = Voters(turns, rows // most, rows % most, raters, ballot[key[raters]], closing[rows])
    return candidate & active.flatten()[key], voters
