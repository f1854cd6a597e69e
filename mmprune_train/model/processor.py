"""A model folder's processor, held to its config and its vision tower: they must agree on what an image is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from mmprune_train.errors import UserError
from mmprune_train.model.vision import embedded, family_of, feature_indices
from mmprune_train.model.weights.auto import processor_of, retold
from mmprune_train.storage.user_files import reason_of

BLANKS = ((64, 48), (48, 64))
"""Sizes of two blank images, which a processor makes the same size."""


def load_processor(folder: Path | str, hf: LlavaForConditionalGeneration) -> LlavaProcessor:
    """The processor of a model folder or hub id, padding on the left for `generate`.

    What its files leave out of `patch_size`, `num_additional_image_tokens` and `vision_feature_select_strategy` is
    filled in from the model (huggingface/transformers#36002).

    Args:
        hf: the folder's model. Its tower runs on blank pixels as far as the embeddings; it may be on the meta device.
            `image_seq_length` of its config is set where that is left at transformers' default.
    Raises:
        UserError: no processor loads, or the image token, the size of images or the number of their tokens is not the
            model's; names the file and both.
    """
    told = f"{folder}: its processor (tokenizer and image processor) does not load"
    with retold(lambda error: f"{told}: {reason_of(error)}"):
        processor: Any = processor_of(folder)
    if not isinstance(processor, LlavaProcessor):
        raise UserError(f"{folder}: its processor is a {type(processor).__name__}, LLaVA's is a LlavaProcessor")
    config = hf.config
    _check_image_token(processor, config, folder)
    tower: Any = hf.model.vision_tower
    feature_indices(config.vision_feature_layer, len(family_of(tower.config.model_type).layers(tower)))
    height, width = _prepared_size(processor, folder)
    sizes = (
        f"{folder}: crop_size or size in preprocessor_config.json or processor_config.json makes images of {width} x "
        f"{height} pixels, image_size of the vision tower in config.json is {getattr(tower.config, 'image_size', None)}"
    )
    with retold(lambda _: f"{sizes}; correct the wrong one", (ValueError, RuntimeError)):
        tokens = embedded(tower, height, width) - (config.vision_feature_select_strategy == "default")
    if config.image_seq_length == LlavaConfig().image_seq_length:
        config.image_seq_length = tokens
    if config.image_seq_length != tokens:
        raise UserError(
            f"{folder}/config.json: image_seq_length={config.image_seq_length}, but its vision tower makes {tokens} "
            f"features of an image of {width} x {height} pixels; correct or remove the key"
        )
    stated, _ = LlavaProcessor.get_processor_dict(folder)
    wrong = []
    for key, value in {
        "patch_size": config.vision_config.patch_size,
        "num_additional_image_tokens": int(family_of(config.vision_config.model_type).has_cls),
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
    }.items():
        if stated.get(key) is None:
            setattr(processor, key, value)
        elif stated[key] != value:
            wrong.append(f"{key}={stated[key]} (the model's is {value})")
    written = _written(processor)
    if written != tokens:
        raise UserError(
            f"{folder}/processor_config.json: {', '.join(wrong)} would write {written} image tokens for an image, of "
            f"which the vision tower makes {tokens} features; correct it"
        )
    processor.tokenizer.padding_side = "left"
    return processor


def _check_image_token(processor: LlavaProcessor, config: LlavaConfig, folder: Path | str) -> None:
    token, expected = processor.image_token, config.image_token_id
    ids = processor.tokenizer.encode(token, add_special_tokens=False)
    if len(ids) > 1 or token not in processor.tokenizer.get_vocab():
        raise UserError(
            f"{folder}: its tokenizer does not know {token} as one token, which config.json gives the id {expected}; "
            "take the tokenizer files that belong to the model"
        )
    if ids != [expected]:
        raise UserError(
            f"{folder}/config.json: image_token_id is {expected}, but {token} is {ids[0]} to its tokenizer; correct "
            "the config, or take the tokenizer files that belong to the model"
        )


def _prepared_size(processor: LlavaProcessor, folder: Path | str) -> tuple[int, int]:
    """Height and width of what the image processor makes of any image."""
    where = f"{folder}: its image processor (preprocessor_config.json or processor_config.json)"
    shapes = set()
    for size in BLANKS:
        with retold(lambda error: f"{where} does not work: {error or type(error).__name__}; correct its settings"):
            pixels = processor.image_processor(images=Image.new("RGB", size), return_tensors="pt")["pixel_values"]
        shapes.add(tuple(pixels.shape))
    if len(shapes) > 1 or len(next(iter(shapes))) != 4:
        told = " and ".join(str(list(shape)) for shape in sorted(shapes))
        raise UserError(f"{where} gives pixels {told}, LLaVA reads one square of each image; set do_center_crop=true")
    _, _, height, width = shapes.pop()
    return height, width


def _written(processor: LlavaProcessor) -> int | str:
    """Image tokens that the processor writes for an image; what is wrong where it can write none."""
    blank = Image.new("RGB", BLANKS[0])
    try:
        ids = processor(images=[blank], text=[processor.image_token], return_tensors="pt")["input_ids"]
    except Exception as error:  # a patch size of 0, of text
        return f"no number of ({type(error).__name__}: {error})"
    return int((ids == processor.image_token_id).sum())
