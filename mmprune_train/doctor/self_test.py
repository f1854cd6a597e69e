"""Two real optimizer steps of a tiny model on a device: images, tokenizer, packing, both pruning stages, adapters."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from mmprune_train.config.compose import compose_config
from mmprune_train.config.schema import Config, DataConfig, SplitConfig
from mmprune_train.quiet import quiet
from mmprune_train.training.inputs import stage_loader
from mmprune_train.training.network import load_stage
from mmprune_train.training.optim import adamw, parameter_groups
from mmprune_train.training.precision import Precision

NAME = "instruct"
NEAR = 0.05
"""Relative difference of the first loss from the reference's that rounding, and tokens chosen by rounded scores,
explain. Our choice."""


def losses_of_steps(device: torch.device, precision: Precision, attention: str = "auto") -> tuple[list[float], str]:
    """Loss before each of two optimizer steps on the same two samples, and what to tell of them.

    Args:
        attention: `trainer.attention`.
    Raises:
        RuntimeError: a loss or a gradient is not finite, or a step left all weights as they were.
        Exception: whatever does not work here.
    """
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, quiet():
        config = _config(Path(folder))
        config.trainer.attention = attention
        model, processor, parts = load_stage(config, NAME, None, precision, empty=False)
        loader = stage_loader(config, NAME, processor.tokenizer, model.config.image_seq_length, rank=0, world=1)
        batch = next(loader.steps(0, 1))[0].to(device)
    model.to(device)
    optimizer = adamw(parameter_groups(model, parts, weight_decay=0.0), config.optim)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    losses: list[float] = []
    kept = 1.0
    for _ in range(2):
        with torch.autocast(device.type, dtype=precision.dtype, enabled=precision.dtype != torch.float32):
            output = model.forward_packed(batch.sequence, batch.pixel_values)
            loss = output.loss_sum / output.supervised
        loss.backward()
        wrong = [name for name, p in trained.items() if p.grad is not None and not bool(p.grad.isfinite().all())]
        losses.append(float(loss.detach()))
        if wrong or not bool(loss.isfinite()):
            raise RuntimeError(f"the loss is {losses[-1]:.4g}, gradients that are not finite: {len(wrong)} {wrong[:2]}")
        optimizer.step()
        optimizer.zero_grad()
        counts = output.trace.counts()
        kept = counts["layer_mean"] / counts["dense"]
    if all(torch.equal(parameter, before[name]) for name, parameter in trained.items()):
        raise RuntimeError("two optimizer steps left every trained weight as it was")
    said = f"losses {losses[0]:.3f}, {losses[1]:.3f}, {kept:.0%} of the tokens kept"
    return losses, f"{said}, {time.perf_counter() - began:.1f} s"


def check_near(losses: list[float], reference: list[float]) -> None:
    """Raise RuntimeError unless the first loss is the reference's, on the same weights and samples."""
    if not abs(losses[0] - reference[0]) <= NEAR * abs(reference[0]):  # NaN is near nothing
        raise RuntimeError(f"the first loss is {losses[0]:.4g}, on the processor in fp32 it is {reference[0]:.4g}")


def _config(folder: Path) -> Config:
    """The smoke experiment on two samples of one image each, written into the folder."""
    rows = []
    for number in range(2):
        picture = Image.linear_gradient("L").resize((48 + 8 * number, 48)).convert("RGB")
        picture.save(folder / f"{number}.png")
        said = [("human", "<image>\nWhich side is dark?"), ("gpt", "the top " * (number + 1))]
        turns = [{"from": who, "value": text} for who, text in said]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "samples.json").write_text(json.dumps(rows), encoding="utf-8")
    config = compose_config(["+experiment=smoke"])
    config.data = DataConfig(name="files", root=str(folder), instruct=SplitConfig(annotations="samples.json"))
    stage = config.stage[NAME]
    stage.batch_size = stage.global_batch_size = len(rows)
    return config
