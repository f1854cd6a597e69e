"""One stage from start to `model/`: a linear story over Lightning's Trainer."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from pickle import UnpicklingError
from statistics import fmean, median
from typing import Any

import pytorch_lightning as pl
import torch

from mmprune_train.config.schema import Config, StageConfig
from mmprune_train.data.sources import split_files
from mmprune_train.errors import NotFinite, UserError
from mmprune_train.model.llava import PackedLlava
from mmprune_train.model.peft import merge_adapters, save_adapters
from mmprune_train.model.weights.files import pickled
from mmprune_train.model.weights.start import Start
from mmprune_train.quiet import quiet
from mmprune_train.storage.atomic import whole_folder
from mmprune_train.storage.files import rows_of
from mmprune_train.storage.run_files import files_of_stage
from mmprune_train.storage.secrets import masked
from mmprune_train.training.callbacks import MetricsWriter, Progress
from mmprune_train.training.checkpoint_files import STATE, check_written_by, data_alone, last_checkpoint, step_of
from mmprune_train.training.checkpoints import Checkpoints, PlainFile
from mmprune_train.training.cluster import environment
from mmprune_train.training.divergence import Divergence, broken_tensors
from mmprune_train.training.features import askers, fill_for
from mmprune_train.training.freezing import freezing_table, parts_of
from mmprune_train.training.inputs import (
    evenly_chosen_images,
    evenly_chosen_paths,
    stage_annotations,
    stage_extent,
    stage_image_processor,
    stage_loader,
)
from mmprune_train.training.loggers import build_loggers, open_loggers
from mmprune_train.training.module import MultimodalModule
from mmprune_train.training.network import (
    MATCHED_IMAGES,
    fit_projector,
    kernel_lines,
    load_stage,
    match_projector,
    named,
    uses_adapters,
)
from mmprune_train.training.precision import Precision, choose_accelerator, choose_precision
from mmprune_train.training.preemption import EndWhenAsked, Preemption
from mmprune_train.training.processes import ranks_of
from mmprune_train.training.rundir import RunDirectory
from mmprune_train.training.sharding import broadcast, shards_weights, whole_weights
from mmprune_train.training.sources import component_hashes, file_entry, with_advice
from mmprune_train.training.strategies import build_strategy, start_processes
from mmprune_train.training.stream import BatchStream
from mmprune_train.training.throughput import STARVED, peak


def run_stage(
    config: Config, name: str, run: RunDirectory, start_from: Start | None, preemption: Preemption | None = None
) -> dict[str, Any]:
    """Train one stage, or go on with it, and write its `model/`.

    Args:
        run: the run directory; the newest checkpoint in it is continued.
        start_from: the weights to start from; None: the base weights.
        preemption: hears the signals that ask the run to end; None: they are not heard.
    Returns:
        Summary of the stage, as `summary` gives it.
    """
    stage = config.stage[name]
    folder = run.stage(name)
    accelerator = choose_accelerator(config.trainer.accelerator)
    precision = choose_precision(config.trainer.precision, accelerator)
    strategy = stage.strategy or config.strategy.name
    trainer = build_trainer(config, stage, strategy, accelerator, precision, folder)
    start_processes(trainer)
    start_from = ranks_of(trainer).exchange(start_from)[0]  # what the others see of the disk may be older
    resume = last_checkpoint(folder / "checkpoints", ranks_of(trainer))
    if resume:
        check_written_by(resume, strategy, trainer.world_size)
    resumed_step = step_of(resume) if resume else 0
    made = "".join(filter(str.isdigit, str(run.manifest.get("created", ""))))[:14]  # a run started over gets new pages
    title = f"{config.experiment_name}-{run.path.name}-{name}-{made}"
    trainer.loggers = loggers = build_loggers(config.logger, folder, title, resumed_step)
    empty = shards_weights(trainer.strategy) and not trainer.is_global_zero  # filled by `shard`
    components = component_hashes(config.pruner)  # as they are imported
    model, processor, parts = load_stage(config, name, start_from, precision, empty)
    kernels = kernel_lines(model, torch.device(accelerator), precision.dtype)

    annotations = split_files(config.data, name)[0]
    source = file_entry(annotations) if run.writable else {}
    data, features = stage_annotations(config, name), None
    records, extent = data.records, stage_extent(config, name, data)
    steps = extent.steps
    if config.trainer.feature_cache:
        if shards_weights(trainer.strategy):
            for part, modules in parts_of(model).items():
                if part != "llm":
                    broadcast(modules, trainer.strategy.root_device, stay=True)
        device, ranks = trainer.strategy.root_device, ranks_of(trainer)
        features, report = fill_for(config, name, model, askers(records), precision.dtype, device, ranks)
        if trainer.is_global_zero:
            print(f"feature cache: {report.line()}; {report.folder}", flush=True)
    tokenizer, image_tokens = processor.tokenizer, model.config.image_seq_length
    mine = trainer.global_rank, trainer.world_size
    loader = stage_loader(config, name, tokenizer, image_tokens, *mine, records, features)
    loader.dataset.check_cuts()
    if (start_from is None or start_from.new_projector) and config.projector.init == "matched" and not empty:
        if features is None:
            match_projector(model, list(evenly_chosen_images(loader, MATCHED_IMAGES)))
        else:
            paths = [path for path, _ in evenly_chosen_paths(records, MATCHED_IMAGES)]
            fit_projector(model, features.read(paths).chosen)
    stream = BatchStream(loader, steps)
    module = MultimodalModule(name, model, parts, config.optim, steps, config.seed, stage.token_budget)
    limit = peak(trainer.strategy.root_device, precision.dtype)
    metrics = MetricsWriter(folder / "metrics.jsonl", stream, limit.tflops)
    saves = Checkpoints(folder / "checkpoints", metrics, strategy, steps, config.trainer)
    divergence = Divergence(folder / "checkpoints", steps, config.trainer)
    trainer.callbacks += [divergence, metrics, Progress(name, steps, config.trainer.log_every, metrics), saves]
    if preemption is not None:
        trainer.callbacks.append(EndWhenAsked(preemption, saves))

    if trainer.is_global_zero:
        packs = f"packs to {stage.token_budget} tokens" if stage.token_budget else f"{stage.batch_size} samples"
        print(freezing_table(parts, f"\nStage {name}: {extent.text}\n{packs} a forward pass"), flush=True)
        print(f"{accelerator}, {precision.name} ({precision.reason}), {config.trainer.devices} device(s)", flush=True)
        print(f"MFU is of {limit.tflops:.3g} TFLOP/s: {limit.source}", flush=True)
        print(kernels, flush=True)
        if resume:
            print(f"continues after step {resumed_step}", flush=True)
    source |= {"samples": extent.available, "used": extent.used}
    run.update_stage(name, state="running", steps=steps, data=source, components=components)
    began = time.perf_counter()
    state = resume and resume / STATE
    with quiet(), data_alone(), open_loggers(loggers), nullcontext() if features is None else model.without_tower():
        try:
            trainer.fit(module, train_dataloaders=stream, ckpt_path=state, weights_only=True if state else None)
        except UserError as error:
            raise with_advice(error, run, name, annotations) from None
        except UnpicklingError as error:  # a checkpoint of a forger, who made its checksum fit
            raise UserError(
                f"{state} {pickled(error)}; put the run's own there, or give restart=true to start the run over"
            ) from None
    if trainer.global_step < steps:
        raise RuntimeError(f"stage {name} stopped at step {trainer.global_step} of {steps}")

    processor.image_processor = stage_image_processor(config, name)
    with whole_weights(trainer.strategy, model), quiet():
        if trainer.is_global_zero:
            save_stage(model, processor, folder, start_from, uses_adapters(config, name))
    trainer.strategy.barrier("model saved")
    found = {"samples_used": extent.used, "samples_available": extent.available, "passes": extent.passes}
    found |= summary(folder / "metrics.jsonl") if trainer.is_global_zero else {}
    if cut := found.get("samples_truncated"):
        print(
            f"{name}: stage.{name}.max_length={stage.max_length} cut {cut:,} of {found['samples']:,} samples, "
            f"{found['tokens_truncated']:,} tokens were not trained on",
            flush=True,
        )
    if skipped := found.get("steps_skipped"):
        print(f"{name}: {skipped} of {steps} steps were not applied, their loss or gradient was not finite", flush=True)
    if found.get("data_share", 0.0) >= STARVED:
        print(
            f"{name}: {found['data_share']:.0%} of the time went into waiting for data; raise trainer.num_workers "
            f"(now {config.trainer.num_workers})",
            flush=True,
        )
    if run.writable:
        minutes = (time.perf_counter() - began) / 60
        run.update_stage(name, state="done", wall_minutes=minutes, **found, files=files_of_stage(folder))
    return found


def save_stage(model: PackedLlava, processor: Any, folder: Path, start_from: Start | None, adapters: bool) -> None:
    """Write what a stage has trained below its folder: `model/`, and `adapters/` before they are merged into it.

    Raises NotFinite, and writes no `model/`, where that would not be finite.
    """
    if adapters:
        with whole_folder(folder / "adapters") as part:
            save_adapters(model, part, None if start_from is None else start_from.adapted)
        merge_adapters(model.hf)
    if broken := broken_tensors(model):
        raise NotFinite(
            f"{folder / 'model'} is not written: {named(broken)} of the trained network is not finite; train with a "
            f"lower stage.{folder.name}.lr and another run_id=, or restart=true"
        )
    with whole_folder(folder / "model") as part:
        model.save(part, processor)
        settings = part / "config.json"
        settings.write_text(masked(settings.read_text(encoding="utf-8")), encoding="utf-8")


def build_trainer(
    config: Config, stage: StageConfig, strategy: str, accelerator: str, precision: Precision, folder: Path
) -> pl.Trainer:
    """Lightning's Trainer of a stage, without callbacks and loggers."""
    own = config.trainer
    files = [] if strategy.startswith("deepspeed") else [PlainFile()]  # DeepSpeed writes its files itself
    with quiet():
        return pl.Trainer(
            accelerator=accelerator,
            devices=own.devices,
            num_nodes=own.num_nodes,
            strategy=build_strategy(strategy, accelerator, config.strategy.find_unused_parameters, stage.batch_size),
            plugins=[environment(own.devices * own.num_nodes), *files],
            precision=precision.lightning,
            gradient_clip_val=config.optim.grad_clip,
            max_epochs=1,  # of the stream, which is the whole stage
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            default_root_dir=folder,
            logger=False,
        )


def summary(metrics: Path) -> dict[str, float]:
    """What a stage's metrics.jsonl says about the whole stage; unlike a clock, it survives interruptions."""
    rows = list(rows_of(metrics))

    def total(key: str) -> float:
        return sum(row.get(key, 0) for row in rows)

    seconds = total("step_seconds")
    found = {
        "loss": fmean([row["loss"] for row in rows if row["loss"] is not None][-10:]),
        "steps_skipped": total("steps_skipped"),
        "train_minutes": seconds / 60,
        "step_seconds": median(row["step_seconds"] for row in rows),
        "keep_ratio": total("tokens_layer_mean") / total("tokens_dense"),
        "samples": total("samples"),
        "samples_truncated": total("samples_truncated"),
        "tokens_truncated": total("tokens_truncated"),
        "samples_per_second": total("samples") / seconds,
        "data_share": total("data_seconds") / seconds,
        "mfu": sum(row["mfu"] * row["step_seconds"] for row in rows) / seconds,
    }
    if "budget_use" in rows[0]:  # batches are packed to a budget
        found |= {name: fmean(row[name] for row in rows) for name in ("micro_batches", "budget_use")}
        found |= {name: total(name) for name in ("budget_overruns", "padding_tokens")}
    return found
