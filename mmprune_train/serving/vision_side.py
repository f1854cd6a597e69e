"""What stands before the LLM, alone: from images to the embeddings of the visual tokens that stage 1 keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from mmprune_train.config.compose import load_pruner, saved_pruner
from mmprune_train.config.pruner import components, refuse_foreign
from mmprune_train.config.pruner_schema import PrunerConfig
from mmprune_train.errors import UserError
from mmprune_train.model.build import saved_settings
from mmprune_train.model.llava import PackedLlava
from mmprune_train.model.processor import load_processor
from mmprune_train.model.question import ImageQuestions, cut_question, find_question_encoder
from mmprune_train.model.scorer import load_scorer
from mmprune_train.model.weights.auto import config_of
from mmprune_train.model.weights.files import read_tensors
from mmprune_train.model.weights.folders import check_folder, model_folder
from mmprune_train.model.weights.outline import load_whole
from mmprune_train.model.weights.places import local_or_hub
from mmprune_train.pruning import Pruner

LANGUAGE = ("language_model.", "lm_head.")
"""Parts of the names of weights that stay where the LLM is."""


class VisionSide:
    """Vision encoder, stage 1 and projector of a model.

    Args:
        model: with the LLM's weights or without; stage 2 is off.
        processor: its own.
    """

    def __init__(self, model: PackedLlava, processor: LlavaProcessor) -> None:
        self.model = model
        self.processor = processor

    @classmethod
    def load(
        cls,
        path: str | Path,
        pruner: str | Mapping[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        trust_components: bool = False,
    ) -> VisionSide:
        """From a run directory, an exported folder or a llava-hf folder (or hub id); of the LLM no weight is read.

        Args:
            pruner: as `load_model` takes it; its stage 2 is left out, since the LLM is elsewhere.
            trust_components: run the components that the folder's settings name.
        Raises:
            UserError: as `load_model`; or the pruner leaves the kept tokens at their places in the image, which an
                engine, who numbers what it gets from 0, cannot do.
        """
        found = model_folder(path)
        folder = local_or_hub("path", found) if isinstance(found, str) else found
        tensors = check_folder("path", folder, "llava", trains=False)
        chosen = Pruner(_settings(folder, pruner, trust_components))
        if chosen.reads_words:
            raise UserError(
                f"pruner={chosen.settings.name} reads the question by the LLM's own embeddings, which the client "
                "does not have; take one that reads it by the text tower, or not at all"
            )
        config: Any = config_of(folder)
        config.text_config.num_hidden_layers, config.text_config.vocab_size = 0, 1
        if getattr(config.text_config, "layer_types", None):
            config.text_config.layer_types = []
        config.text_config.pad_token_id = None
        vision = {name: entry for name, entry in tensors.items() if not any(part in name for part in LANGUAGE)}
        hf = load_whole(
            LlavaForConditionalGeneration,
            None,
            folder,
            absent=("model.language_model.", "lm_head."),
            config=config,
            state_dict=read_tensors(vision),
            dtype=dtype,
        )
        question = find_question_encoder(folder, None, dtype) if chosen.reads_tower else None
        model = PackedLlava(hf, chosen, question=question, words=_no_words if question else None)
        if model.scorer is not None:
            load_scorer(model, "path", folder)
        return cls(model.to(device).eval(), load_processor(folder, hf))

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image], questions: Sequence[str] | None = None) -> list[Tensor]:
        """Embeddings [n, D] of each image's kept visual tokens, in the order in which they enter the LLM.

        Args:
            images: RGB, as `read_image` gives them.
            questions: what is asked about each image, for a stage 1 that reads it; None: nothing.
        """
        if not images:
            return []
        pixels = self.processor.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
        model = self.model
        asked = None
        if model.pruner.reads_text:
            ends = model.pruner.asked_until
            texts = [cut_question(question.strip(), ends) for question in questions or [""] * len(images)]
            rows = ImageQuestions(list(range(len(images))), texts, torch.empty(0, dtype=torch.long))
            asked = model.ask(rows)
        patches = model.select_patches(pixels.to(model.device), asked)
        parts = model.visual_tokens(patches).split(patches.kept.sum(1).tolist())
        ranks = patches.kept.cumsum(1) - 1
        return [
            part[ranks[image, entering].to(part.device)]
            for image, (part, entering) in enumerate(zip(parts, patches.entering, strict=True))
        ]


def _settings(folder: Path, pruner: str | Mapping[str, Any] | None, trust: bool) -> PrunerConfig:
    """Of stage 1 alone."""
    saved = saved_settings("path", folder).get("pruner")
    if pruner is None and saved is not None:
        if not trust:
            refuse_foreign(folder / "config.json", components(saved), {})
        settings = saved_pruner(saved)
    else:
        settings = load_pruner(pruner)
    if settings.vision.enabled and settings.vision.positions != "contiguous":
        raise UserError(
            f"pruner.vision.positions={settings.vision.positions}: engines number the tokens they get from 0 on, as "
            "`contiguous` does; this model was trained with the places of the whole image"
        )
    return replace(settings, language=replace(settings.language, enabled=False))


def _no_words(ids: Tensor) -> str:
    raise AssertionError("questions are given as texts")
