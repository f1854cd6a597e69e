"""Tiny random models shared by the tests: every supported encoder and LLM family, in milliseconds."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    Dinov2Config,
    GemmaConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
    ViTConfig,
)

from mmprune_train.config.compose import load_pruner
from mmprune_train.model.execution import Execution
from mmprune_train.model.llava import PackedLlava
from mmprune_train.model.question import QuestionEncoder, tiny_question_tokenizer
from mmprune_train.pruning import Kind, Pruner

IMAGE_TOKEN = 3
VOCAB = 128
SIDE = 24
PATCHES = 9

VISION = {
    "clip": lambda: CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE, patch_size=8
    ),
    "dinov2": lambda: Dinov2Config(
        hidden_size=32, mlp_ratio=2, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8
    ),
    "siglip": lambda: SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE, patch_size=8
    ),
    "vit": lambda: ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE, patch_size=8
    ),
}
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TEXT = {
    "llama": lambda: LlamaConfig(**_SHAPE),
    "qwen2": lambda: Qwen2Config(**_SHAPE, use_sliding_window=False),
    "qwen3": lambda: Qwen3Config(**_SHAPE, head_dim=12, use_sliding_window=False),
    "mistral": lambda: MistralConfig(**_SHAPE, sliding_window=None),
    "phi3": lambda: Phi3Config(**_SHAPE, rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
    "gemma": lambda: GemmaConfig(**_SHAPE, head_dim=12),
}


def tiny_llava(vision: str = "clip", text: str = "llama", seed: int = 0) -> LlavaForConditionalGeneration:
    """A random LLaVA of one encoder and one LLM family, in eval mode, with weights large enough to matter."""
    torch.manual_seed(seed)
    language = TEXT[text]()
    config = LlavaConfig(
        vision_config=VISION[vision](),
        text_config=language,
        image_token_index=IMAGE_TOKEN,
        image_seq_length=PATCHES,
        vision_feature_select_strategy="full" if vision == "siglip" else "default",
        tie_word_embeddings=language.tie_word_embeddings,
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name:
                parameter.normal_(0, 0.15)
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    return model


def tiny_inputs(images: list[int], text: list[int], pad_left: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """A padded batch: sample b has images[b] images and text[b] text tokens, the images after the second token."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for n_images, n_text in zip(images, text, strict=True):
        words = torch.randint(4, VOCAB, (n_text,), generator=generator)
        words[0] = 1
        rows.append(torch.cat([words[:2], torch.full((n_images * PATCHES,), IMAGE_TOKEN), words[2:]]))
    longest = max(map(len, rows))
    ids = torch.zeros((len(rows), longest), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        part = slice(longest - len(tokens), None) if pad_left else slice(0, len(tokens))
        ids[row, part] = tokens
        mask[row, part] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if sum(images):
        inputs["pixel_values"] = torch.randn((sum(images), 3, SIDE, SIDE), generator=generator)
    return inputs


def rows_of(inputs: dict[str, Tensor], images: list[int]) -> list[dict[str, Tensor]]:
    """The samples of a padded batch one by one, without padding."""
    rows, start = [], 0
    for row, count in enumerate(images):
        keep = inputs["attention_mask"][row].bool()
        one = {"input_ids": inputs["input_ids"][row, keep][None], "attention_mask": torch.ones((1, int(keep.sum())))}
        if count:
            one["pixel_values"] = inputs["pixel_values"][start : start + count]
        start += count
        rows.append(one)
    return rows


def annotate(ids: Tensor) -> tuple[Tensor, Tensor]:
    """One turn; the first and last tokens are special, images visual, the rest question text."""
    kind = torch.where(ids == IMAGE_TOKEN, Kind.VISUAL, Kind.PROMPT)
    kind[[0, -1]] = Kind.SPECIAL
    return kind, torch.ones_like(ids)


def words(ids: Tensor) -> str:
    """What the ids of the tiny LLMs say."""
    return " ".join(chr(ord("a") + id % 26) + chr(ord("a") + id // 26) for id in ids.tolist())


def spell(text: str) -> list[int]:
    """The ids behind `words`."""
    return [ord(word[0]) - ord("a") + 26 * (ord(word[1]) - ord("a")) for word in text.split()]


def tiny_clip(hf: LlavaForConditionalGeneration, seed: int = 3) -> CLIPModel:
    """A whole CLIP around a model's vision tower, its text side random; read by `tiny_question_tokenizer`."""
    torch.manual_seed(seed)
    text = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"vocab_size": 513, "bos_token_id": 1, "eos_token_id": 512, "pad_token_id": 0}
    vision = hf.config.vision_config.to_dict()
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    with torch.no_grad():
        for name, parameter in clip.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
            elif "norm" in name:
                parameter.add_(torch.rand_like(parameter))
    clip.vision_model.load_state_dict(hf.model.vision_tower.state_dict())
    return clip


def packed(hf: LlavaForConditionalGeneration, pruner: object = "none", **execution: Any) -> PackedLlava:
    """A copy of a Hugging Face model, walked packed with a pruner; with `tiny_clip`'s text tower where that reads.

    Args:
        execution: fields of `Execution`.
    """
    chosen, question = Pruner(load_pruner(pruner)), None
    if chosen.reads_tower:
        question = QuestionEncoder(tiny_clip(hf), tiny_question_tokenizer())
    model = PackedLlava(copy.deepcopy(hf), chosen, annotate, "v1", question, words, Execution(**execution), spell)
    return model.eval()


def labels_of(inputs: dict[str, Tensor]) -> Tensor:
    """Every text token but the first is to be predicted."""
    ids = inputs["input_ids"]
    return ids.masked_fill((inputs["attention_mask"] == 0) | (ids == IMAGE_TOKEN) | (ids == 1), -100)
