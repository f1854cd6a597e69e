"""Which turns vote on a token, against plain loops over eager attention matrices."""

from __future__ import annotations

import pytest
import torch
from plain import best, eager_copy, walk
from tiny import IMAGE_TOKEN, PATCHES, SIDE, packed, tiny_llava
from torch import Tensor

from mmprune_train.model.llava import PackedLlava
from mmprune_train.pruning import Kind

USER, ASSISTANT = 4, 5
Turn = tuple[int, int, int]
"""Images, words of the question, words of the answer."""
CHAT: list[list[Turn]] = [
    [(1, 4, 2), (0, 3, 2), (1, 5, 2)],
    [(1, 0, 2), (0, 3, 1)],  # an image, and the first question about it a turn later
    [(0, 3, 2), (0, 4, 0)],
    [(2, 3, 1), (1, 4, 0)],
    [(1, 5, 0)],
]


def sample(turns: list[Turn], seed: int) -> Tensor:
    """[L] ids: a marker, images, a question, a marker, an answer; turn by turn."""
    generator = torch.Generator().manual_seed(seed)
    ids = [1]
    for images, asked, answered in turns:
        words = torch.randint(6, 128, (asked + answered,), generator=generator).tolist()
        ids += [USER, *[IMAGE_TOKEN] * images * PATCHES, *words[:asked], ASSISTANT, *words[asked:]]
    return torch.tensor(ids)


