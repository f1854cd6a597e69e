"""Optimizer steps at LLaVA-1.5-7B's shapes with random weights: what they take, beside what task=plan predicts.

Run by run.sh. Samples are made up, all of one length (no padding: the best case for `hf_padded`), so the weights need no
tokenizer and the data no files. Each row is written when it is measured.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mmprune_train.benchmark.steps import BASELINE, Way, padded, pruned, step_costs
from mmprune_train.config.compose import compose_config, load_pruner
from mmprune_train.config.schema import Config
from mmprune_train.data.batch import Sample, collate
from mmprune_train.data.encode import Example
from mmprune_train.devices import CPU, GIB, device_peak, present_device
from mmprune_train.planning.lengths import count_tokens
from mmprune_train.planning.plan import Cost, plan_stage
from mmprune_train.planning.samples import StageSamples
from mmprune_train.pruning import IGNORE, Kind
from mmprune_train.quiet import quiet
from mmprune_train.reporting.tables import table
from mmprune_train.training.network import kernel_lines, load_stage
from mmprune_train.training.precision import choose_accelerator, choose_precision
from mmprune_train.training.rundir import git_commit, versions
from mmprune_train.training.throughput import peak

STAGE = "instruct"
TARGET = 0.22
"""Tokens that enter a layer, averaged over layers, as a share of the dense ones."""
LLAVA = ["+experiment=llava7b_twostage_lora", "encoder.path=null", "llm.path=null"]
TINY = [*LLAVA, "encoder=tiny_clip", "llm=tiny_llama", "peft.r=4", "peft.alpha=8"]
ONE = ["strategy=single", "trainer=default", "knee=fixed_ratio"]
SHAPES = {640: (8, 1), 2048: (4, 3)}
"""Tokens of a sample -> samples of a step, images of a sample; of the rest half is a question, half its answer."""
TINY_SHAPES = {64: (2, 1), 160: (2, 3)}
COLUMNS = ("length", "way", "step s", "tokens/s", "MFU", "peak GiB", "keep ratio", "planned s", "planned GiB", "x hf")


def samples_of(config: Config, image_token: int, length: int, count: int, images: int) -> list[Sample]:
    """Samples of random words and random pixels."""
    visual, side = images * config.encoder.patches, config.encoder.image_size
    asked = (length - 1 - visual) // 2
    kinds = [(Kind.SPECIAL, 1), (Kind.VISUAL, visual), (Kind.PROMPT, asked)]
    kinds.append((Kind.ANSWER, length - sum(many for _, many in kinds)))
    kind = torch.cat([torch.full((many,), int(one)) for one, many in kinds])
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(count):
        ids = torch.randint(3, config.llm.arch["vocab_size"], (length,), generator=generator)
        ids[ids == image_token] += 1
        ids[kind == Kind.VISUAL] = image_token
        labels = torch.where(kind == Kind.ANSWER, ids, IGNORE)
        example = Example(str(number), ids, kind, torch.ones_like(ids), labels, images)
        paths = [Path(f"{number}-{image}") for image in range(images)]
        made.append(Sample(example, paths, [torch.randn(3, side, side, generator=generator) for _ in paths]))
    return made


def at_target(config: Config, samples: list[Sample]) -> Config:
    """The config whose two stages keep, each, the one share that leaves `TARGET` of these samples' tokens."""
    depth, low, high = int(config.llm.arch["num_hidden_layers"]), 0.0, 1.0

    def keeping(ratio: float) -> Config:
        vision, language = config.pruner.vision, config.pruner.language
        vision = replace(vision, knee=replace(vision.knee, ratio=ratio))
        language = replace(language, knee=replace(language.knee, ratio=ratio))
        return replace(config, pruner=replace(config.pruner, vision=vision, language=language))

    for _ in range(12):
        middle = (low + high) / 2
        kept = count_tokens(keeping(middle).pruner, samples[:1], config.encoder.patches, depth, 1.0).keep_ratio
        low, high = (middle, high) if kept < TARGET else (low, middle)
    return keeping(high)


