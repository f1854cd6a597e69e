"""From names to a network: Hugging Face parts put together as LLaVA, freshly for training or from a saved folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
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

from mmprune_train.config.compose import load_pruner, saved_pruner
from mmprune_train.config.pruner import components, refuse_foreign
from mmprune_train.config.pruner_schema import PrunerConfig
from mmprune_train.config.schema import Config, EncoderConfig, LlmConfig, TextTowerConfig
from mmprune_train.data.images import image_processor
from mmprune_train.data.templates import template_name
from mmprune_train.errors import UserError
from mmprune_train.model.arch import arch_config, described
from mmprune_train.model.conversation import converse
from mmprune_train.model.execution import Execution
from mmprune_train.model.language import check_language_model
from mmprune_train.model.llava import PackedLlava
from mmprune_train.model.processor import load_processor
from mmprune_train.model.projector import new_projector
from mmprune_train.model.question import QuestionEncoder, find_question_encoder, new_question_encoder
from mmprune_train.model.scorer import has_scorer, load_scorer
from mmprune_train.model.tokenizer import IMAGE_TOKEN
from mmprune_train.model.vision import check_patches, family_of
from mmprune_train.model.weights.auto import config_of, retold
from mmprune_train.model.weights.files import Tensors, read_config, read_tensors
from mmprune_train.model.weights.folders import check_folder, model_folder
from mmprune_train.model.weights.original import BESIDE_LLM
from mmprune_train.model.weights.outline import load_whole
from mmprune_train.model.weights.places import local_or_hub
from mmprune_train.pruning import Pruner
from mmprune_train.storage.user_files import reason_of

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


def build_on_meta(config: Config, tower: PreTrainedModel | None = None) -> PackedLlava:
    """The run's network without weights, from the config alone: for planning, and for testing 7B models on a laptop.
    A `tower` with its weights takes the place of the config's without."""
    vision, text = arch_config("encoder.arch", config.encoder.arch), arch_config("llm.arch", config.llm.arch)
    image_token = text.vocab_size
    text.vocab_size = -(-(text.vocab_size + 1) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    with torch.device("meta"):
        with described("encoder.arch or llm.arch"):
            llava = llava_config(config.encoder, vision, text, config.projector.name, image_token)
            hf = LlavaForConditionalGeneration(llava)
        check_patches(hf.model.vision_tower, config.encoder)
        if config.projector.name == "linear":
            hf.model.multi_modal_projector.linear_2.requires_grad_(False)
        pruner = Pruner(config.pruner)
        question = new_question_encoder(config.encoder, None, torch.float32) if pruner.reads_tower else None
    hf.model.vision_tower = tower or hf.model.vision_tower
    return PackedLlava(hf, pruner, None, config.llm.template, question, execution=Execution.of(config.trainer))


def packed(
    config: Config,
    hf: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    question: QuestionEncoder | None = None,
    template: str | None = None,
) -> tuple[PackedLlava, LlavaProcessor]:
    """A Hugging Face LLaVA as the run walks it, and its processor; without a `template` it is the LLM's own."""
    encoder, own = config.encoder, config.llm.template
    tokenizer.padding_side = "left"  # for `generate`
    processor = LlavaProcessor(
        image_processor=image_processor(encoder, "square"),
        tokenizer=tokenizer,
        patch_size=encoder.patch_size,
        vision_feature_select_strategy="default" if encoder.has_cls else "full",
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=int(encoder.has_cls),
    )
    template = template or own
    annotate = converse(hf, processor, template, own)
    pruner, execution = Pruner(config.pruner), Execution.of(config.trainer)
    return PackedLlava(hf, pruner, annotate, template, question, annotate.words, execution, annotate.spell), processor


def load_llava(folder: Path | str, dtype: torch.dtype, empty: bool = False) -> LlavaForConditionalGeneration:
    """A llava-hf folder's network; `empty`: on the meta device. Raises UserError unless weights and config agree."""
    if empty:
        with torch.device("meta"):
            return LlavaForConditionalGeneration._from_config(config_of(folder), dtype=dtype)
    return load_whole(LlavaForConditionalGeneration, folder, dtype=dtype)


def _template_of(processor: LlavaProcessor) -> str:
    """The conversation template of a folder that does not name one, by its chat template, which becomes the
    tokenizer's."""
    own = processor.chat_template or processor.tokenizer.chat_template
    processor.tokenizer.chat_template = own = own.get("default") if isinstance(own, dict) else own
    return template_name(own)


def saved_settings(key: str, folder: Path) -> dict[str, Any]:
    """What this project keeps in a model's config.json: the pruner's settings and the conversation's template."""
    saved = read_config(key, folder / "config.json").get("mmprune") or {}
    kinds = {"pruner": dict, "template": str}
    if not isinstance(saved, dict) or not all(
        isinstance(saved.get(name, kind()), kind) for name, kind in kinds.items()
    ):
        raise UserError(
            f"{key}: `mmprune` of {folder / 'config.json'} is not what a model is saved with; copy it again"
        )
    return saved


def load_model(
    path: str | Path,
    pruner: str | Mapping[str, Any] | PrunerConfig | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    text: str | Path | TextTowerConfig | None = None,
    empty: bool = False,
    key: str = "",
    trust_components: bool = False,
    named: Mapping[str, str] = MappingProxyType({}),
    template: str | None = None,
    execution: Execution | None = None,
    new_scorer: bool = False,
) -> tuple[PackedLlava, LlavaProcessor]:
    """A trained model and its processor, ready to call and to generate.

    Args:
        path: a run directory, an exported folder, or any llava-hf folder (or hub id).
        pruner: a name (`available_pruners()`), a mapping of settings, or None for what the folder was trained with
            (dense where it says nothing).
        text: the CLIP checkpoint that the encoder comes from, for a pruner that reads the question, where the folder
            was not trained with one and so has no text tower.
        empty: on the meta device, to be given the weights of another process; `device` is left aside.
        key: the config key that gave `path`, for messages.
        trust_components: run the components (`module:function`) that the folder's settings name.
        named: those that may run anyway, by key: the user names them, too.
        template: of the samples it is trained on; None: that it was saved with.
        execution: how to compute.
        new_scorer: where the pruner's score has weights and the folder has none, let them begin anew.
    Raises:
        UserError: no such folder, one of another kind, its weights do not match its config key for key, or its settings
            name components that are not trusted.
    """
    folder = model_folder(path, key)
    folder = local_or_hub(key or "path", folder) if isinstance(folder, str) else folder
    check_folder(key or "path", folder, "llava", trains=False)
    saved = saved_settings(key or "path", folder)
    if isinstance(pruner, PrunerConfig):
        settings = pruner
    elif pruner is None and "pruner" in saved:
        if not trust_components:
            refuse_foreign(folder / "config.json", components(saved["pruner"]), named)
        settings = saved_pruner(saved["pruner"])
    else:
        settings = load_pruner(pruner)
    chosen, question = Pruner(settings), None
    told = f"{path}: not a whole model folder"
    with retold(lambda error: f"{told}: {reason_of(error)}", (OSError, ValueError, SafetensorError)):
        hf = load_llava(folder, dtype, empty)
    processor = load_processor(folder, hf)
    if chosen.reads_tower:
        tower = TextTowerConfig(path=str(text)) if isinstance(text, str | Path) else text
        question = find_question_encoder(Path(folder), tower, dtype)
    before = saved.get("template") or _template_of(processor)
    template = template or before
    annotate = converse(hf, processor, template, before)
    model = PackedLlava(hf, chosen, annotate, template, question, annotate.words, execution, annotate.spell)
    if model.scorer is not None and not (new_scorer and not has_scorer(Path(folder))):
        load_scorer(model, path, Path(folder))
    return (model if empty else model.to(device)).eval(), processor