def read(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Kinds and turns of a sample's tokens."""
    kinds, turns, number, kind = [], [], 0, Kind.SPECIAL
    for token in ids.tolist():
        number += token == USER
        if token in (USER, ASSISTANT):
            kinds.append(Kind.SPECIAL)
            kind = Kind.PROMPT if token == USER else Kind.ANSWER
        else:
            kinds.append(Kind.VISUAL if token == IMAGE_TOKEN else kind)
        turns.append(number)
    return torch.tensor(kinds, dtype=torch.long), torch.tensor(turns)


def batch(chats: list[list[Turn]]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Samples, and the left-padded inputs of all of them."""
    rows = [sample(turns, seed) for seed, turns in enumerate(chats)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
    pixels = torch.randn(sum(turn[0] for turns in chats for turn in turns), 3, SIDE, SIDE)
    return rows, {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": pixels}


def chatty(hf: object, **language: object) -> PackedLlava:
    settings = {"layer": 2, "knee": {"method": "fixed_ratio"}, "min_per_image": 0, **language}
    model = packed(hf, {"name": "language_only", "language": settings})
    model.annotate = read
    return model


def expected_scores(ids: Tensor, attention: Tensor, states: Tensor, score: str, turns: str, lone: bool) -> list[float]:
    """The score of each token of a sample, NaN where it may not be dropped."""
    kind, turn = (part.tolist() for part in read(ids))
    unit = states / states.norm(dim=-1, keepdim=True)
    ballots: dict[int, dict[int, float]] = {}
    for u in range(1, max(turn) + 1):
        asked = [t for t in range(len(ids)) if turn[t] == u and kind[t] == Kind.PROMPT]
        closing = max(t for t in range(len(ids)) if turn[t] == u and kind[t] != Kind.ANSWER)
        if not asked and not lone:
            continue
        asked = asked or [closing]
        ballots[u] = {}
        for t in range(closing + 1):
            rows = [r for r in asked if r >= t] or [closing]
            if score == "last_token_attention":
                rows = [closing]
            if score == "text_cosine":
                ballots[u][t] = float(torch.cosine_similarity(unit[asked].mean(0), unit[t], dim=0))
            else:
                ballots[u][t] = float(sum(attention[r, t] for r in rows)) / len(rows)
    scores = []
    for t in range(len(ids)):
        heard = [u for u in ballots if (u == turn[t] if turns == "first" else u >= turn[t])]
        heard = [u for u in heard if turns != "last" or u == max(ballots)]
        shown = any(turn[v] == turn[t] and kind[v] == Kind.VISUAL for v in range(len(ids)))
        votes = [ballots[u][t] for u in heard] if kind[t] in (Kind.VISUAL, Kind.PROMPT) and shown else []
        mean = sum(votes) / max(1, len(votes))
        scores.append(torch.nan if not votes else max(votes) if turns == "max" else mean)
    return scores


@pytest.mark.parametrize("lone", [False, True])
@pytest.mark.parametrize("score", ["text_attention", "last_token_attention", "text_cosine"])
@pytest.mark.parametrize("turns", ["first", "mean", "max", "last"])
def test_turns_vote_by_their_policy(turns: str, score: str, lone: bool) -> None:
    """Scores and kept sets of one sample and of five, of several images, turns without image and without text."""
    hf = tiny_llava()
    eager = eager_copy(hf)
    no_text = "last_token_attention" if lone else "keep_all"
    model = chatty(hf, turns=turns, score=score, no_text=no_text)
    for chats in (CHAT[:1], CHAT):
        rows, inputs = batch(chats)
        with torch.no_grad():
            model(**inputs)
        trace = model.last_pruning
        pixels = inputs["pixel_values"].split([sum(turn[0] for turn in turns) for turns in chats])
        lengths = [len(ids) for ids in rows]
        for ids, images, found, kept in zip(
            rows, pixels, trace.language_scores.split(lengths), trace.language_kept, strict=True
        ):
            seen = {}
            walk(
                eager,
                ids,
                images if len(images) else None,
                lambda s: (seen.update({s.layer: s}), (list(range(len(s.tokens))), s.hidden))[1],  # noqa: B023
                False,
            )
            scores = expected_scores(ids, seen[2].attention, seen[2].hidden, score, turns, lone)
            torch.testing.assert_close(found, torch.tensor(scores), equal_nan=True, rtol=1e-4, atol=1e-6)
            kind, turn = (part.tolist() for part in read(ids))
            keys = list(zip(turn, kind, strict=True))
            gone = set()
            for row in set(keys):
                tokens = [t for t in range(len(ids)) if keys[t] == row and scores[t] == scores[t]]
                half = int(len(tokens) * 0.25 + 0.5) or 1
                stays = {tokens[i] for i in best([scores[t] for t in tokens], half)}
                gone |= set(tokens) - stays
            assert kept.tolist() == [t for t in range(len(ids)) if t not in gone]


@pytest.mark.parametrize("turns", ["first", "mean", "max"])
def test_the_last_question_votes_alone_where_it_is_to_be_answered(turns: str) -> None:
    """Samples that end in an answer keep their policy, beside others of their batch that do not."""
    hf = tiny_llava()
    chats = [[(1, 4, 2), (1, 3, 0)], [(1, 4, 2), (1, 3, 2)], [(2, 5, 0)]]
    _, inputs = batch(chats)
    found = []
    for policy in ({"turns": turns, "turns_in_generation": "last"}, {"turns": turns}, {"turns": "last"}):
        model = chatty(hf, score="last_token_attention", no_text="last_token_attention", **policy)
        with torch.no_grad():
            model(**inputs)
        lengths = inputs["attention_mask"].sum(1).tolist()
        found.append(model.last_pruning.language_scores.split(lengths))
    mixed, answered, last = found
    for row, wanted in enumerate((last, answered, answered)):  # of one turn it is the same
        torch.testing.assert_close(mixed[row], wanted[row], equal_nan=True)
    assert not torch.allclose(mixed[0].nan_to_num(), answered[0].nan_to_num(), rtol=1e-3)
    assert not torch.allclose(mixed[1].nan_to_num(), last[1].nan_to_num(), rtol=1e-3)


def test_a_cut_question_votes_on_no_earlier_image() -> None:
    """A training sample that `max_length` ends inside its second question is not one to be answered."""
    hf, pixels = tiny_llava(), torch.randn(1, 3, SIDE, SIDE)
    model = chatty(hf, score="last_token_attention", turns="first", turns_in_generation="last", layer=[1, 2])
    head = sample([(1, 4, 2)], 0)
    found = []
    for seed in range(3):
        ids = torch.cat([head, sample([(0, 5, 0)], seed)[1:-1]])
        labels = torch.full_like(ids, -100)
        labels[len(head) - 2 : len(head)] = head[-2:]
        with torch.no_grad():
            model(input_ids=ids[None], pixel_values=pixels, labels=labels[None])
        found.append(model.last_pruning.language_scores[: len(head)].nan_to_num())
    alone = of_the_first_turn(chatty(hf, score="last_token_attention", layer=[1, 2]), head, pixels)[0]
    torch.testing.assert_close(torch.stack(found), torch.tensor([alone] * 3))


def of_the_first_turn(model: PackedLlava, ids: Tensor, pixels: Tensor) -> tuple[list[float], list[int]]:
    """Its scores, and what stays of it at every layer that drops."""
    with torch.no_grad():
        model(input_ids=ids[None], pixel_values=pixels)
    first = int((read(ids)[1] <= 1).sum())
    kept = [t for entered in model.last_pruning.language_entered.values() for t in entered[0].tolist() if t < first]
    scores = model.last_pruning.language_scores
    return [] if scores is None else scores[:first].nan_to_num().tolist(), kept


@pytest.mark.parametrize("asked", [4, 0])
@pytest.mark.parametrize("score", ["text_attention", "last_token_attention", "text_cosine"])
def test_a_later_question_decides_only_where_the_policy_says_so(score: str, asked: int) -> None:
    """Other words in the second turn, which asks about the first turn's image; with and without a question there."""
    hf = tiny_llava()
    pixels = torch.randn(1, 3, SIDE, SIDE)
    head = sample([(1, asked, 2)], 0)
    chats = [torch.cat([head, sample([(0, 5, 2)], seed)[1:]]) for seed in range(4)]
    for policy in ("first", "mean", "max", "last"):
        model = chatty(hf, turns=policy, score=score, layer=[1, 2])
        alone = of_the_first_turn(model, head, pixels)
        found = [of_the_first_turn(model, ids, pixels) for ids in chats]
        if policy == "first":
            assert all(kept == alone[1] for _, kept in found)
            torch.testing.assert_close(torch.tensor([scores for scores, _ in found]), torch.tensor([alone[0]] * 4))
        else:
            assert (torch.tensor(found[0][0]) - torch.tensor(found[1][0])).abs().max() > 1e-3
        if policy != "first" and not asked:
            assert len({tuple(kept) for _, kept in found}) > 1


@pytest.mark.parametrize("turns", ["first", "mean", "max", "last"])
@pytest.mark.parametrize("score", ["text_attention", "last_token_attention", "text_cosine", "key_norm"])
def test_no_answer_ever_votes(score: str, turns: str) -> None:
    """Other words in the last answer, which no question sees, change nothing that is kept."""
    model = chatty(tiny_llava(), turns=turns, score=score, layer=[1, 2])
    pixels = torch.randn(2, 3, SIDE, SIDE)
    ids = sample([(1, 3, 2), (1, 4, 3)], 0)
    other = ids.clone()
    other[-3:] = torch.tensor([90, 91, 92])
    kept = []
    for tokens in (ids, other):
        with torch.no_grad():
            model(input_ids=tokens[None], pixel_values=pixels)
        kept.append([entered[0].tolist() for entered in model.last_pruning.language_entered.values()])
    assert kept[0] == kept[1]


def test_scores_without_query_tokens_are_the_same_whatever_the_policy() -> None:
    hf = tiny_llava()
    _, inputs = batch(CHAT)
    found = []
    for turns in ("first", "mean", "max", "last"):
        model = chatty(hf, turns=turns, score="key_norm", no_text="last_token_attention")
        with torch.no_grad():
            model(**inputs)
        found.append(model.last_pruning.language_scores)
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, equal_nan=True)


@pytest.mark.parametrize("turns", ["first", "mean", "max", "last"])
@pytest.mark.parametrize("name", ["pyramiddrop", "sparsevlm"])
def test_the_rest_of_the_batch_never_changes_a_chat(name: str, turns: str) -> None:
    settings = {"turns": turns, "layer": [1, 2, 3]}
    if name == "sparsevlm":
        settings |= {"per_layer_budgets": [6, 4, 2], "merge_args": {"share": 0.6, "size": 3}}
    model = packed(tiny_llava(), {"name": name, "language": settings})
    model.annotate = read
    rows, inputs = batch(CHAT)
    with torch.no_grad():
        together = model(**inputs).logits[:, -1]
        entered = model.last_pruning.language_entered
        pixels = inputs["pixel_values"].split([sum(turn[0] for turn in turns) for turns in CHAT])
        for row, (ids, images) in enumerate(zip(rows, pixels, strict=True)):
            alone = model(input_ids=ids[None], pixel_values=images if len(images) else None).logits[0, -1]
            torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-4)
            for index, kept in model.last_pruning.language_entered.items():
                assert torch.equal(kept[0], entered[index][row])


