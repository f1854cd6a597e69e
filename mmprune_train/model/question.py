"""CLIP's text tower beside the network: the question of each image, where stage 1 may compare it with the patches."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import processors
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerBase

from mmprune_train.config.schema import EncoderConfig, TextTowerConfig
from mmprune_train.errors import UserError
from mmprune_train.model.arch import arch_config, described
from mmprune_train.model.tokenizer import tiny_tokenizer
from mmprune_train.model.weights.auto import config_of, retold, tokenizer_of
from mmprune_train.model.weights.folders import check_folder
from mmprune_train.model.weights.outline import load_whole
from mmprune_train.model.weights.places import base_folder
from mmprune_train.packed.host import take, upload
from mmprune_train.pruning import PackedSequence
from mmprune_train.pruning.turns import question_text
from mmprune_train.pruning.views import VisionView, full_precision, given
from mmprune_train.storage.user_files import reason_of

FOLDER = "question"
"""Folder inside an exported model that holds the text tower, in CLIP's own format."""

Words = Callable[[Tensor], str]
"""Ids of question text [n], in the LLM's vocabulary -> that text."""


@dataclass(frozen=True)
class ImageQuestions:
    """Image-question pairs: the rows of a stage 1 that reads text, one for every two that meet in a batch."""

    image: list[int]
    """[P] row of `pixel_values`, ascending."""
    question: list[str]
    """[P] empty: none."""
    row: Tensor
    """[T] row of each visual token, -1 elsewhere."""

    @classmethod
    def unasked(cls, images: int) -> ImageQuestions:
        """Every image once, without a question; no sequence around them."""
        return cls(list(range(images)), [""] * images, torch.empty(0, dtype=torch.long))


@dataclass(frozen=True)
class TextFeatures:
    """What stage 1 reads of `ImageQuestions`."""

    image: list[int]
    """[P] as there."""
    text: Tensor
    """[P, E] float32, by the text tower, zeros for no question; E is 0 without a tower."""
    known: Tensor
    """[P] bool, which have a question."""
    shape: tuple[int, int]
    """Of the ids that the text tower read: different questions, and the tokens of the longest."""
    words: Tensor | None = None
    """[P, W, D] the LLM's embeddings of each question's words, zeros behind the last; None: not read."""

    @classmethod
    def unread(cls, pairs: ImageQuestions, device: torch.device) -> TextFeatures:
        """Without a text tower."""
        known = upload(torch.tensor([bool(text) for text in pairs.question]), device)
        return cls(pairs.image, torch.zeros((len(known), 0), device=device), known, (0, 0))

    def nothing(self) -> TextFeatures:
        """Of one image that nothing is asked of; the text tower does not run."""
        words = None if self.words is None else torch.zeros_like(self.words[:1])
        return TextFeatures([0], torch.zeros_like(self.text[:1]), torch.zeros_like(self.known[:1]), (0, 0), words)


def image_questions(sequence: PackedSequence, words: Words, ends: Sequence[str] = ()) -> ImageQuestions:
    """Which images of a batch are looked at with which questions.

    An image's question is the PROMPT text of its own turn, in any tokenizer's words; system text, answers and other
    turns' questions are none of it. Samples that share an image and ask the same share a row.

    Args:
        ends: texts of which the first one ends a question.
    """
    ids, segment, turn, image = sequence.ids, sequence.segment, sequence.turn.clamp(min=1), sequence.image
    visual, prompt = sequence.visual, question_text(sequence)
    meetings, which = np.unique(torch.stack([image, segment, turn])[:, visual], axis=1, return_inverse=True)
    rows: dict[tuple[int, str], int] = {}
    row_of = []
    for one, sample, number in meetings.T.tolist():
        asked = words(ids[prompt & (segment == sample) & (turn == number)])
        asked = cut_question(asked, ends)
        row_of.append(rows.setdefault((one, asked), len(rows)))
    row = torch.full_like(ids, -1)
    row[visual] = torch.tensor(row_of, dtype=torch.long)[torch.from_numpy(which.reshape(-1))]
    return ImageQuestions([one for one, _ in rows], [asked for _, asked in rows], row)


def cut_question(asked: str, ends: Sequence[str]) -> str:
    """A question up to the first of some texts that end one."""
    return min((asked.partition(end)[0].rstrip() for end in ends), key=len, default=asked)


