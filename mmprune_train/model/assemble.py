"""Hugging Face parts, each with its weights, put together as LLaVA."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mmprune_train.config.schema import EncoderConfig, LlmConfig
from mmprune_train.data.images import image_processor
from mmprune_train.errors import UserError
from mmprune_train.model.arch import arch_config, described
from mmprune_train.model.language import check_language_model
from mmprune_train.model.projector import new_projector
from mmprune_train.model.tokenizer import IMAGE_TOKEN
from mmprune_train.model.vision import check_patches, family_of
from mmprune_train.model.weights.auto import config_of
from mmprune_train.model.weights.files import Tensors, read_tensors
from mmprune_train.model.weights.original import BESIDE_LLM
from mmprune_train.model.weights.outline import load_whole

VOCAB_MULTIPLE = 64
"""A vocabulary that must grow for the image token grows to a multiple of this, as llava-hf's folders do."""


def vision_tower(
    cfg: EncoderConfig, folder: Path | None, dtype: torch.dtype, empty: bool = False, inside: Tensors | None = None
) -> PreTrainedModel:
    """The encoder with its weights (random without a folder). No key of a module that runs may be missing.

    Args:
        empty: the weights are not read.
        inside: the weights, where they lie inside an original LLaVA checkpoint and not in a folder.
    """
    config = arch_config("encoder.arch", cfg.arch) if folder is None else config_of(folder)
    config = getattr(config, "vision_config", config)
    family_of(config.model_type)
    found = {"hidden_size": config.hidden_size, "num_hidden_layers": config.num_hidden_layers}
    if {**found, **cfg.arch} != {**cfg.arch, **found}:
        raise UserError(
            f"encoder.path: {folder} holds a {config.model_type} of width {config.hidden_size} and "
            f"{config.num_hidden_layers} layers, encoder={cfg.name} describes another; choose the fitting encoder="
        )
    with torch.device("meta"), described("encoder.arch" if folder is None else str(folder), cfg.arch):
        outline = AutoModel.from_config(config)
    check_patches(outline, cfg)
    if inside and not empty:
        source = f"{next(iter(inside.values())).file.parent} (its vision tower)"
        return load_whole(type(outline), None, source, config=config, state_dict=read_tensors(inside), dtype=dtype)
    if folder is None or empty:
        return AutoModel.from_config(config, dtype=dtype)
    # A whole CLIP or SigLIP folder also holds the text tower, a ViT or DINOv2 folder may hold a classifier instead of
    # ViT's pooler; this model runs none of them.
    foreign = ("text_model", "text_projection", "visual_projection", "logit_", "classifier")
    return load_whole(type(outline), folder, beside=foreign, absent=("pooler.",), config=config, dtype=dtype)


def language_model(
    cfg: LlmConfig,
    folder: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    empty: bool = False,
    original: PreTrainedConfig | None = None,
) -> PreTrainedModel:
    """The LLM with its head (random without a folder), its vocabulary grown where it is smaller than the tokenizer's.

    Args:
        empty: the weights are not read.
        original: the LLM's config, where the folder is an original LLaVA checkpoint.
    """
    if folder is None or empty:
        config = original or (arch_config("llm.arch", cfg.arch) if folder is None else config_of(folder))
        check_language_model(config)
        with described("llm.arch" if folder is None else str(folder), cfg.arch):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    elif original is not None:
        model = load_whole(AutoModelForCausalLM, folder, beside=BESIDE_LLM, config=original, dtype=dtype)
    else:
        model = load_whole(AutoModelForCausalLM, folder, dtype=dtype)
    if len(tokenizer) > model.config.vocab_size:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=VOCAB_MULTIPLE, mean_resizing=False)
    return model


def llava_config(
    encoder: EncoderConfig, vision: PreTrainedConfig, text: PreTrainedConfig, projector: str, image_token: int
) -> LlavaConfig:
    """LLaVA's config for an encoder and an LLM; keeps copies of theirs."""
    return LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_index=image_token,
        image_seq_length=encoder.patches,
        projector_hidden_act="linear" if projector == "linear" else "gelu",
        vision_feature_select_strategy="default" if encoder.has_cls else "full",
        vision_feature_layer=encoder.feature_layer,
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )


def assemble(
    config: LlavaConfig, vision: PreTrainedModel, language: PreTrainedModel, init: str = "torch"
) -> LlavaForConditionalGeneration:
    """Put a tower and an LLM, as they are, into a LLaVA with a new projector; nothing is initialised twice."""
    with torch.device("meta"):
        hf = LlavaForConditionalGeneration(config)
    hf.model.vision_tower = vision
    hf.model.language_model = language.model
    hf.lm_head = language.lm_head
    hf.model.multi_modal_projector = new_projector(config, init).to(language.dtype)
    if language.generation_config is not None:
        hf.generation_config = language.generation_config
    return hf


def new_processor(
    encoder: EncoderConfig, tokenizer: PreTrainedTokenizerBase, aspect_ratio: str = "square"
) -> LlavaProcessor:
    """The processor of such a LLaVA; its tokenizer pads on the left from here on, for `generate`."""
    tokenizer.padding_side = "left"
    return LlavaProcessor(
        image_processor=image_processor(encoder, aspect_ratio),
        tokenizer=tokenizer,
        patch_size=encoder.patch_size,
        vision_feature_select_strategy="default" if encoder.has_cls else "full",
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=int(encoder.has_cls),
    )
