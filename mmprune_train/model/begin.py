"""The network that a training stage begins with: base weights, or what `init_from` names, as one packed LLaVA."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedModel, PreTrainedTokenizerBase

from mmprune_train.config.pruner_vision import reads_tower
from mmprune_train.config.schema import Config
from mmprune_train.model.assemble import assemble, language_model, llava_config, vision_tower
from mmprune_train.model.build import load_llava, load_model, packed
from mmprune_train.model.execution import Execution
from mmprune_train.model.llava import PackedLlava
from mmprune_train.model.question import QuestionEncoder, find_question_encoder, new_question_encoder
from mmprune_train.model.scorer import has_scorer, load_scorer
from mmprune_train.model.tokenizer import IMAGE_TOKEN, load_tokenizer
from mmprune_train.model.weights.adapters import merge_folder, projector_beside
from mmprune_train.model.weights.auto import config_of
from mmprune_train.model.weights.files import Tensors, tensors_of, weights_of
from mmprune_train.model.weights.folders import ADAPTERS, LLAVA, ORIGINAL, look
from mmprune_train.model.weights.original import load_projector, projector_tensors, text_config, tower_tensors
from mmprune_train.model.weights.outline import load_whole
from mmprune_train.model.weights.places import base_folder
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
            new_scorer=True,
        )
    hf, tokenizer = _network(config, start, dtype, empty)
    model, processor = packed(config, hf, tokenizer, _question(config, start, dtype), template)
    whole = start and start.whole
    if model.scorer is not None and whole and has_scorer(whole.path):
        load_scorer(model, whole.key, whole.path)
    return model, processor


def _question(config: Config, start: Start | None, dtype: torch.dtype) -> QuestionEncoder | None:
    """The text tower, where stage 1 reads the question by it: that saved with a whole model, else the encoder's."""
    if not reads_tower(config.pruner.vision):
        return None
    text = config.encoder.text
    if whole := start and start.whole:
        return find_question_encoder(whole.path, text, dtype)
    return None if text is None else new_question_encoder(config.encoder, base_folder(text), dtype)


def _network(
    config: Config, start: Start | None, dtype: torch.dtype, empty: bool
) -> tuple[LlavaForConditionalGeneration, PreTrainedTokenizerBase]:
    if start is None or start.kind == ORIGINAL:
        return _joined(config, start, dtype, empty)
    if start.kind == LLAVA:
        return load_llava(start.path, dtype, empty), load_tokenizer(start.path, start.key)
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


def _joined(
    config: Config, original: Start | None, dtype: torch.dtype, empty: bool
) -> tuple[LlavaForConditionalGeneration, PreTrainedTokenizerBase]:
    """The chosen encoder and LLM with a new projector between them, or what an original checkpoint holds of the
    three."""
    tensors: Tensors = {}
    if original is None:
        folder, text = base_folder(config.llm), None
        tokenizer = load_tokenizer(folder)
    else:
        folder, tensors = original.path, weights_of(original.key, original.path)
        text = text_config(original.key, look(original.key, folder).config)
        tokenizer = load_tokenizer(folder, original.key)
    inside = tower_tensors(tensors)
    tower_folder = None if inside else base_folder(config.encoder)
    torch.manual_seed(config.seed)
    with torch.device("meta") if empty else nullcontext():
        vision = vision_tower(config.encoder, tower_folder, dtype, empty, inside)
        language = language_model(config.llm, folder, tokenizer, dtype, empty, text)
        image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        llava = llava_config(config.encoder, vision.config, language.config, config.projector.name, image_token)
        hf = assemble(llava, vision, language, config.projector.init)
    if original is not None and not empty:
        load_projector(hf.model.multi_modal_projector, projector_tensors(tensors))
    return hf, tokenizer


def tower_of(config: Config, start: Start | None) -> PreTrainedModel:
    """The vision tower that a stage starts with; of the LLM beside it no layer is read."""
    start = start and start.whole
    if start is None or start.kind == ORIGINAL:
        inside = {} if start is None else tower_tensors(weights_of(start.key, start.path))
        folder = None if inside else base_folder(config.encoder)
        return vision_tower(config.encoder, folder, torch.float32, inside=inside)
    settings = config_of(start.path)
    settings.text_config.num_hidden_layers = 0
    if getattr(settings.text_config, "layer_types", None):
        settings.text_config.layer_types = []
    beside = ("language_model",)
    hf = load_whole(LlavaForConditionalGeneration, start.path, beside=beside, config=settings, dtype=torch.float32)
    return hf.model.vision_tower
