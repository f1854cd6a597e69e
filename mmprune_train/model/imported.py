"""Checkpoints of LLaVA's own code as models to be asked, joined with the parts that they leave to others, by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedModel

from mmprune_train.config.schema import EncoderConfig, LlmConfig
from mmprune_train.errors import UserError
from mmprune_train.model.assemble import assemble, language_model, llava_config, new_processor, vision_tower
from mmprune_train.model.tokenizer import IMAGE_TOKEN, load_tokenizer
from mmprune_train.model.vision import family_of
from mmprune_train.model.weights.auto import config_of
from mmprune_train.model.weights.files import Tensors, read_config, tensors_of
from mmprune_train.model.weights.folders import (
    LANGUAGE,
    ORIGINAL,
    PROJECTOR,
    PROJECTOR_BIN,
    Folder,
    check_folder,
    check_whole,
    look,
)
from mmprune_train.model.weights.original import (
    load_projector,
    projector_tensors,
    text_config,
    tower_tensors,
    unsupported,
)
from mmprune_train.model.weights.places import local_or_hub


@dataclass(frozen=True)
class Beside:
    """Folders or hub ids of the parts that such a checkpoint leaves to others, in place of those that it names."""

    encoder: str | Path | None = None
    llm: str | Path | None = None


def original_in(key: str, path: Path) -> Folder | None:
    """A checkpoint of LLaVA's own code, a projector, or one in the folder of the language model that it belongs to;
    None: the folder holds something else."""
    if path.is_file():
        beside = path.parent / "config.json"
        return Folder(path, PROJECTOR, read_config(key, beside) if beside.is_file() else {})
    found = look(key, path)
    if found.kind == LANGUAGE and (path / PROJECTOR_BIN).is_file():
        return Folder(path / PROJECTOR_BIN, PROJECTOR, {"_name_or_path": str(path)})
    if found.kind == PROJECTOR:
        return Folder(path / PROJECTOR_BIN, PROJECTOR, found.config)
    return found if found.kind == ORIGINAL else None


def import_llava(
    key: str, found: Folder, dtype: torch.dtype, empty: bool = False, beside: Beside = Beside()
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The network and processor of what `original_in` found, image preparation as its config.json says.

    Args:
        empty: on the meta device.
    Raises:
        UserError: a part is not named or not there, a tensor of it is missing or none of the network's, or it was
            trained with what this project does not do.
    """
    own, inside = found.config, found.kind == ORIGINAL
    tensors = check_whole(key, found) if inside else tensors_of(key, found.path)
    if wrong := unsupported(own, tensors):
        raise UserError(f"{key}: {found.path} was trained with {', '.join(wrong)}, which is not supported")
    projector = projector_tensors({name: entry for name, entry in tensors.items() if not inside or "mm_proj" in name})
    if not projector:
        raise UserError(
            f"{key}: {found.path} holds no projector that is known: 0.weight, 0.bias, 2.weight, 2.bias (mlp2x_gelu), "
            f"or weight and bias (linear), perhaps behind model.mm_projector.; it has {_some(tensors)}"
        )
    folder = _folder_of("encoder", beside.encoder, own.get("mm_vision_tower"), found)
    check_folder("encoder.path", folder, "encoder")
    encoder = _encoder(key, folder, own)
    if inside:
        llm, text = found.path, text_config(key, own)
    else:
        llm, text = _folder_of("llm", beside.llm, own.get("_name_or_path"), found), None
        check_folder("llm.path", llm, "llm")
    tokenizer = load_tokenizer(llm, key)
    with torch.device("meta" if empty else "cpu"):
        vision = vision_tower(encoder, folder, dtype, empty, tower_tensors(tensors))
        language = language_model(LlmConfig(name=llm.name), llm, tokenizer, dtype, empty, text)
        trained = (text or config_of(llm)).vocab_size
        kind = "mlp2x_gelu" if "linear_2.weight" in projector else "linear"
        _check_projector(key, found, projector, vision.config.hidden_size, language.config.hidden_size)
        image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        hf = assemble(llava_config(encoder, vision.config, language.config, kind, image_token), vision, language)
    if not empty:
        _mean_rows(language, trained)
        load_projector(hf.model.multi_modal_projector, projector)
    return hf.eval(), new_processor(encoder, tokenizer, "pad" if own.get("image_aspect_ratio") == "pad" else "square")


def _folder_of(part: str, given: str | Path | None, named: Any, found: Folder) -> Path:
    """Where the encoder or the LLM lies: as given, else as the checkpoint names it, in its own folder, beside that, or
    on the hub."""
    place = given or named
    if not place:
        what = "vision tower" if part == "encoder" else "language model"
        raise UserError(
            f"{found.path} does not say which {what} it belongs to; give {part}.path=FOLDER (load_model: {part}=FOLDER)"
        )
    own = (found.path if found.path.is_dir() else found.path.parent).resolve()
    near = [folder / str(place) for folder in (own, own.parent) if not given and (folder / str(place)).is_dir()]
    return near[0] if near else local_or_hub(f"{part}.path", str(place))


def _encoder(key: str, folder: Path, own: dict[str, Any]) -> EncoderConfig:
    """How this tower is used: its sizes from its own config, its colours from its own image processor."""
    config: Any = config_of(folder)
    vision = getattr(config, "vision_config", config)
    has_cls = family_of(vision.model_type).has_cls
    if has_cls and own.get("mm_vision_select_feature", "patch") != "patch":
        raise UserError(
            f"{key}: mm_vision_select_feature={own['mm_vision_select_feature']} in its config.json is not supported; "
            "LLaVA-1.5's checkpoints have patch"
        )
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        raise UserError(f"encoder.path: {folder} has no {file.name}, which says how colours are scaled; copy it there")
    colours = read_config("encoder.path", file)
    return EncoderConfig(
        name=folder.name,
        arch={"model_type": vision.model_type},
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        has_cls=has_cls,
        feature_layer=own.get("mm_vision_select_layer", -2),
        image_mean=colours["image_mean"],
        image_std=colours["image_std"],
    )


def _check_projector(key: str, found: Folder, projector: Tensors, inputs: int, outputs: int) -> None:
    wanted = {"linear_1.weight": (outputs, inputs), "linear_1.bias": (outputs,)}
    wanted |= {"linear_2.weight": (outputs, outputs), "linear_2.bias": (outputs,)}
    for name, entry in projector.items():
        if entry.shape != wanted[name]:
            raise UserError(
                f"{key}: {found.path} has {entry.name} of shape {list(entry.shape)}, this encoder and LLM need "
                f"{list(wanted[name])}: they are not those that it was trained between"
            )


@torch.no_grad()
def _mean_rows(language: PreTrainedModel, trained: int) -> None:
    """Rows that the vocabulary got for the image token, which nobody has trained: the mean of the others, whose logit
    is never the largest."""
    for weight in {id(m.weight): m.weight for m in (language.get_input_embeddings(), language.lm_head)}.values():
        weight[trained:] = weight[:trained].float().mean(0).to(weight.dtype)


def _some(tensors: Tensors) -> str:
    names = sorted(tensors)
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}" if names else "no tensor"
