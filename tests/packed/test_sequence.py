"""The packed sequence and the rules of who may be dropped and who may vote."""

from __future__ import annotations

import subprocess
import sys

import torch

from mmprune_train.packed.padding import pad
from mmprune_train.pruning import IGNORE, Kind, PackedSequence
from mmprune_train.pruning.selections import top_mask
from mmprune_train.pruning.turns import candidates_and_queries

V, P, A, S = Kind.VISUAL, Kind.PROMPT, Kind.ANSWER, Kind.SPECIAL


def packed(samples: list[list[tuple[Kind, int]]], targets: dict[int, int] | None = None) -> PackedSequence:
    """A sequence from (kind, turn) lists; ids count up from 100."""
    flat = [token for sample in samples for token in sample]
    count = len(flat)
    segment = torch.tensor([b for b, sample in enumerate(samples) for _ in sample])
    target = torch.full((count,), IGNORE)
    for place, value in (targets or {}).items():
        target[place] = value
    none = torch.full((count,), -1)
    order = torch.arange(count)
    kind, turn = (torch.tensor(column) for column in zip(*flat, strict=True))
    return PackedSequence(order + 100, order, segment, kind, none, none, turn, target, order, len(samples))


def test_keep_selects_every_field_and_the_borders_follow() -> None:
    sequence = packed([[(S, 0), (V, 1), (V, 1), (P, 1)], [(S, 0), (P, 1)]])
    sequence.embeddings = torch.arange(12.0).view(6, 2).requires_grad_()
    short = sequence.keep(torch.tensor([True, False, True, True, True, False]))
    assert short.ids.tolist() == [100, 102, 103, 104]
    assert short.cu_seqlens.tolist() == [0, 3, 4] and short.lengths.tolist() == [3, 1]
    assert short.within().tolist() == [0, 1, 2, 0] and short.slot.tolist() == [0, 2, 3, 4]
    short.embeddings.sum().backward()
    assert sequence.embeddings.grad[:, 0].tolist() == [1, 0, 1, 1, 1, 0]


def test_the_last_patch_hands_its_target_to_the_last_patch_that_stays() -> None:
    sequence = packed([[(S, 0), (V, 1), (V, 1), (V, 1), (A, 1), (A, 1)]], targets={3: 104, 4: 105})
    short = sequence.keep(torch.tensor([True, False, True, False, True, True]))
    assert short.ids.tolist() == [100, 102, 104, 105]
    assert short.target.tolist() == [IGNORE, 104, 105, IGNORE]


def places(mask: torch.Tensor) -> list[int]:
    return mask.nonzero().squeeze(1).tolist()


TWO_TURNS = [(S, 0), (P, 0), (V, 1), (V, 1), (P, 1), (S, 1), (A, 1), (S, 2), (V, 2), (P, 2), (S, 2)]


def test_a_turn_is_voted_on_by_its_own_question_alone() -> None:
    text_only = [(S, 0), (P, 1), (S, 1)]
    candidate, groups = candidates_and_queries(packed([TWO_TURNS, text_only]), visual_only=False, lone_images=False)
    assert groups.segment.tolist() == [0, 0] and groups.turn.tolist() == [1, 2]
    assert places(candidate) == [1, 2, 3, 4, 8, 9]
    assert groups.tokens.tolist() == [4, 9]  # system text does not vote
    assert groups.group.tolist() == [0, 1]
    assert groups.closing.tolist() == [5, 10]
    candidate, _ = candidates_and_queries(packed([TWO_TURNS, text_only]), visual_only=True, lone_images=False)
    assert places(candidate) == [2, 3, 8]


def test_supervised_answer_neighbours_and_last_tokens_are_never_candidates() -> None:
    sample = [(S, 0), (V, 1), (V, 1), (P, 1), (P, 1), (A, 1), (P, 2), (V, 2), (P, 2)]
    for turns in ("first", "mean", "max"):
        candidate, _ = candidates_and_queries(packed([sample], targets={4: 105, 1: 7}), False, False, turns)
        assert places(candidate) == [2, 3, 6, 7]


def test_an_image_without_question_text_waits_for_leave() -> None:
    caption = [(S, 0), (V, 1), (V, 1), (V, 1), (A, 1)]
    candidate, groups = candidates_and_queries(packed([caption]), False, lone_images=False)
    assert len(groups.segment) == 0 and not candidate.any()
    candidate, groups = candidates_and_queries(packed([caption]), False, lone_images=True)
    assert places(candidate) == [1, 2] and groups.closing.tolist() == groups.tokens.tolist() == [3]


def test_top_mask_breaks_ties_by_place_and_ignores_padding() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 9.0, 9.0]])
    mask = top_mask(scores, torch.tensor([2, 1]), torch.tensor([4, 2]))
    assert mask.tolist() == [[False, True, True, False], [True, False, False, False]]


def test_pad_places_ragged_rows() -> None:
    table, lengths = pad(torch.tensor([1, 2, 3]), torch.tensor([0, 2, 2]), 3)
    assert table.tolist() == [[1, 0], [0, 0], [2, 3]] and lengths.tolist() == [1, 0, 2]


def test_the_pruning_package_imports_nothing_heavier_than_torch() -> None:
    code = (
        "import sys; from mmprune_train.pruning import find_knee;"
        "heavy = {'transformers','pytorch_lightning','lightning','hydra','omegaconf','peft','sklearn','scipy','PIL'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_closing_token_is_the_last_before_the_answer() -> None:
    """A chat template's newline after an answer belongs to the turn, but has seen the answer."""
    sample = [(V, 1), (V, 1), (P, 1), (S, 1), (A, 1), (S, 1), (V, 2), (V, 2), (P, 2), (S, 2), (A, 2), (S, 2)]
    _, groups = candidates_and_queries(packed([sample], targets={3: 104, 9: 110}), visual_only=False, lone_images=False)
    assert groups.closing.tolist() == [3, 9]
