"""Stage-2 scores against what transformers computes, and stage 2 against a slow re-derivation."""

from __future__ import annotations

import copy

import pytest
import torch
from largest import Largest
from loaded import LANGUAGE_SCORES
from tiny import IMAGE_TOKEN, PATCHES, TEXT, annotate, packed, tiny_inputs, tiny_llava
from transformers import (
    Gemma2Config,
    MistralConfig,
)

from mmprune_train.errors import UserError
from mmprune_train.model.inputs import pack
from mmprune_train.model.language import ScoringKeys, check_language_model, rotary
from mmprune_train.pruning import Kind, PackedSequence, find_knee
from mmprune_train.pruning.turns import QueryGroups
from mmprune_train.pruning.views import LanguageView


@pytest.mark.parametrize("text", ["llama", "phi3"])
@pytest.mark.parametrize("score", LANGUAGE_SCORES)
def test_no_stage_two_score_holds_tokens_times_tokens(score: str, text: str) -> None:
    language, length = tiny_llava("clip", text).model.language_model, 2000
    hidden = torch.randn(length, 48)
    kind = torch.full((length,), int(Kind.VISUAL))
    zeros = torch.zeros_like(kind)
    place = torch.arange(length)
    sequence = PackedSequence(zeros, place, zeros, kind, zeros, place, zeros + 1, zeros - 100, place, 1)
    with torch.no_grad():
        cos, sin = rotary(language, hidden[None], place[None])
        keys = ScoringKeys(language.layers[2], hidden, cos[0], sin[0])
        groups = QueryGroups("first", zeros[:1] == 0, zeros[:1], zeros[:1] + 1, place[-9:-1], zeros[:8], place[-1:])
        view = LanguageView(sequence, hidden, keys, groups)
        with Largest() as largest:
            LANGUAGE_SCORES[score](view)
    assert 0 < largest.entries < length**2 / 4


