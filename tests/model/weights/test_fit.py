"""The configs that are published for LLaVA-1.5 7B fit the 7B experiments as they are, and no others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmprune_train.config.compose import compose_config
from mmprune_train.errors import UserError
from mmprune_train.model.weights import fit
from mmprune_train.model.weights.files import Entry
from mmprune_train.model.weights.folders import look

LLAVA_HF = {
    "model_type": "llava",
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "text_config": {
        "model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "vocab_size": 32064,
    },
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
        "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
    },
}  # fmt: skip
ORIGINAL = {
    "model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "hidden_size": 4096, "max_length": 4096,
    "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "vocab_size": 32000, "rms_norm_eps": 1e-05, "rope_scaling": None, "pretraining_tp": 1, "image_aspect_ratio": "pad",
    "mm_hidden_size": 1024, "mm_projector_type": "mlp2x_gelu", "mm_resampler_type": None,
    "mm_use_im_patch_token": False, "mm_use_im_start_end": False, "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2, "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "tune_mm_mlp_adapter": False, "unfreeze_mm_vision_tower": False, "use_mm_proj": True,
}  # fmt: skip


class Tokenizer:
    """Knows its image token."""

    def convert_tokens_to_ids(self, _: str) -> int:
        return 32000


def entry(*shape: int) -> Entry:
    return Entry(Path("shard"), "", shape, "F16")


PROJECTOR = {
    "model.mm_projector.0.weight": entry(4096, 1024),
    "model.mm_projector.0.bias": entry(4096),
    "model.mm_projector.2.weight": entry(4096, 4096),
    "model.mm_projector.2.bias": entry(4096),
}


@pytest.mark.parametrize(("published", "tensors"), [(LLAVA_HF, {}), (ORIGINAL, PROJECTOR)])
def test_published_configs_fit_the_seven_billion_experiment(
    published: dict, tensors: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "load_tokenizer", lambda *_: Tokenizer())
    (tmp_path / "config.json").write_text(json.dumps(published))
    found = look("init_from", tmp_path)
    fit.check_fit(compose_config(["+experiment=llava7b_twostage"]), "init_from", found, tensors)
    with pytest.raises(UserError, match=r"llm.arch.hidden_size=5120, there 4096; .*num_hidden_layers=40, there 32"):
        fit.check_fit(compose_config(["+experiment=llava13b_twostage"]), "init_from", found, tensors)
