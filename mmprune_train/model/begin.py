"""The network that a training stage begins with: base weights, or what `init_from` names, as one packed LLaVA."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mmprune_train.config.pruner import reads_text
from mmprune_train.config.schema import Config
from mmprune_train.model.arch import arch_config
from mmprune_train.model.build import fresh, grown, load_llava, load_model, packed, put_together, vision_tower
from mmprune_train.model.execution import Execution
from mmprune_train.model.llava import PackedLlava
from mmprune_train.model.question import QuestionEncoder, find_question_encoder, new_question_encoder
from mmprune_train.model.tokenizer import load_tokenizer
from mmprune_train.model.weights.adapters import merge_folder, projector_beside
from mmprune_train.model.weights.auto import config_of
from mmprune_train.model.weights.files import Tensors, read_tensors, tensors_of, weights_of
from mmprune_train.model.weights.folders import ADAPTERS, LLAVA, ORIGINAL, look
from mmprune_train.model.weights.original import (
    BESIDE_LLM,
    load_projector,
    projector_tensors,
    text_config,
    tower_tensors,
)
from mmprune_train.model.weights.outline import load_whole
from mmprune_train.model.weights.places import encoder_folder, text_folder
from mmprune_train.model.weights.start import Start


def begin(
    config: Config,
    start: Start | None = None,
    dtype: torch.dtype = torch.float32,
    empty: bool = False,
    template: str | None = None,
) -> tuple[PackedLlava, LlavaProcessor]:
    """The network and processor that a stage starts from, seeded by `config.seed` where parts of them are new.

    Adapters that are to be trained further are not in it: they come with `load_adapters`, once the stage has put its
    own on the LLM.

    Args:
        start: where the weights come from; None: the base weights.
        empty: on the meta device, to be given the weights of another process; a text tower is whole.
        template: of the samples it is trained on; None: that it had before.
    Raises:
        UserError: weights are missing or do not fit.
    """
    if start is not None and start.own:
        return load_model(
            start.path,
            pruner=config.pruner,
            dtype=dtype,
            text=config.encoder.text,
            empty=empty,
            template=template,
            execution=Execution.of(config.trainer),
        )
    hf, tokenizer = _network(config, start, dtype, empty)
    return packed(config, hf, tokenizer, _question(config, start, dtype), template)


def _question(config: Config, start: Start | None, dtype: torch.dtype) -> QuestionEncoder | None:
    """The text tower, where stage 1 reads the question: that saved with a whole model, else the encoder's."""
    if not reads_text(config.pruner.vision):
        return None
    if whole := start and start.whole:
        return find_question_encoder(whole.path, config.encoder.text, dtype)
    text = config.encoder.text
    return None if text is None else new_question_encoder(config.encoder, text_folder(text), dtype)


def _network(
    config: Config, start: Start | None, dtype: torch.dtype, empty: bool
) -> tuple[LlavaForConditionalGeneration, PreTrainedTokenizerBase]:
    if start is None:
        return fresh(config, dtype, empty)
    if start.kind == LLAVA:
        return load_llava(start.path, dtype, empty), load_tokenizer(start.path, start.key)
    if start.kind == ORIGINAL:
        return _from_original(config, start, dtype, empty)
    hf, tokenizer = _network(config, start.base, dtype, empty)
    if not empty:
        if start.kind == ADAPTERS and not start.goes_on:
            merge_folder(hf, start.key, start.path)
        if start.kind == ADAPTERS:
            weights = projector_beside(start.key, start.path)
        else:
            weights = projector_tensors(tensors_of(start.key, start.path))
        load_projector(hf.model.multi_modal_projector, weights)
    return hf, tokenizer


def tower_of(config: Config, start: Start | None) -> PreTrainedModel:
    """The vision tower that a stage starts with; of the LLM beside it no layer is read."""
    start = start and start.whole
    if start is None:
        return vision_tower(config.encoder, encoder_folder(config.encoder), torch.float32)
    if start.kind == ORIGINAL:
        return _tower(config, tower_tensors(weights_of(start.key, start.path)), start, torch.float32, empty=False)
    settings = config_of(start.path)
    settings.text_config.num_hidden_layers = 0
    if getattr(settings.text_config, "layer_types", None):
        settings.text_config.layer_types = []
    beside = ("language_model",)
    hf = load_whole(LlavaForConditionalGeneration, start.path, beside=beside, config=settings, dtype=torch.float32)
    return hf.model.vision_tower


def _from_original(
    config: Config, start: Start, dtype: torch.dtype, empty: bool
) -> tuple[LlavaForConditionalGeneration, PreTrainedTokenizerBase]:
    tensors = weights_of(start.key, start.path)
    tokenizer = load_tokenizer(start.path, start.key)
    torch.manual_seed(config.seed)
    with torch.device("meta") if empty else nullcontext():
        vision = _tower(config, tower_tensors(tensors), start, dtype, empty)
        text = text_config(start.key, look(start.key, start.path).config)
        if empty:
            language = AutoModelForCausalLM.from_config(text, dtype=dtype)
        else:
            language = load_whole(AutoModelForCausalLM, start.path, beside=BESIDE_LLM, config=text, dtype=dtype)
        hf = put_together(config, vision, grown(language, tokenizer), tokenizer)
    if not empty:
        load_projector(hf.model.multi_modal_projector, projector_tensors(tensors))
    return hf, tokenizer


def _tower(config: Config, inside: Tensors, start: Start, dtype: torch.dtype, empty: bool) -> PreTrainedModel:
    """The vision tower of an original checkpoint: its own, where it holds one, else the chosen encoder."""
    if not inside:
        return vision_tower(config.encoder, encoder_folder(config.encoder), dtype, empty)
    settings = arch_config("encoder.arch", config.encoder.arch)
    if empty:
        return AutoModel.from_config(settings, dtype=dtype)
    with torch.device("meta"):
        model_class = type(AutoModel.from_config(settings))
    source, weights = f"{start.path} (its vision tower)", read_tensors(inside)
    return load_whole(model_class, None, source, config=settings, state_dict=weights, dtype=dtype)