@pytest.mark.parametrize("text", TEXT)
def test_recomputed_queries_and_keys_are_the_layers_own(text: str) -> None:
    hf = tiny_llava("clip", text)
    hf.set_attn_implementation("eager")
    language = hf.model.language_model
    ids = torch.randint(4, 128, (1, 10))
    with torch.no_grad():
        reference = language(ids, output_attentions=True, output_hidden_states=True)
        hidden = reference.hidden_states[2][0]
        cos, sin = rotary(language, hidden[None], torch.arange(10)[None])
        query, keys = ScoringKeys(language.layers[2], hidden, cos[0], sin[0])(torch.tensor([6, 9]))
    logits = torch.einsum("rhd,thd->hrt", query, keys.repeat_interleave(2, dim=1))
    future = torch.arange(10) > torch.tensor([6, 9])[:, None]
    chance = logits.masked_fill(future, -torch.inf).softmax(-1)
    torch.testing.assert_close(chance, reference.attentions[2][0][:, [6, 9]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("text", TEXT)
def test_stage_two_scores_are_what_transformers_computes(text: str) -> None:
    hf = tiny_llava("clip", text)
    inputs = tiny_inputs([1], [12])
    eager = copy.deepcopy(hf)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        full = eager(**inputs, output_attentions=True, output_hidden_states=True, use_cache=True)
    attention = full.attentions[2][0].mean(0)  # [T, T]
    hidden = full.hidden_states[2][0]
    unit = hidden / hidden.norm(dim=-1, keepdim=True)
    asked = annotate(inputs["input_ids"][0])[0] == Kind.PROMPT
    seen = asked[:, None] & torch.ones_like(attention, dtype=torch.bool).tril()  # [rater, token]
    expected = {
        "text_attention": (attention * seen).sum(0) / seen.sum(0),
        "text_cosine": torch.cosine_similarity(unit[asked].mean(0, keepdim=True), hidden),
        "last_token_attention": attention[-1],
        "key_norm": -full.cache.layers[2].keys[0].norm(dim=-1).mean(0),
        "key_l1": full.cache.layers[2].keys[0].abs().sum((0, 2)),
        "early_first": -torch.arange(len(hidden)).float(),
    }
    assert set(expected) == set(LANGUAGE_SCORES) - {"random"}
    for score, reference in expected.items():
        model = packed(hf, {"name": "language_only", "language": {"layer": 2, "score": score}})
        with torch.no_grad():
            model(**inputs)
        scores = model.last_pruning.language_scores
        candidates = ~scores.isnan()
        assert candidates.sum() == len(reference) - 2  # all but the first and the last token
        torch.testing.assert_close(scores[candidates], reference[candidates], rtol=1e-5, atol=1e-6, msg=score)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (MistralConfig(sliding_window=4096), "mistral.*sliding_window=null"),
        (TEXT["phi3"]().__class__(sliding_window=2047), "phi3.*sliding_window=null"),
        (TEXT["gemma"]().__class__(use_bidirectional_attention=True), "gemma.*both directions"),
        (Gemma2Config(), "'gemma2' is not supported; supported: gemma, llama"),
    ],
    ids=["mistral", "phi3", "gemma", "gemma2"],
)
def test_llms_that_the_packed_walk_would_change_are_refused(config: object, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_language_model(config)


def test_a_window_wider_than_the_longest_sequence_is_none() -> None:
    check_language_model(MistralConfig(sliding_window=4096, max_position_embeddings=4096))


@pytest.mark.parametrize("text", ["llama", "phi3", "gemma"])
@pytest.mark.parametrize("ranking", ["per_kind", "joint"])
@pytest.mark.parametrize("images", [[1], [1, 0, 2, 1, 1]])
def test_stage_two_equals_a_slow_rederivation(images: list[int], ranking: str, text: str) -> None:
    """text_attention and kneedle, one sample at a time, from eager attention matrices of plain transformers."""
    hf = tiny_llava("clip", text)
    model = packed(hf, {"name": "language_only", "language": {"layer": 2, "ranking": ranking, "min_per_image": 0}})
    texts = [12, 9, 8, 6, 15][: len(images)]
    inputs = tiny_inputs(images, texts)
    with torch.no_grad():
        model(**inputs)
    eager = copy.deepcopy(hf)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        full = eager(**inputs, output_attentions=True)
    for row in range(len(images)):
        real = inputs["attention_mask"][row].bool()
        ids = inputs["input_ids"][row, real]
        kind, _ = annotate(ids)
        length = len(ids)
        kept = model.last_pruning.language_kept[row]
        if images[row] == 0:
            assert kept.tolist() == list(range(length))
            continue
        attention = full.attentions[2][row].mean(0)[:length, :length]  # mean over heads
        raters = [t for t in range(length) if kind[t] == Kind.PROMPT]
        candidates = [t for t in range(length - 1) if kind[t] in (Kind.PROMPT, Kind.VISUAL)]
        rows = [candidates]
        if ranking == "per_kind":
            rows = [[t for t in candidates if kind[t] == wanted] for wanted in (Kind.VISUAL, Kind.PROMPT)]
        best = set()
        for tokens in rows:
            votes = [[attention[r, t] for r in raters if r >= t] or [attention[-1, t]] for t in tokens]
            scores = torch.stack([torch.stack(seen).mean() for seen in votes])
            count = int(find_knee(scores[None], "kneedle"))
            best |= {tokens[i] for i in scores.argsort(descending=True, stable=True)[:count].tolist()}
        expected = [t for t in range(length) if t in best or t not in candidates]
        assert kept.tolist() == expected


def test_a_later_question_never_changes_what_an_earlier_turn_keeps() -> None:
    hf = tiny_llava()
    model = packed(hf, "twostage")
    turn_one = tiny_inputs([1], [8])
    ids = turn_one["input_ids"][0]
    more = torch.cat([ids, torch.tensor([50, 51, 52, 60, 61, 62, 63])])  # an answer, then another question

    def two_turns(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kind, turn = annotate(tokens)
        kind[len(ids) - 1] = Kind.SPECIAL
        kind[len(ids) : len(ids) + 3] = Kind.ANSWER
        turn[len(ids) + 3 :] = 2
        return kind, turn

    model.annotate = two_turns
    kept = []
    for tokens in (ids, more):
        with torch.no_grad():
            model(input_ids=tokens[None], pixel_values=turn_one["pixel_values"])
        kept.append(list(model.last_pruning.language_kept[0].tolist()))
    entered = model.last_pruning.stage1.item() - (len(more) - len(ids))
    assert kept[0] == [t for t in kept[1] if t < entered]


def test_batches_may_share_images() -> None:
    """Two samples that point at the same row of pixel_values get what two copies of the image would give."""
    hf = tiny_llava()
    model = packed(hf, "twostage")
    inputs = tiny_inputs([1, 1], [7, 7])
    same = torch.cat([inputs["pixel_values"][:1]] * 2)
    ids, valid = inputs["input_ids"], inputs["attention_mask"].bool()
    sequence = pack(ids, valid, len(same), IMAGE_TOKEN, annotate=annotate, features=PATCHES)
    shared = PackedSequence(**{**sequence.__dict__, "image": sequence.image.clamp(max=0)})
    with torch.no_grad():
        twice = model.forward_packed(sequence, same)
        once = model.forward_packed(shared, same[:1])
    torch.testing.assert_close(once.hidden, twice.hidden)
    assert len(once.trace.vision_kept) == 1
