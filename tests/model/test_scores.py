"""Scores against the attention that transformers itself computes, and stage 2 against a slow re-derivation."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import PATCHES, annotate, packed, tiny_inputs, tiny_llava

from mmprune_train.model.language import rotary, scoring_queries_keys
from mmprune_train.model.vision import encode
from mmprune_train.pruning import Kind, PackedSequence, find_knee
from mmprune_train.pruning.scores import VISION_SCORES


@pytest.mark.parametrize("vision", ["clip", "dinov2"])
def test_cls_attention_is_the_row_that_transformers_computes(vision: str) -> None:
    tower = copy.deepcopy(tiny_llava(vision).model.vision_tower)
    pixels = torch.randn(3, 3, 24, 24)
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        reference = tower(pixels, output_attentions=True, output_hidden_states=True)
        features, view = encode(tower, pixels, -2, drop_cls=True)
        score = VISION_SCORES["cls_attention"](view)
    torch.testing.assert_close(features, reference.hidden_states[-2][:, 1:])
    row = reference.attentions[-2][:, :, 0, 1:]  # the layer whose output is hidden state -2
    by_head = row / row.sum(-1, keepdim=True)  # softmax over the patches alone
    torch.testing.assert_close(score, by_head.mean(1), rtol=1e-5, atol=1e-6)


def test_cosine_scores_are_cosines() -> None:
    tower = tiny_llava().model.vision_tower
    pixels = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        states = tower(pixels, output_hidden_states=True).hidden_states[-2]
        _, view = encode(tower, pixels, -2, drop_cls=True)
    unit = states / states.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(VISION_SCORES["cls_cosine"](view), (unit[:, 1:] * unit[:, :1]).sum(-1))
    mean = states[:, 1:].mean(1, keepdim=True)
    expected = (unit[:, 1:] * (mean / mean.norm(dim=-1, keepdim=True))).sum(-1)
    torch.testing.assert_close(VISION_SCORES["pooled_cosine"](view), expected)


def test_one_feature_layer_is_all_that_runs() -> None:
    tower = tiny_llava().model.vision_tower
    ran = []
    for index, layer in enumerate(tower.encoder.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    with torch.no_grad():
        both, _ = encode(tower, torch.randn(1, 3, 24, 24), [-3, -2], drop_cls=True)
    assert ran == [0, 1] and both.shape == (1, PATCHES, 64)


@pytest.mark.parametrize("text", ["llama", "qwen2", "qwen3", "mistral"])
def test_recomputed_queries_and_keys_are_the_layers_own(text: str) -> None:
    hf = tiny_llava("clip", text)
    hf.set_attn_implementation("eager")
    language = hf.model.language_model
    ids = torch.randint(4, 128, (1, 10))
    with torch.no_grad():
        reference = language(ids, output_attentions=True, output_hidden_states=True)
        hidden = reference.hidden_states[2][0]
        cos, sin = rotary(language, hidden[None], torch.arange(10)[None])
        query, keys = scoring_queries_keys(language.layers[2], hidden, cos[0], sin[0])(torch.tensor([6, 9]))
    logits = torch.einsum("rhd,thd->hrt", query, keys.repeat_interleave(2, dim=1))
    future = torch.arange(10) > torch.tensor([6, 9])[:, None]
    chance = logits.masked_fill(future, -torch.inf).softmax(-1)
    torch.testing.assert_close(chance, reference.attentions[2][0][:, [6, 9]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ranking", ["per_kind", "joint"])
@pytest.mark.parametrize("images", [[1], [1, 0, 2, 1, 1]])
def test_stage_two_equals_a_slow_rederivation(images: list[int], ranking: str) -> None:
    """text_attention and kneedle, one sample at a time, from eager attention matrices of plain transformers."""
    hf = tiny_llava()
    model = packed(hf, {"name": "language_only", "language": {"layer": 2, "ranking": ranking}})
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
    sequence = model._pack(inputs["input_ids"], inputs["attention_mask"].bool(), same, None)
    shared = PackedSequence(**{**sequence.__dict__, "image": sequence.image.clamp(max=0)})
    with torch.no_grad():
        twice = model.forward_packed(sequence, same)
        once = model.forward_packed(shared, same[:1])
    torch.testing.assert_close(once.hidden, twice.hidden)
    assert len(once.trace.vision_kept) == 1
