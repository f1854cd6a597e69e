"""Answers of a model to many questions, in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from mmprune_train.data.images import ImageReader, read_image
from mmprune_train.data.templates import Template
from mmprune_train.errors import NotFinite, UserError
from mmprune_train.evaluation.questions import Question
from mmprune_train.progress import progress
from mmprune_train.storage.user_files import short

Item = TypeVar("Item")
COUNTS = (
    "dense", "stage1", "stage2", "layer_mean", "visual_dense", "visual_stage1", "visual_stage2", "visual_layer_mean",
)  # fmt: skip


@dataclass(frozen=True)
class Prediction:
    question: Question
    text: str
    counts: dict[str, float]
    """Tokens of the prompt after each stage, the trace's per-sample names."""
    seconds: float = 0.0
    """Of its batch, divided by the batch's questions."""
    peak_bytes: int | None = None
    """Most memory above the weights while its batch was answered; None: not measured."""


class FiniteLogits(LogitsProcessor):
    """Sees whether the logits that answers are read off are finite; leaves them as they are."""

    def __init__(self) -> None:
        self.lost: Tensor | None = None
        """[B] samples with a NaN or an infinite largest logit, on the device."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        lost = ~scores.amax(-1).isfinite()
        self.lost = lost if self.lost is None else self.lost | lost
        return scores


def load_images(question: Question, read: Callable[..., Image.Image] = read_image) -> list[Image.Image]:
    """The question's images, RGB; UserError for one that is missing or broken.

    Args:
        read: as `read_image`.
    """
    who = question.where or f"question {short(question.id, 80)}"
    return [
        read(picture, who) if isinstance(picture, Path) else read(picture.file, who, content=picture.content())
        for picture in question.images
    ]


def blank_images(mean: Sequence[float], side: int) -> Callable[[Question], list[Image.Image]]:
    """Instead of a question's images, as many of the image mean's colour: nothing to see."""
    colour = tuple(int(255 * channel) for channel in mean)
    return lambda question: [Image.new("RGB", (side, side), colour) for _ in question.images]


def check_room(key: str, new_tokens: int, model: Any) -> None:
    """Raise UserError where answers of so many tokens are longer than the LLM can read."""
    context = model.config.get_text_config().max_position_embeddings
    if new_tokens >= context:
        raise UserError(f"{key}={new_tokens}: the LLM reads {context} tokens, the question among them; set less")


@torch.inference_mode()
def answer(
    model: Any,
    processor: Any,
    template: Template,
    questions: Sequence[Question],
    batch_size: int,
    max_new_tokens: int,
    images_of: Callable[[Question], list[Image.Image]] | None = None,
    title: str | None = "evaluate",
    dtype: torch.dtype = torch.float32,
) -> list[Prediction]:
    """Greedy answers, in the order of the questions.

    Args:
        model: as `load_model` returns it.
        processor: as `load_model` returns it.
        template: puts a question into the conversation format.
        images_of: a question's images; None: those in its files, read as the processor asks for.
        title: stands before the progress; None: none is shown.
        dtype: bfloat16 computes under autocast.
    Raises:
        NotFinite: logits are NaN or infinite, so that an answer would be of no meaning.
    """
    model.eval()
    if images_of is None:
        images_of = partial(load_images, read=ImageReader(processor.image_processor).open)
    processor.tokenizer.padding_side = "left"
    device = next(model.parameters()).device
    predictions = []
    parts = list(batches(questions, batch_size))
    for batch in parts if title is None else progress(parts, title):
        images = [image for question in batch for image in images_of(question)]
        texts = [question.prompt(template) for question in batch]
        inputs = processor(images=images or None, text=texts, return_tensors="pt", padding=True).to(device)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            seen = FiniteLogits()
            out = model.generate(
                **inputs, max_new_tokens=max_new_tokens, do_sample=False, logits_processor=LogitsProcessorList([seen])
            )
        if seen.lost is not None and bool(seen.lost.any()):
            question = batch[int(seen.lost.int().argmax())]
            raise NotFinite(
                f"question {short(question.id, 80)}: the model's logits are NaN or infinite, so nothing is an answer; "
                "look at its weights, or compute in fp32 (trainer.precision=fp32)"
            )
        told = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        counts = model.last_pruning.per_sample
        for row, (question, text) in enumerate(zip(batch, told, strict=True)):
            predictions.append(Prediction(question, text.strip(), {name: float(counts[name][row]) for name in COUNTS}))
    return predictions


def batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