def row_of(length: int, name: str, cost: Any, planned: Cost, tflops: float, seconds: float | None) -> dict[str, Any]:
    """A row of the table; MFU counts what the model needs: no recomputation, no padding, causal attention once."""
    step, own = cost.seconds["step"], name != BASELINE
    return {
        "length": length,
        "way": name,
        "step s": step,
        "tokens/s": cost.tokens["dense"] / step,
        "MFU": (planned.flops.forward + planned.flops.backward) / step / tflops / 1e12,
        "peak GiB": cost.peak_bytes / GIB,
        "keep ratio": cost.keep_ratio,
        "planned s": seconds,
        "planned GiB": (planned.memory.gradients + planned.memory.activations) / GIB if own else None,
        "seconds": cost.seconds,
        "flops": cost.flops,
    }


def write(out: Path, result: dict[str, Any]) -> None:
    (out / "bench.json").write_text(json.dumps(result, indent=1))
    rows = result["rows"]
    slow = {row["length"]: row["step s"] for row in rows if row["way"] == BASELINE and "step s" in row}
    lines = [f"{result['device']}, {result['precision']}; {'; '.join(result['kernels'])}", ""]
    lines += [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    shown = []
    for row in rows:
        times = slow[row["length"]] / row["step s"] if "step s" in row and row["length"] in slow else None
        shown.append([{**row, "x hf": times}.get(column, row.get("error")) for column in COLUMNS])
        lines.append("| " + " | ".join("-" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in shown[-1]) + " |")
    (out / "bench.md").write_text("\n".join(lines) + "\n")
    print(f"\n{table(shown[-1:], COLUMNS)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    shapes = TINY_SHAPES if asked.dry else SHAPES
    base = [*(TINY if asked.dry else LLAVA), *ONE, f"trainer.accelerator={'cpu' if asked.dry else 'cuda'}"]
    config = compose_config(base)
    accelerator = choose_accelerator(config.trainer.accelerator)
    precision = choose_precision("fp32" if asked.dry else "bf16", accelerator)
    device = torch.device(accelerator)
    limit = peak(device, precision.dtype)
    here = present_device() if accelerator == "cuda" else device_peak(CPU)
    assert here is not None
    here = replace(here, tflops=limit.tflops)
    with quiet(), device:  # random weights are made where they are used: 7B of them take minutes on a CPU
        model, _, _ = load_stage(config, STAGE, None, precision, empty=False)
    model.to(device)
    kernels = kernel_lines(model, device, precision.dtype).splitlines()
    name = torch.cuda.get_device_name() if accelerator == "cuda" else CPU
    result: dict[str, Any] = {
        "device": name, "precision": precision.name, "peak": [limit.tflops, limit.source], "kernels": kernels,
        "llm": config.llm.name, "encoder": config.encoder.name, "lora_r": config.peft.r, "repeats": asked.repeats,
        "versions": versions(), "git_commit": git_commit(), "rows": [],
    }  # fmt: skip
    print(f"{name}, {precision.name}, {limit.tflops:.4g} TFLOP/s ({limit.source})\n" + "\n".join(kernels), flush=True)
    for length, (count, images) in shapes.items():
        samples = samples_of(config, model.config.image_token_id, length, count, images)
        own = at_target(config, samples)
        stage = replace(own.stage[STAGE], batch_size=count, global_batch_size=count, max_length=length)
        own = replace(own, stage={**own.stage, STAGE: stage})
        with quiet():
            plan = plan_stage(own, STAGE, StageSamples(samples, None, None, "made up"), 1.0, here, precision.dtype)
        batch = collate(samples).to(device)
        assert plan.pruned is not None
        ways: dict[str, tuple[Way, Cost]] = {
            BASELINE: (padded(model, batch), plan.dense),
            "none": (pruned(model, batch, load_pruner("none")), plan.dense),
            "twostage": (pruned(model, batch, own.pruner), plan.pruned),
        }
        for way, (how, planned) in ways.items():
            try:
                cost = step_costs(model, {way: how}, asked.repeats, precision.dtype)[way]
                result["rows"].append(row_of(length, way, cost, planned, limit.tflops, planned.seconds(here, own.plan.mfu, 1)))
            except torch.OutOfMemoryError as error:
                result["rows"].append({"length": length, "way": way, "error": str(error).splitlines()[0]})
            model.zero_grad()
            if accelerator == "cuda":
                torch.cuda.empty_cache()
            write(asked.out, result)


if __name__ == "__main__":
    main()
