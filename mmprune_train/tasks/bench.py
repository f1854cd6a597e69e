"""`task=bench`: what several pruners cost side by side, on the same batch and weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from mmprune_train.benchmark.generation import GenerationCost, generation_costs
from mmprune_train.benchmark.lengths import LengthsCost, lengths_cost
from mmprune_train.benchmark.selection import SelectionCost, selection_costs
from mmprune_train.benchmark.steps import BASELINE, PARTS, StepCost, Way, padded, pruned, step_costs
from mmprune_train.config.compose import load_pruner
from mmprune_train.config.identity import run_dir
from mmprune_train.config.pruner import reads_text
from mmprune_train.config.pruner_fits import check_feature_cache, check_pruner_fits
from mmprune_train.config.pruner_schema import PrunerConfig
from mmprune_train.config.schema import Config
from mmprune_train.data.batch import Batch
from mmprune_train.data.images import ImageReader
from mmprune_train.data.loader import TrainLoader
from mmprune_train.data.templates import get_template
from mmprune_train.errors import UserError
from mmprune_train.evaluation.generate import check_room, load_images
from mmprune_train.evaluation.questions import questions_of
from mmprune_train.features.store import ImageFeatures
from mmprune_train.model.llava import PackedLlava
from mmprune_train.model.quantize import check_quantization
from mmprune_train.packed.patches import Patches
from mmprune_train.progress import progress
from mmprune_train.quiet import quiet
from mmprune_train.reporting.bench_figure import draw_steps
from mmprune_train.reporting.tables import table
from mmprune_train.storage.files import write_json
from mmprune_train.storage.folders import delete_leftovers, temporary_folder
from mmprune_train.tasks.checkpoint import Results, find_checkpoint, load
from mmprune_train.tasks.prepare import prepare_data
from mmprune_train.training.features import fill_for
from mmprune_train.training.inputs import spread_images, stage_image_processor, stage_loader
from mmprune_train.training.precision import Precision, choose_accelerator, choose_precision
from mmprune_train.training.run import kernel_lines, load_stage, make_trainable
from mmprune_train.training.rundir import git_commit, versions
from mmprune_train.training.starts import start_of

DENSE = "none"
"""The packed model without pruning: what the others are shares of."""


def run(config: Config) -> dict[str, Any]:
    """Write `bench/result.json` and the figure to the run directory; returns the result."""
    found = find_checkpoint(config) if config.ckpt else None
    if found is not None and found.trained is None:
        raise UserError(
            f"ckpt={config.ckpt}: task=bench needs a run directory, whose config says how samples are prepared"
        )
    results = Results((found.home if found else run_dir(config)) / "bench")
    config = found.config if found else config
    accelerator = choose_accelerator(config.trainer.accelerator)
    precision = choose_precision(config.trainer.precision, accelerator)
    name = config.bench.stage or config.stages[-1]
    if config.peft.name == "qlora" and config.stage[name].use_peft:
        check_quantization(accelerator)
    pruners = chosen_pruners(config)
    prepare_data(config, name)
    reads = [pruner for pruner in pruners.values() if reads_text(pruner.vision)]
    with quiet():
        if found is None:
            whole = replace(config, pruner=reads[0]) if reads else config
            model, processor, _ = load_stage(whole, name, start_of(config, None, name), precision, empty=False)
        else:
            model, processor, _ = load(replace(found, pruner=reads[0]) if reads else found)
            make_trainable(model, config, name, precision)
    if "generate" in config.bench.measure:
        check_room("bench.new_tokens", config.bench.new_tokens, model)
    model.to(accelerator)
    processor.image_processor = stage_image_processor(config, name)
    loader = stage_loader(
        _one_batch(config, name), name, processor.tokenizer, model.config.image_seq_length, rank=0, world=1
    )
    model.attention, model.logits_chunk = config.trainer.attention, config.trainer.logits_chunk
    print(f"{accelerator}, {precision.name} ({precision.reason}), {torch.get_num_threads()} threads", flush=True)
    kernels = kernel_lines(model, torch.device(accelerator), precision.dtype)
    print(kernels, flush=True)
    result: dict[str, Any] = {
        "ckpt": str(found.model) if found else None,
        "encoder": config.encoder.name,
        "image_size": config.encoder.image_size,
        "llm": config.llm.name,
        "peft": config.peft.name,
        "stage": name,
        "precision": precision.name,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if accelerator == "cuda" else "cpu",
        "repeats": config.bench.repeats,
        "seed": config.seed,
        "kernels": kernels.splitlines(),
        "versions": versions(),
        "git_commit": git_commit(),
    }

    def write() -> None:
        with results.writing() as folder:
            write_json(folder / "result.json", result)

    if "train" in config.bench.measure:
        batch = next(loader.steps(0, 1))[0].to(accelerator)
        result["samples"], result["batch_ids"] = batch.sequence.samples, batch.ids
        result["train"] = _train(config, name, model, batch, pruners, precision, results)
        write()  # it takes minutes: what follows may fail
    if "generate" in config.bench.measure:
        result["generate"] = _generate(config, model, processor, loader, pruners, precision)
        write()
    if "selection" in config.bench.measure:
        result["selection"] = _selection(config, model, loader, pruners, precision)
        write()
    if "lengths" in config.bench.measure:
        result["lengths"] = _lengths(config, name, model, loader, pruners, precision, results)
    write()
    print(f"\n{results.place / 'result.json'}", flush=True)
    return result


def chosen_pruners(config: Config) -> dict[str, PrunerConfig]:
    """Settings by name of what `bench.pruners` lists."""
    try:
        pruners = {
            name: config.pruner if name == config.pruner.name else load_pruner(name) for name in config.bench.pruners
        }
    except UserError as error:
        raise UserError(f"bench.pruners: {error}") from error
    for pruner in pruners.values():
        check_pruner_fits(replace(config, pruner=pruner))
    return pruners


def _one_batch(config: Config, name: str) -> Config:
    """The config of steps that are one micro-batch each."""
    stage = config.stage[name]
    size = config.bench.batch_size or stage.batch_size
    stage = replace(stage, batch_size=size, global_batch_size=size, token_budget=None)
    return replace(config, stage={**config.stage, name: stage})


# -- optimizer steps -------------------------------------------------------------------------------------------------


def _train(
    config: Config,
    stage: str,
    model: PackedLlava,
    batch: Batch,
    pruners: dict[str, PrunerConfig],
    precision: Precision,
    results: Results,
) -> dict[str, Any]:
    ways: dict[str, Way] = {BASELINE: padded(model, batch)} if config.bench.baseline else {}
    for name, settings in pruners.items():
        ways[name] = pruned(model, batch, settings)
    rounds = config.bench.repeats

    def told(numbers: Any) -> Any:
        return progress(list(numbers), "training step", "rounds", rounds + 1)

    with _room_for_features(results) as room:
        if config.bench.cached and batch.pixel_values is not None:
            for name, settings in pruners.items():
                if features := _cached(config, stage, model, [batch], settings, precision, room):
                    ways[f"{name} + cache"] = pruned(model, batch, settings, _reads(features, batch, model.device))
        costs = step_costs(model, ways, rounds, precision.dtype, told)
    dense = costs.get(DENSE)
    what = f"{config.encoder.name} at {config.encoder.image_size} px, {config.llm.name}, peft={config.peft.name}, "
    what += f"{batch.sequence.samples} samples, {precision.name}"
    print(f"\n{steps_text(costs, what)}", flush=True)
    with results.writing() as folder:
        draw_steps(
            {name: cost.seconds for name, cost in costs.items()},
            PARTS,
            {name: shares(cost, dense) for name, cost in costs.items()},
            f"one optimizer step: {what}",
            folder / "bench.png",
        )
    print(f"\n{results.place / 'bench.png'}", flush=True)
    return {name: asdict(cost) | {"keep_ratio": cost.keep_ratio} for name, cost in costs.items()}


@contextmanager
def _room_for_features(results: Results) -> Iterator[Path]:
    """A folder for feature caches that are measured, gone at the end."""
    home = results.folder.parent
    home.mkdir(parents=True, exist_ok=True)
    delete_leftovers(home, "bench")
    with temporary_folder(home, "bench") as room:
        yield room


def _cached(
    config: Config,
    stage: str,
    model: PackedLlava,
    batches: list[Batch],
    settings: PrunerConfig,
    precision: Precision,
    root: Path,
) -> ImageFeatures | None:
    """What stage 1 of a pruner leaves of the batches' images, in a feature cache of their own, filled here; None where
    it cannot be cached."""
    own = replace(config, pruner=settings, trainer=replace(config.trainer, feature_cache_dir=str(root)))
    try:
        check_feature_cache(own, stage)
    except UserError as error:
        why = str(error).removeprefix("trainer.feature_cache=true: ").split(";")[0]
        print(f"{settings.name} is not measured with a feature cache: {why}", flush=True)
        return None
    paths = dict.fromkeys((Path(path) for batch in batches for path in batch.images), "bench")
    with model.pruned_by(settings):
        features, _ = fill_for(own, stage, model, paths, precision.dtype, model.device)
    return features


def _reads(features: ImageFeatures, batch: Batch, device: torch.device) -> Callable[[], Patches]:
    """Reads those of a batch."""
    return lambda: features.read([Path(path) for path in batch.images]).to(device)


def shares(cost: StepCost, dense: StepCost | None) -> tuple[float | None, float | None, float | None]:
    """The LLM's operations, its forward and backward seconds, and peak memory: shares of the dense packed model's."""
    if dense is None:
        return None, None, None
    return (
        cost.language_flops / dense.language_flops,
        cost.language_seconds / dense.language_seconds,
        cost.peak_bytes / dense.peak_bytes,
    )


def causal_share(cost: StepCost, dense: StepCost | None) -> float | None:
    """The LLM's operations as a share of the dense packed model's, causal attention charged as kernels compute it."""
    if dense is None or cost.causal_flops is None or dense.causal_flops is None:
        return None
    return cost.causal_flops / dense.causal_flops


def steps_text(costs: dict[str, StepCost], what: str) -> str:
    """The tables of a step: tokens, seconds, and the LLM's share of the dense packed model's cost."""
    baseline, dense = costs.get(BASELINE), costs.get(DENSE)
    names = ("dense", "stage1", "stage2", "layer_mean", "padding")
    tokens = [[name, *(round(cost.tokens[key], 1) for key in names), cost.keep_ratio] for name, cost in costs.items()]
    repeats = len(next(iter(costs.values())).seconds_all["step"])
    seconds = [
        [
            name,
            *(cost.seconds[part] for part in (*PARTS, "step")),
            baseline.seconds["step"] / cost.seconds["step"] if baseline else None,
        ]
        for name, cost in costs.items()
    ]
    rows = []
    for name, cost in costs.items():
        ideal, achieved, memory = shares(cost, dense)
        causal = causal_share(cost, dense)
        over = [achieved / share if achieved is not None and share else None for share in (ideal, causal)]
        peak_gib = cost.peak_bytes / 2**30
        rows.append([name, cost.flops["step"] / 1e12, ideal, causal, achieved, *over, peak_gib, memory])
    columns = ["way", "TFLOP", "ideal", "causal ideal", "LLM seconds", "/ ideal", "/ causal", "peak GiB", "memory"]
    return "\n\n".join(
        (
            table(tokens, ["way", *names, "keep_ratio"], f"Tokens of the batch: {what}"),
            table(
                seconds,
                ["way", *PARTS, "step", f"x {BASELINE}"],
                f"Seconds of a step, median of {repeats} interleaved",
            ),
            table(
                rows,
                columns,
                f"Shares of {DENSE}: LLM operations, LLM forward + backward, peak memory above the weights",
            ),
        )
    )


# -- answers ---------------------------------------------------------------------------------------------------------


def _generate(
    config: Config,
    model: PackedLlava,
    processor: Any,
    loader: TrainLoader,
    pruners: dict[str, PrunerConfig],
    precision: Precision,
) -> dict[str, Any]:
    size = loader.batches.size
    template = get_template(config.llm.template, processor.tokenizer)
    questions = [questions_of(record, "first")[0] for record in loader.dataset.records[:size]]
    processor.tokenizer.padding_side = "left"
    read = ImageReader(processor.image_processor, loader.dataset.reader.folder).open
    inputs = processor(
        images=[image for question in questions for image in load_images(question, read)] or None,
        text=[question.prompt(template) for question in questions],
        return_tensors="pt",
        padding=True,
    ).to(model.device)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    costs = generation_costs(
        model, inputs, pruners, config.bench.new_tokens, config.bench.repeats, precision.dtype, config.bench.baseline
    )
    for module, training in modes:  # the frozen tower stays in eval mode while the rest trains
        module.training = training
    title = (
        f"Answers of {config.bench.new_tokens} tokens to {len(questions)} prompts, medians of {config.bench.repeats}"
    )
    print(f"\n{generation_text(costs, title)}", flush=True)
    return {name: asdict(cost) for name, cost in costs.items()}


def generation_text(costs: dict[str, GenerationCost], title: str) -> str:
    rows = [[n, c.first_token_seconds, c.tokens_per_second, c.cache_bytes / 2**20] for n, c in costs.items()]
    return table(rows, ["way", "first token s", "tokens / s", "cache MiB"], title)


# -- stage 1 alone ---------------------------------------------------------------------------------------------------


def _selection(
    config: Config, model: PackedLlava, loader: TrainLoader, pruners: dict[str, PrunerConfig], precision: Precision
) -> dict[str, Any]:
    images = list(spread_images(loader, config.bench.images))
    if not images:
        raise UserError(
            "bench.measure=selection: this stage has no sample with an image; choose other data= or bench.stage="
        )
    pixels = torch.stack(images).to(model.device)
    with torch.autocast(model.device.type, dtype=precision.dtype, enabled=precision.dtype != torch.float32):
        costs: dict[str, SelectionCost] = dict(selection_costs(model, pixels, pruners, config.bench.repeats))
    rows = [
        [name, c.patches, c.kept, c.vision_seconds, c.selection_seconds, f"{100 * c.share:.2f} %"]
        for name, c in costs.items()
    ]
    header = ["pruner", "patches", "kept", "vision s", "selection s", "share"]
    title = f"Stage 1 on {len(images)} images, medians of {config.bench.repeats}"
    title += "; questions are empty" if any(reads_text(pruner.vision) for pruner in pruners.values()) else ""
    print(f"\n{table(rows, header, title)}", flush=True)
    return {"images": len(images), "pruners": {name: asdict(cost) for name, cost in costs.items()}}


# -- steps on batches of other lengths -------------------------------------------------------------------------------


def _lengths(
    config: Config,
    stage: str,
    model: PackedLlava,
    loader: TrainLoader,
    pruners: dict[str, PrunerConfig],
    precision: Precision,
    results: Results,
) -> dict[str, Any]:
    batches = [step[0].to(model.device) for step in loader.steps(0, config.bench.batches + 1)]
    costs: dict[str, LengthsCost] = {}
    with _room_for_features(results) as room:
        for name, settings in pruners.items():
            features = None
            if config.bench.cached:
                features = _cached(config, stage, model, batches, settings, precision, room)
            *ways, warm = (
                pruned(model, batch, settings, None if features is None else _reads(features, batch, model.device))
                for batch in batches
            )
            told = partial(progress, title=name, unit="steps", total=len(ways))
            costs[f"{name} + cache" if features else name] = lengths_cost(model, warm, ways, precision.dtype, told)
    rows = [
        [name, len(set(c.tokens)), fmean(c.tokens), sum(c.seconds), sum(c.repeated_seconds), c.ratio, c.cpu_ratio]
        for name, c in costs.items()
    ]
    header = ["way", "different", "tokens", "seconds", "of one batch", "ratio", "CPU ratio"]
    title = f"Steps on {config.bench.batches} batches of the stage, and as many on the one of mean length"
    print(f"\n{table(rows, header, title)}", flush=True)
    return {name: asdict(cost) | {"ratio": cost.ratio} for name, cost in costs.items()}
