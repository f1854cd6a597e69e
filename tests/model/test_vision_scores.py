"""Stage-1 scores against the attention that transformers itself computes."""

from __future__ import annotations

import copy

import pytest
import torch
from largest import Largest
from loaded import VISION_SCORES, with_weights
from tiny import PATCHES, VISION, packed, tiny_inputs, tiny_llava
from transformers import (
    AutoModel,
    PreTrainedModel,
    Siglip2VisionConfig,
    SiglipVisionConfig,
)

from mmprune_train.config import pruner_fits as parts
from mmprune_train.config.schema import EncoderConfig, StageConfig
from mmprune_train.errors import UserError
from mmprune_train.model.flops import StepFlops
from mmprune_train.model.vision import encode, family_of
from mmprune_train.pruning import find_knee
from mmprune_train.pruning.parts import possible_scores
from mmprune_train.pruning.views import VisionView
from mmprune_train.pruning.vision_scores import even_order
from mmprune_train.training.freezing import freeze, store_frozen


def view_of(tower: PreTrainedModel, images: int = 2, side: int = 24) -> VisionView:
    """What an encoder shows of random images at its last layer but one."""
    with torch.no_grad():
        return encode(tower, torch.randn(images, 3, side, side), -2, drop_cls=True)[1]


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
        costs = more or pruned.scorer is not None
        assert (StepFlops(pruned).vision.total > StepFlops(model).vision.total) == costs


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
        with torch.no_grad():
            scores = VISION_SCORES[score](with_weights(view, score))
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


@pytest.mark.parametrize("score", VISION_SCORES)
def test_no_stage_one_score_holds_patches_times_patches(score: str) -> None:
    vision = "siglip" if score == "map_attention" else "clip"
    config = type(VISION[vision]())(**VISION[vision]().to_dict() | {"image_size": 256})
    view = view_of(AutoModel.from_config(config), images=1, side=256)
    patches = view.patches.shape[1]
    joint = torch.nn.Linear(view.patches.shape[2], 16)
    view.question = lambda normed: (joint(view.block_output()), torch.randn(1, 16))
    view = with_weights(view, score, question_width=16)
    even_order.cache_clear()
    with Largest() as largest, torch.no_grad():
        VISION_SCORES[score](view)
    assert 0 < largest.entries < patches**2 / 4  # 1024 patches
