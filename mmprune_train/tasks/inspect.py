"""`task=inspect`: draw what both stages kept on one or more images, with the similarity curve and its knee."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from mmprune_train.config.command import Command
from mmprune_train.config.schema import Config
from mmprune_train.data.images import ImageReader
from mmprune_train.errors import UserError
from mmprune_train.evaluation.generate import load_images
from mmprune_train.reporting.figures import PrunedImage, Word, draw
from mmprune_train.reporting.tables import table
from mmprune_train.storage.files import write_json
from mmprune_train.tasks.checkpoint import Results, find_checkpoint, load, prompt_template
from mmprune_train.tasks.question import typed_question


def run(config: Config, command: Command = Command()) -> dict[str, Any]:
    """Write `inspect/pruning.png` and `inspect/result.json`; those of an earlier question are moved aside."""
    if not config.ckpt:
        raise UserError("task=inspect needs ckpt=FOLDER: a run directory, an exported folder or a llava-hf folder")
    if not config.generate.images:
        raise UserError("task=inspect needs generate.images=[FILE,...]: the images to draw")
    question = typed_question(config.generate, "inspect")
    found = find_checkpoint(config, command)
    model, processor, precision = load(found)
    read = ImageReader(processor.image_processor).open
    prompt = question.prompt(prompt_template(processor))
    inputs = processor(images=load_images(question, read), text=[prompt], return_tensors="pt").to(model.device)
    with torch.autocast(model.device.type, dtype=precision.dtype, enabled=precision.dtype != torch.float32):
        drawn, text, traced = trace_prompt(model, processor, inputs)
    asked = {"ckpt": str(found.model), "images": [str(path) for path in question.images], "question": question.text}
    result = {"asked": asked, "pruner": model.pruner.settings.name, **traced}
    with (results := Results(found.home / "inspect")).writing() as folder:
        draw(drawn, text, f"{model.pruner.settings.name}: {question.plain}", folder / "pruning.png")
        write_json(folder / "result.json", result)
    rows = [
        [file.name, one.grid**2, len(one.stage1), len(one.stage2)]
        for file, one in zip(question.images, drawn, strict=True)
    ]
    print(table(rows, ["image", "patches", "after stage 1", "after stage 2"]))
    print(f"\n{results.place / 'pruning.png'}", flush=True)
    return result


def trace_prompt(model: Any, processor: Any, inputs: Any) -> tuple[list[PrunedImage], list[Word], dict[str, Any]]:
    """Run one prompt [1, L] and tell where each patch and word went."""
    with torch.inference_mode():
        model(**inputs, logits_to_keep=1)
    trace = model.last_pruning
    ids = inputs["input_ids"][0].cpu()
    grid = math.isqrt(model.config.image_seq_length)
    if grid**2 != model.config.image_seq_length:
        raise UserError(
            f"task=inspect draws a square of patches, and vision_feature_select_strategy="
            f"{model.config.vision_feature_select_strategy!r} makes {model.config.image_seq_length} of an image"
        )
    visual = (ids == model.config.image_token_id).tolist()
    entered: list[tuple[int, int] | int] = []  # what entered the LLM: (image, patch) or a place in the prompt
    seen = 0
    kept_in_stage1 = [set(kept.tolist()) for kept in trace.vision_kept]
    holds = [iter(order.tolist()) for order in trace.vision_order]  # the patch in each place that an image kept
    for place, is_visual in enumerate(visual):
        if not is_visual:
            entered.append(place)
            continue
        image, patch = divmod(seen, grid**2)
        seen += 1
        if patch in kept_in_stage1[image]:
            entered.append((image, next(holds[image])))
    left = [entered[index] for index in trace.language_kept[0].tolist()]
    words = [place for place, is_visual in enumerate(visual) if not is_visual]
    stayed = set(left)
    drawn = []
    for image, kept in enumerate(trace.vision_kept):
        scores = None if trace.vision_scores is None else trace.vision_scores[image]
        second = [token[1] for token in left if isinstance(token, tuple) and token[0] == image]
        pixels = visible(inputs["pixel_values"][image], processor.image_processor)
        curve = None if scores is None else scores.double().cpu().numpy()
        drawn.append(PrunedImage(pixels, grid, kept.tolist(), second, curve))
    text: list[Word] = [(repr(processor.decode([ids[w]]))[1:-1], w in stayed) for w in words]
    result = {
        "tokens": {name: int(trace.per_sample[name][0]) for name in ("dense", "stage1", "stage2")},
        "images": [{"stage1": d.stage1, "stage2": d.stage2} for d in drawn],
        "text": [{"token": word, "kept": kept} for word, kept in text],
    }
    return drawn, text, result


def visible(pixel_values: torch.Tensor, image_processor: Any) -> np.ndarray:
    """[3, H, W] normalised values back to [H, W, 3] bytes."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (image_processor.image_mean, image_processor.image_std))
    return ((pixel_values.cpu() * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