def test_relevant_query_tokens_of_each_turn_look_at_the_images_so_far() -> None:
    hf = tiny_llava()
    model = packed(hf, {"name": "sparsevlm", "language": {"layer": 3, "per_layer_budgets": None}})
    model.annotate = read
    rows, inputs = batch(CHAT)
    chosen: list[Tensor] = []
    enter = model.pruner.enter_language
    model.pruner.enter_language = lambda *args: chosen.append((out := enter(*args)).query) or out
    with torch.no_grad():
        model(**inputs)
    pixels = inputs["pixel_values"].split([sum(turn[0] for turn in turns) for turns in CHAT])
    for ids, images, found in zip(rows, pixels, chosen[0].split([len(ids) for ids in rows]), strict=True):
        states = []
        rule = lambda s: (states.append(s.first), (list(range(len(s.tokens))), s.hidden))[1]  # noqa: B023, E731
        walk(eager_copy(hf), ids, images if len(images) else None, rule, False)
        kind, turn = (part.tolist() for part in read(ids))
        expected = []
        for u in range(1, max(turn) + 1):
            asked = [t for t in range(len(ids)) if turn[t] == u and kind[t] == Kind.PROMPT]
            visual_places = [t for t in range(len(ids)) if turn[t] <= u and kind[t] == Kind.VISUAL]
            if asked and visual_places:
                share = (states[0][visual_places] @ states[0][asked].T).softmax(1).mean(0)
                expected += [t for t, s in zip(asked, share.tolist(), strict=True) if s > 1 / len(asked)]
                expected += asked if len(asked) == 1 else []
            else:
                expected += asked
        assert found.nonzero().squeeze(1).tolist() == expected
