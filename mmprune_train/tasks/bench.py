"""`task=bench`: what several pruners cost side by side, on the same batch and weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from mmprune_train.benchmark.generation import generation_costs
from mmprune_train.benchmark.lengths import LengthsCost, lengths_cost
from mmprune_train.benchmark.selection import selection_costs
from mmprune_train.benchmark.steps import BASELINE, PARTS, Shares, StepCost, Way, padded, pruned, step_costs
from mmprune_train.config.command import Command
from mmprune_train.config.compose import load_pruner
from mmprune_train.config.identity import run_dir
from mmprune_train.config.pruner_fits import check_feature_cache, check_pruner_fits
from mmprune_train.config.pruner_schema import PrunerConfig
from mmprune_train.config.pruner_vision import has_weights, reads_text, reads_tower
from mmprune_train.config.schema import Config
from mmprune_train.config.task_schema import BENCHED
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
from mmprune_train.progress import progress
from mmprune_train.quiet import quiet
from mmprune_train.reporting.bench_figure import draw_steps
from mmprune_train.reporting.tables import table
from mmprune_train.storage.atomic import delete_leftovers, temporary_folder
from mmprune_train.storage.files import write_json
from mmprune_train.tasks.checkpoint import Results, find_checkpoint, load
from mmprune_train.tasks.prepare import prepare_data
from mmprune_train.training.features import fill_for
from mmprune_train.training.inputs import evenly_chosen_images, stage_image_processor, stage_loader
from mmprune_train.training.network import kernel_lines, load_stage, make_trainable
from mmprune_train.training.precision import Precision, choose_accelerator, choose_precision
from mmprune_train.training.rundir import git_commit, versions
from mmprune_train.training.starts import start_of

DENSE = "none"
"""The packed model without pruning: what the others are shares of."""


def run(config: Config, command: Command = Command()) -> dict[str, Any]:
    """Write `bench/result.json` and the figure to the run directory; returns the result."""
    found = find_checkpoint(config, command) if config.ckpt else None
    if found is not None and found.trained is None:
        raise UserError(
            f"ckpt={config.ckpt}: task=bench needs a run directory, whose config says how samples are prepared"
        )
    results = Results((found.home if found else run_dir(config)) / "bench")
    config = found.config if found else config
    accelerator = choose_accelerator(config.trainer.accelerator)
    precision = choose_precision(config.trainer.precision, accelerator)
    stage = config.bench.stage or config.stages[-1]
    if config.peft.name == "qlora" and config.stage[stage].use_peft:
        check_quantization(accelerator)
    pruners = chosen_pruners(config)
    prepare_data(config, stage)
    needy = [one for one in pruners.values() if reads_tower(one.vision)]
    needy += [one for one in pruners.values() if has_weights(one.vision)]
    with quiet():
        if found is None:
            whole = replace(config, pruner=needy[0]) if needy else config
            model, processor, _ = load_stage(whole, stage, start_of(config, None, stage), precision, empty=False)
        else:
            model, processor, _ = load(replace(found, pruner=needy[0]) if needy else found)
            make_trainable(model, config, stage, precision)
    if "generate" in config.bench.measure:
        check_room("bench.new_tokens", config.bench.new_tokens, model)
    model.to(accelerator)
    processor.image_processor = stage_image_processor(config, stage)
    tokens = model.config.image_seq_length
    loader = stage_loader(_one_batch(config, stage), stage, processor.tokenizer, tokens, rank=0, world=1)
    print(f"{accelerator}, {precision.name} ({precision.reason}), {torch.get_num_threads()} threads", flush=True)
    kernels = kernel_lines(model, torch.device(accelerator), precision.dtype)
    print(kernels, flush=True)
    result: dict[str, Any] = {
        "ckpt": str(found.model) if found else None,
        "encoder": config.encoder.name,
        "image_size": config.encoder.image_size,
        "llm": config.llm.name,
        "peft": config.peft.name,
        "stage": stage,
        "precision": precision.name,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if accelerator == "cuda" else "cpu",
        "repeats": config.bench.repeats,
        "seed": config.seed,
        "kernels": kernels.splitlines(),
        "versions": versions(),
        "git_commit": git_commit(),
    }
    bench = Bench(config, stage, model, processor, loader, pruners, precision, results)
    for name in BENCHED:
        if name in config.bench.measure:
            result |= getattr(bench, name)()
            with results.writing() as folder:  # it took minutes: what follows may fail
                write_json(folder / "result.json", result)
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


@dataclass(frozen=True)
class Bench:
    """Prints what it measures of one model under several pruners, and returns it for `result.json`."""

    config: Config
    stage: str
    model: PackedLlava
    processor: Any
    loader: TrainLoader
    pruners: dict[str, PrunerConfig]
    precision: Precision
    results: Results

    def train(self) -> dict[str, Any]:
        """Optimizer steps on the first batch."""
        config, model = self.config, self.model
        batch = next(self.loader.steps(0, 1))[0].to(model.device)
        ways: dict[str, Way] = {BASELINE: padded(model, batch)} if config.bench.baseline else {}
        ways |= {name: self._way(batch, settings) for name, settings in self.pruners.items()}
        rounds = config.bench.repeats
        told = partial(progress, title="training step", unit="rounds", total=rounds + 1)
        with self._room_for_features() as room:
            for name, settings in self.pruners.items() if batch.pixel_values is not None else ():
                if features := self._cached([batch], settings, room):
                    ways[f"{name} + cache"] = self._way(batch, settings, features)
            costs = step_costs(model, ways, rounds, self.precision.dtype, told)
        what = f"{config.encoder.name} at {config.encoder.image_size} px, {config.llm.name}, peft={config.peft.name}, "
        what += f"{batch.sequence.samples} samples, {self.precision.name}"
        shares = {name: cost.beside(costs.get(DENSE)) for name, cost in costs.items()}
        print(f"\n{steps_text(costs, shares, what)}", flush=True)
        with self.results.writing() as folder:
            draw_steps(
                {name: cost.seconds for name, cost in costs.items()},
                PARTS,
                shares,
                f"one optimizer step: {what}",
                folder / "bench.png",
            )
        print(f"\n{self.results.place / 'bench.png'}", flush=True)
        rows = {name: asdict(cost) | {"keep_ratio": cost.keep_ratio} for name, cost in costs.items()}
        return {"samples": batch.sequence.samples, "batch_ids": batch.ids, "train": rows}

    def generate(self) -> dict[str, Any]:
        """Answers to the questions of a batch."""
        asked, model, processor, dataset = self.config.bench, self.model, self.processor, self.loader.dataset
        template = get_template(self.config.llm.template, processor.tokenizer)
        questions = [questions_of(record, "first")[0] for record in dataset.records[: self.loader.batches.size]]
        processor.tokenizer.padding_side = "left"
        read = ImageReader(processor.image_processor, dataset.reader.folder).open
        inputs = processor(
            images=[image for question in questions for image in load_images(question, read)] or None,
            text=[question.prompt(template) for question in questions],
            return_tensors="pt",
            padding=True,
        ).to(model.device)
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        costs = generation_costs(
            model, inputs, self.pruners, asked.new_tokens, asked.repeats, self.precision.dtype, asked.baseline
        )
        for module, training in modes:  # the frozen tower stays in eval mode while the rest trains
            module.training = training
        rows = [[n, c.first_token_seconds, c.tokens_per_second, c.cache_bytes / 2**20] for n, c in costs.items()]
        title = f"Answers of {asked.new_tokens} tokens to {len(questions)} prompts, medians of {asked.repeats}"
        print(f"\n{table(rows, ['way', 'first token s', 'tokens / s', 'cache MiB'], title)}", flush=True)
        return {"generate": {name: asdict(cost) for name, cost in costs.items()}}

    def selection(self) -> dict[str, Any]:
        """Stage 1 alone, on images spread over the stage's samples."""
        model, dtype, repeats = self.model, self.precision.dtype, self.config.bench.repeats
        images = list(evenly_chosen_images(self.loader, self.config.bench.images))
        if not images:
            raise UserError(
                "bench.measure=selection: this stage has no sample with an image; choose other data= or bench.stage="
            )
        pixels = torch.stack(images).to(model.device)
        with torch.autocast(model.device.type, dtype=dtype, enabled=dtype != torch.float32):
            costs = selection_costs(model, pixels, self.pruners, repeats)
        rows = [
            [name, c.patches, c.kept, c.vision_seconds, c.selection_seconds, f"{100 * c.share:.2f} %"]
            for name, c in costs.items()
        ]
        header = ["pruner", "patches", "kept", "vision s", "selection s", "share"]
        title = f"Stage 1 on {len(images)} images, medians of {repeats}"
        title += "; questions are empty" if any(reads_text(each.vision) for each in self.pruners.values()) else ""
        print(f"\n{table(rows, header, title)}", flush=True)
        pruners = {name: asdict(cost) for name, cost in costs.items()}
        return {"selection": {"images": len(images), "pruners": pruners}}

    def lengths(self) -> dict[str, Any]:
        """Steps on batches of other lengths."""
        count, model = self.config.bench.batches, self.model
        batches = [step[0].to(model.device) for step in self.loader.steps(0, count + 1)]
        costs: dict[str, LengthsCost] = {}
        with self._room_for_features() as room:
            for name, settings in self.pruners.items():
                features = self._cached(batches, settings, room)
                *ways, warm = (self._way(batch, settings, features) for batch in batches)
                told = partial(progress, title=name, unit="steps", total=len(ways))
                cost = lengths_cost(model, warm, ways, self.precision.dtype, told)
                costs[f"{name} + cache" if features else name] = cost
        rows = [
            [name, len(set(c.tokens)), fmean(c.tokens), sum(c.seconds), sum(c.repeated_seconds), c.ratio, c.cpu_ratio]
            for name, c in costs.items()
        ]
        header = ["way", "different", "tokens", "seconds", "of one batch", "ratio", "CPU ratio"]
        title = f"Steps on {count} batches of the stage, and as many on the one of mean length"
        print(f"\n{table(rows, header, title)}", flush=True)
        return {"lengths": {name: asdict(cost) | {"ratio": cost.ratio} for name, cost in costs.items()}}

    @contextmanager
    def _room_for_features(self) -> Iterator[Path]:
        """A folder for feature caches that are measured, gone at the end."""
        home = self.results.folder.parent
        home.mkdir(parents=True, exist_ok=True)
        delete_leftovers(home, "bench")
        with temporary_folder(home, "bench") as room:
            yield room

    def _cached(self, batches: list[Batch], settings: PrunerConfig, root: Path) -> ImageFeatures | None:
        """What stage 1 of a pruner leaves of the batches' images, in a feature cache of their own, filled here; None
        where it cannot be cached, or is not asked for."""
        if not self.config.bench.cached:
            return None
        trainer = replace(self.config.trainer, feature_cache_dir=str(root))
        own, model = replace(self.config, pruner=settings, trainer=trainer), self.model
        try:
            check_feature_cache(own, self.stage)
        except UserError as error:
            why = str(error).removeprefix("trainer.feature_cache=true: ").split(";")[0]
            print(f"{settings.name} is not measured with a feature cache: {why}", flush=True)
            return None
        paths = dict.fromkeys((Path(path) for batch in batches for path in batch.images), "bench")
        with model.pruned_by(settings):
            return fill_for(own, self.stage, model, paths, self.precision.dtype, model.device)[0]

    def _way(self, batch: Batch, settings: PrunerConfig, features: ImageFeatures | None = None) -> Way:
        """A pruner on a batch; with features in place of its images, where there are some."""
        if features is None:
            return pruned(self.model, batch, settings)
        paths = [Path(path) for path in batch.images]
        return pruned(self.model, batch, settings, lambda: features.read(paths).to(self.model.device))