class QuestionEncoder(nn.Module):
    """A CLIP whose vision encoder has no layers, only its last norm and its projection. Never trained."""

    def __init__(self, clip: CLIPModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.clip = clip.requires_grad_(False).eval()
        temperature = clip.logit_scale
        del clip.logit_scale  # of no use here, and DeepSpeed cannot broadcast a parameter without dimensions
        clip.register_buffer("logit_scale", temperature.data)
        self.tokenizer = tokenizer

    @property
    def width(self) -> int:
        """Of the patches it takes."""
        return int(self.clip.visual_projection.in_features)

    @torch.no_grad()
    def ask(self, pairs: ImageQuestions) -> TextFeatures:
        """The text tower, run once over the different questions, whatever they are: under ZeRO-3 every rank must run
        it. What exceeds CLIP's context is cut."""
        different = {text: number for number, text in enumerate(dict.fromkeys(pairs.question))}
        context = self.clip.config.text_config.max_position_embeddings
        read = self.tokenizer(
            list(different),
            padding=True,
            padding_side="right",  # where a causal tower never sees it, and needs no mask that it would wait for
            truncation=True,
            max_length=context,
            return_tensors="pt",
        )
        device = self.clip.text_projection.weight.device
        ids = upload(read["input_ids"], device)
        with full_precision(ids):
            out = self.clip.get_text_features(ids)
        embedded = take(out.pooler_output.float(), torch.tensor([different[text] for text in pairs.question]))
        known = upload(torch.tensor([bool(text) for text in pairs.question]), device)
        return TextFeatures(pairs.image, embedded * known[:, None], known, (ids.shape[0], ids.shape[1]))

    @torch.no_grad()
    def project(self, patches: Tensor, normed: bool) -> Tensor:
        """Patches [I, N, D] in the joint space [I, N, E], float32; `normed`: through the vision tower's last norm, as
        CLIP's CLS token goes."""
        with full_precision(patches):
            patches = patches.to(self.clip.visual_projection.weight.dtype)
            if normed:
                patches = self.clip.vision_model.post_layernorm(patches)
            return self.clip.visual_projection(patches).float()

    def save(self, folder: Path) -> None:
        """Write it where `load_question_encoder` finds it again."""
        self.clip.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def show(view: VisionView, asked: TextFeatures, start: int, tower: QuestionEncoder | None) -> tuple[VisionView, Tensor]:
    """What stage 1 may look at, per image and question.

    Args:
        view: of the images `start`, `start + 1`, ...
        tower: None: questions are read word by word alone.
    Returns:
        the view of the rows of `asked` that look at these images, and the image of each, counted from `start`.
    """
    part = slice(bisect_left(asked.image, start), bisect_left(asked.image, start + len(view.patches)))
    rows = upload(torch.tensor(asked.image[part]) - start, view.patches.device)

    def shown(view: VisionView) -> VisionView:
        @cache
        def question(normed: bool) -> tuple[Tensor, Tensor]:
            assert tower is not None
            return tower.project(given(view.block_output)(), normed)[rows], asked.text[part]

        return replace(
            view.at(rows),
            question=None if tower is None else question,
            words=None if asked.words is None else asked.words[part],
            asked=asked.known[part],
            block=view.block and (lambda layer: shown(given(view.block)(layer))),
        )

    return shown(view), rows


def new_question_encoder(cfg: EncoderConfig, folder: Path | None, dtype: torch.dtype) -> QuestionEncoder:
    """The text tower of an encoder: from a CLIP folder, or random without one."""
    assert cfg.text is not None
    if folder is not None:
        return load_question_encoder(folder, dtype, "encoder.text.path")
    text = cfg.text.arch
    arch_config("encoder.text.arch", {"model_type": "clip_text_model", **text})
    vision = {**cfg.arch, "num_hidden_layers": 0}
    projection = {name: text[name] for name in ("projection_dim",) if name in text}
    with described("encoder.text.arch", text):
        clip = CLIPModel(CLIPConfig(text_config=dict(text), vision_config=vision, **projection))
    return QuestionEncoder(clip.to(dtype), tiny_question_tokenizer())


def find_question_encoder(folder: Path, text: TextTowerConfig | None, dtype: torch.dtype) -> QuestionEncoder:
    """The text tower saved with a model, else the one that `text` names. Raises UserError where there is neither."""
    if (folder / FOLDER).is_dir():
        return load_question_encoder(folder / FOLDER, dtype, str(folder))
    elsewhere = base_folder(text) if text is not None else None
    if elsewhere is None:
        raise UserError(
            f"{folder}: this pruner reads the question, and there is no text tower in {FOLDER}/: name the CLIP that "
            "the encoder comes from (load_model(..., text=FOLDER), on the command line encoder.text.path=FOLDER), or "
            "take another pruner"
        )
    return load_question_encoder(elsewhere, dtype, "encoder.text.path")


def load_question_encoder(folder: Path, dtype: torch.dtype, key: str) -> QuestionEncoder:
    """From a CLIP folder that `key` named, whole or as `save` writes it. Its vision layers are not read."""
    check_folder(key, folder, "text")
    with retold(lambda error: f"{key}: {folder} is no whole CLIP: {reason_of(error)}", (OSError, ValueError)):
        config: Any = config_of(folder)
        config.vision_config.num_hidden_layers = 0
        clip = load_whole(CLIPModel, folder, beside=("vision_model.encoder.layers",), config=config, dtype=dtype)
        return QuestionEncoder(clip, tokenizer_of(folder))


def tiny_question_tokenizer() -> PreTrainedTokenizerBase:
    """The built-in tokenizer with CLIP's end token, which has the highest id (512), as CLIP looks for it there."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <|endoftext|>",
        special_tokens=[("<s>", 1), ("<|endoftext|>", tokenizer.eos_token_id)],
    )
    return tokenizer
