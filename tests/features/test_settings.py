"""What the features of an image depend on has another folder in the cache, and nothing else has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from features.counted import ENCODER
from tiny import VISION, packed, tiny_llava

from mmprune_train.config.compose import load_pruner
from mmprune_train.config.schema import EncoderConfig
from mmprune_train.data.images import image_processor
from mmprune_train.features import settings as settings_module
from mmprune_train.features.settings import feature_settings, folder_name
from mmprune_train.model.llava import PackedLlava
from mmprune_train.pruning import Pruner


def change_weights(model: PackedLlava) -> None:
    with torch.no_grad():
        next(model.hf.model.vision_tower.parameters()).view(-1)[0] += 1e-3


def change_projector(model: PackedLlava) -> None:
    with torch.no_grad():
        model.hf.model.multi_modal_projector.linear_1.weight[0, 0] += 1e-3


def with_pruner(**vision: Any) -> Callable[[PackedLlava], None]:
    def change(model: PackedLlava) -> None:
        model.pruner = Pruner(load_pruner({"name": "x", "vision": vision}))

    return change


def key(
    model: PackedLlava,
    encoder: EncoderConfig = ENCODER,
    aspect: str = "square",
    dtype: Any = torch.float32,
    upright: bool = True,
) -> str:
    return folder_name("tiny", feature_settings(model, image_processor(encoder, aspect, upright).to_dict(), dtype))


@pytest.mark.parametrize(
    "change",
    [
        change_weights,
        with_pruner(score="cls_cosine"),
        with_pruner(layer=0),
        with_pruner(knee={"method": "max_chord"}),
        with_pruner(knee={"min_tokens": 3}),
        with_pruner(selection="max_min"),
        with_pruner(merge="nearest"),
        with_pruner(order="rank"),
        with_pruner(enabled=False),
        lambda model: setattr(model.config, "vision_feature_layer", -1),
        lambda model: setattr(model.config, "vision_feature_select_strategy", "full"),
        lambda model: setattr(model.hf.model.vision_tower.config, "hidden_act", "gelu"),
    ],
)
def test_a_changed_model_or_stage_1_misses(change: Callable[[PackedLlava], None]) -> None:
    model = packed(tiny_llava(), {"name": "x"})
    before = key(model)
    change(model)
    assert key(model) != before


def test_changed_preparation_precision_and_format_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed(tiny_llava(), "twostage")
    keys = [
        key(model),
        key(model, replace(ENCODER, image_size=32)),
        key(model, replace(ENCODER, image_mean=[0.5, 0.5, 0.5])),
        key(model, replace(ENCODER, image_std=[0.5, 0.5, 0.5])),
        key(model, aspect="pad"),
        key(model, upright=False),
        key(model, dtype=torch.bfloat16),
    ]
    monkeypatch.setattr(settings_module, "FORMAT", settings_module.FORMAT + 1)
    keys.append(key(model))
    monkeypatch.setattr(settings_module, "version", lambda name: "0")
    keys.append(key(model))
    assert len(set(keys)) == 9


def test_the_projector_counts_where_stage_1_looks_through_it_and_only_there() -> None:
    for pruner, counts in (("twostage", False), ("divprune", True)):
        model = packed(tiny_llava(), pruner)
        before = key(model)
        change_projector(model)
        assert (key(model) != before) == counts


def test_a_changed_function_of_the_users_misses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    source = tmp_path / "my_score_of_features.py"
    source.write_text("def score(view):\n    return view.patches.norm(dim=-1)\n")
    model = packed(tiny_llava(), {"name": "x", "vision": {"score": "my_score_of_features:score"}})
    before = key(model)
    assert key(model) == before
    source.write_text("def score(view):\n    return -view.patches.norm(dim=-1)\n")
    assert key(model) != before


def test_what_happens_after_stage_1_does_not_count() -> None:
    one = packed(tiny_llava(), "twostage")
    other = packed(tiny_llava(), {"name": "y", "vision": {"positions": "original"}, "language": {"layer": 1}})
    assert key(one) == key(other)


@pytest.mark.parametrize("vision", list(VISION))
def test_a_saved_and_loaded_encoder_is_the_same(vision: str, tmp_path: Path) -> None:
    """The second stage starts from the first one's folder."""
    from transformers import LlavaForConditionalGeneration

    hf = tiny_llava(vision)
    pruner = {"name": "x", "vision": {"score": "pooled_cosine"}}
    before = key(packed(hf, pruner))
    hf.save_pretrained(tmp_path)
    assert key(packed(LlavaForConditionalGeneration.from_pretrained(tmp_path), pruner)) == before