def steps_text(costs: dict[str, StepCost], shares: Mapping[str, Shares], what: str) -> str:
    """The tables of a step: tokens, seconds, and the LLM's share of the dense packed model's cost."""
    baseline = costs.get(BASELINE)
    names = ("dense", "stage1", "stage2", "layer_mean", "padding")
    tokens, seconds, parts = [], [], []
    for name, cost in costs.items():
        tokens.append([name, *(round(cost.tokens[key], 1) for key in names), cost.keep_ratio])
        faster = baseline.seconds["step"] / cost.seconds["step"] if baseline else None
        seconds.append([name, *(cost.seconds[part] for part in (*PARTS, "step")), faster])
        ideal, achieved, memory, causal = shares[name]
        over = [achieved / share if achieved is not None and share else None for share in (ideal, causal)]
        peak_gib = cost.peak_bytes / 2**30
        parts.append([name, cost.flops["step"] / 1e12, ideal, causal, achieved, *over, peak_gib, memory])
    columns = ["way", "TFLOP", "ideal", "causal ideal", "LLM seconds", "/ ideal", "/ causal", "peak GiB", "memory"]
    title = f"Shares of {DENSE}: LLM operations, LLM forward + backward, peak memory above the weights"
    timed = f"Seconds of a step, median of {len(next(iter(costs.values())).seconds_all['step'])} interleaved"
    tables = (
        table(tokens, ["way", *names, "keep_ratio"], f"Tokens of the batch: {what}"),
        table(seconds, ["way", *PARTS, "step", f"x {BASELINE}"], timed),
        table(parts, columns, title),
    )
    return "\n\n".join(tables)
