"""`task=bench`: what several pruners cost beside the encoder, on the same images and weights."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch

from mmprune_train.benchmark.selection import selection_costs
from mmprune_train.config.checks import check_pruner_fits
from mmprune_train.config.compose import load_pruner
from mmprune_train.config.identity import run_dir
from mmprune_train.config.pruner import reads_text
from mmprune_train.config.schema import Config
from mmprune_train.errors import UserError
from mmprune_train.model.build import build
from mmprune_train.quiet import quiet
from mmprune_train.reporting.tables import table
from mmprune_train.tasks.prepare import prepare_data
from mmprune_train.training.files import write_json
from mmprune_train.training.inputs import spread_images, stage_loader
from mmprune_train.training.precision import choose_accelerator, choose_precision


def run(config: Config) -> dict[str, Any]:
    """Write `bench/result.json` to the run directory."""
    accelerator = choose_accelerator(config.trainer.accelerator)
    precision = choose_precision(config.trainer.precision, accelerator)
    stage = config.stages[0]
    prepare_data(config, [stage])
    pruners = {
        name: config.pruner if name == config.pruner.name else load_pruner(name) for name in config.bench.pruners
    }
    for pruner in pruners.values():
        check_pruner_fits(replace(config, pruner=pruner))
    reads = [pruner for pruner in pruners.values() if reads_text(pruner.vision)]
    with quiet():
        model, processor = build(replace(config, pruner=reads[0]) if reads else config)
    model.eval().to(accelerator, precision.dtype)
    model.vision_chunk = config.trainer.vision_chunk
    loader = stage_loader(config, stage, processor.tokenizer, model.config.image_seq_length, rank=0, world=1)
    images = list(spread_images(loader, config.bench.images))
    if not images:
        raise UserError(f"data.{stage}.annotations has no sample with an image; choose other data= or stages=")
    pixels = torch.stack(images).to(accelerator)
    print(f"{accelerator}, {precision.reason}, {torch.get_num_threads()} threads", flush=True)
    costs = dict(selection_costs(model, pixels, pruners, config.bench.repeats))
    result = {
        "encoder": config.encoder.name,
        "image_size": config.encoder.image_size,
        "images": len(images),
        "repeats": config.bench.repeats,
        "precision": precision.name,
        "threads": torch.get_num_threads(),
        "device": accelerator,
        "pruners": {name: asdict(cost) for name, cost in costs.items()},
    }
    rows = [
        [name, c.patches, c.kept, c.vision_seconds, c.selection_seconds, f"{100 * c.share:.2f} %"]
        for name, c in costs.items()
    ]
    header = ["pruner", "patches", "kept", "vision s", "selection s", "share"]
    title = f"stage 1 on {len(images)} images, medians of {config.bench.repeats}"
    title += "; questions are empty" if reads else ""
    folder = run_dir(config) / "bench"
    write_json(folder / "result.json", result)
    print(f"\n{table(rows, header, title)}\n\n{folder / 'result.json'}", flush=True)
    return result
