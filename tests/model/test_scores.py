"""Scores against the attention that transformers itself computes, and stage 2 against a slow re-derivation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from loaded import LANGUAGE_SCORES, VISION_SCORES
from tiny import IMAGE_TOKEN, PATCHES, TEXT, VISION, annotate, packed, tiny_inputs, tiny_llava
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModel,
    Gemma2Config,
    MistralConfig,
    PreTrainedModel,
    Siglip2VisionConfig,
    SiglipVisionConfig,
)

from mmprune_train.config import pruner_fits as parts
from mmprune_train.config.schema import EncoderConfig, StageConfig
from mmprune_train.errors import UserError
from mmprune_train.model.flops import StepFlops
from mmprune_train.model.inputs import pack
from mmprune_train.model.language import ScoringKeys, check_language_model, rotary
from mmprune_train.model.vision import encode, family_of
from mmprune_train.pruning import Kind, PackedSequence, find_knee
from mmprune_train.pruning.parts import possible_scores
from mmprune_train.pruning.turns import QueryGroups
from mmprune_train.pruning.views import LanguageView, VisionView
from mmprune_train.pruning.vision_scores import even_order
from mmprune_train.training.freezing import freeze, store_frozen


def view_of(tower: PreTrainedModel, images: int = 2, side: int = 24) -> VisionView:
    """What an encoder shows of random images at its last layer but one."""
    with torch.no_grad():
        return encode(tower, torch.randn(images, 3, side, side), -2, drop_cls=True)[1]


# ---------------------------------------------------------------------- stage 1


@pytest.mark.parametrize("vision", ["clip", "dinov2", "vit"])
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


@pytest.mark.parametrize("vision", VISION)
def test_scores_on_features_are_what_transformers_states_give(vision: str) -> None:
    tower = tiny_llava(vision).model.vision_tower
    pixels = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        states = tower(pixels, output_hidden_states=True).hidden_states[-2]
        _, view = encode(tower, pixels, -2, drop_cls=True)
    cls, patches = (None, states) if vision == "siglip" else (states[:, :1], states[:, 1:])
    norm = patches.norm(dim=-1)
    torch.testing.assert_close(VISION_SCORES["feature_norm"](view), norm)
    mean = patches.mean(1, keepdim=True)
    expected = (patches * mean).sum(-1) / norm / mean.norm(dim=-1)
    torch.testing.assert_close(VISION_SCORES["pooled_cosine"](view), expected)
    if cls is not None:
        expected = (patches * cls).sum(-1) / norm / cls.norm(dim=-1)
        torch.testing.assert_close(VISION_SCORES["cls_cosine"](view), expected)


def test_map_attention_is_the_pooling_heads_own() -> None:
    tower = tiny_llava("siglip").model.vision_tower
    pixels = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        torch.nn.init.normal_(tower.head.attention.in_proj_bias)
        _, view = encode(tower, pixels, -2, drop_cls=False)
        last = tower(pixels).last_hidden_state  # normed, as the head gets it
        probe = tower.head.probe.expand(2, -1, -1)
        weights = tower.head.attention(probe, last, last, need_weights=True)[1]  # [I, 1, N], mean over heads
    torch.testing.assert_close(VISION_SCORES["map_attention"](view), weights[:, 0], rtol=1e-5, atol=1e-6)


def test_only_map_attention_runs_the_layers_after_the_feature_layer() -> None:
    model = packed(tiny_llava("siglip"))
    ran: list[int] = []
    for index, layer in enumerate(model.hf.model.vision_tower.encoder.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    for score in possible_scores(view_of(model.hf.model.vision_tower)):
        pruned = packed(model.hf, {"name": "encoder_only", "vision": {"score": score}})
        ran.clear()
        pruned.kept_features(torch.randn(1, 3, 24, 24))
        more = score == "map_attention"
        assert ran == ([0, 1, 2] if more else [0, 1]), score
        assert (StepFlops(pruned).vision.total > StepFlops(model).vision.total) == more


@pytest.mark.parametrize("trained", [False, True])
def test_map_attention_needs_no_gradient_and_survives_frozen_weights_in_half_precision(trained: bool) -> None:
    model = packed(tiny_llava("siglip"), {"name": "encoder_only", "vision": {"score": "map_attention"}})
    inputs = tiny_inputs([1, 1], [7, 9])
    with torch.no_grad():
        model(**inputs)
    full = model.last_pruning.vision_scores
    freeze(model, StageConfig(train_vision=trained), adapters=False)
    store_frozen(model, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    torch.testing.assert_close(model.last_pruning.vision_scores, full, rtol=0.02, atol=1e-3)
    tower = model.hf.model.vision_tower
    assert (tower.encoder.layers[1].mlp.fc1.weight.grad is not None) == trained
    assert all(p.grad is None for part in (tower.encoder.layers[2], tower.head) for p in part.parameters())


@pytest.mark.parametrize("score", VISION_SCORES)
@pytest.mark.parametrize("vision", VISION)
def test_every_encoder_gives_its_scores_or_says_which_it_can_give(vision: str, score: str) -> None:
    view = view_of(tiny_llava(vision).model.vision_tower)
    possible = possible_scores(view)
    if score in possible:
        scores = VISION_SCORES[score](view)
        assert scores.shape == (2, PATCHES) and scores.dtype == torch.float32 and scores.isfinite().all()
    else:
        words = f"score={score} needs .* which {view.encoder} does not have; .*: {', '.join(possible)}$"
        with pytest.raises(UserError, match=words):
            VISION_SCORES[score](view)


def test_a_siglip_without_its_head_has_no_map_attention() -> None:
    config = SiglipVisionConfig(**VISION["siglip"]().to_dict() | {"vision_use_head": False})
    view = view_of(AutoModel.from_config(config))
    assert "map_attention" not in possible_scores(view)
    with pytest.raises(UserError, match="map_attention needs an attention pooling head.*pooled_cosine"):
        VISION_SCORES["map_attention"](view)


GRIDS = [(1, 1), (1, 5), (3, 3), (6, 9), (8, 8), (16, 16), (24, 24), (27, 27), (37, 37)]


@pytest.mark.parametrize(("rows", "columns"), GRIDS)
def test_uniform_grid_leaves_no_hole_whatever_the_count(rows: int, columns: int) -> None:
    order = even_order(rows, columns)
    assert sorted(order.tolist()) == list(range(rows * columns))
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()
    by_rank = places[order.argsort()]
    to_kept = torch.cdist(places, by_rank).cummin(1).values.max(0).values  # [N] farthest cell when k are kept
    for k, distance in enumerate(to_kept.tolist(), start=1):
        assert distance <= 2 * (rows * columns / k) ** 0.5, k


@pytest.mark.parametrize("side", [24, 27, 37])
def test_uniform_grid_is_centred(side: int) -> None:
    by_rank = even_order(side, side).argsort()
    places = (torch.stack([by_rank // side, by_rank % side]) + 0.5) / side
    middle = places.cumsum(1) / torch.arange(1, side**2 + 1)  # of the first k
    assert (middle - 0.5).abs().max() < 0.25
    assert (middle[:, 3:] - 0.5).abs().max() < 0.13


@pytest.mark.parametrize("side", [8, 16, 32])
def test_uniform_grid_has_one_patch_in_every_block(side: int) -> None:
    order = even_order(side, side).view(side, side)
    for block in (side // 2, side // 4, 2):
        count = (side // block) ** 2
        kept = (order < count).float()[None]
        assert (torch.nn.functional.avg_pool2d(kept, block) * block**2 == 1).all()


def test_uniform_grid_is_the_same_for_every_image_and_falls_in_equal_steps() -> None:
    scores = VISION_SCORES["uniform_grid"](view_of(tiny_llava().model.vision_tower, images=3))
    assert torch.equal(scores[0], scores[2])
    steps = scores[0].sort(descending=True).values.diff()
    torch.testing.assert_close(steps, torch.full_like(steps, -1 / PATCHES))
    assert find_knee(scores, "kneedle").tolist() == [PATCHES] * 3


def test_one_feature_layer_is_all_that_runs() -> None:
    tower = tiny_llava().model.vision_tower
    ran = []
    for index, layer in enumerate(tower.encoder.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    with torch.no_grad():
        both, _ = encode(tower, torch.randn(1, 3, 24, 24), [-3, -2], drop_cls=True)
    assert ran == [0, 1] and both.shape == (1, PATCHES, 64)


def test_an_encoder_that_llava_cannot_feed_is_refused_with_the_one_to_take() -> None:
    with pytest.raises(
        UserError, match="clip_vision_model, dinov2, siglip_vision_model, vit.*fixed-resolution SigLIP 2"
    ):
        family_of(Siglip2VisionConfig().model_type)


# ---------------------------------------------------------------------- both stages


@pytest.mark.parametrize("vision", VISION)
def test_the_config_knows_which_scores_an_encoder_can_give(vision: str) -> None:
    arch = VISION[vision]().to_dict()
    described = EncoderConfig(arch=arch, has_cls=family_of(arch["model_type"]).has_cls)
    assert parts.possible_scores(described) == possible_scores(view_of(tiny_llava(vision).model.vision_tower))


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.entries = max([self.entries, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))])
        return out


@pytest.mark.parametrize("score", VISION_SCORES)
def test_no_stage_one_score_holds_patches_times_patches(score: str) -> None:
    vision = "siglip" if score == "map_attention" else "clip"
    config = type(VISION[vision]())(**VISION[vision]().to_dict() | {"image_size": 256})
    view = view_of(AutoModel.from_config(config), images=1, side=256)
    patches = view.patches.shape[1]
    joint = torch.nn.Linear(view.patches.shape[2], 16)
    view.question = lambda normed: (joint(view.block_output()), torch.randn(1, 16))
    even_order.cache_clear()
    with Largest() as largest, torch.no_grad():
        VISION_SCORES[score](view)
    assert 0 < largest.entries < patches**2 / 4  # 1024 patches


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
        groups = QueryGroups("first", zeros[:1], zeros[:1] + 1, place[-9:-1], zeros[:8], place[-1:])
        view = LanguageView(sequence, hidden, keys, groups)
        with Largest() as largest:
            LANGUAGE_SCORES[score](view)
    assert 0 < largest.entries < length**2 / 4


# ---------------------------------------------------------------------- stage 2


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
