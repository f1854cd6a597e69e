"""What types cannot say: values out of range, unknown names, settings that contradict each other.

Every message names the key and the fix. Only the config is read; whether files exist is the tasks' business. What
concerns the pruner alone is in `pruner.py`, what it needs of the rest in `pruner_fits.py`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from keyword import iskeyword

from mmprune_train.components.registry import names
from mmprune_train.config.knee import check_knee
from mmprune_train.config.networks import check_encoder, check_llm
from mmprune_train.config.pruner import check_pruner
from mmprune_train.config.pruner_fits import check_calibrated, check_feature_cache, check_pruner_fits
from mmprune_train.config.ranges import check_folder_name, check_values
from mmprune_train.config.schema import Config, DataConfig, OptimConfig, StageConfig
from mmprune_train.config.task_schema import ReportConfig, SweepConfig
from mmprune_train.config.values import one_of
from mmprune_train.devices import CPU, DEVICES
from mmprune_train.errors import UserError, unknown_name

STRATEGIES = (
    "single", "ddp", "fsdp2", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3", "deepspeed_zero2_offload",
    "deepspeed_zero3_offload",
)  # fmt: skip
UNQUANTIZED = ("deepspeed_zero3", "deepspeed_zero3_offload", "fsdp2")
"""Strategies that shard the frozen weights, which they cannot do with 4-bit ones."""
BENCHED = ("train", "generate", "selection", "lengths")
ATTENTION = ("auto", "flash_4", "flash_3", "flash_2", "torch_varlen", "flex", "cpu_flash", "sdpa_per_sample")
CACHING_TASKS = ("train", "prepare", "plan")
"""Tasks that `trainer.feature_cache` concerns."""
DIRECTIONS = ("maximize", "minimize")
TAKEN = {*dir(DataConfig), *(item.name for item in dataclasses.fields(DataConfig))} - {"pretrain", "instruct"}
TAKEN |= {"bench", "calibrate", "check_data", "export", "generate", "inspect", "plan", "prepare", "report", "stages"}
"""What no training stage can be called: other keys of `data`, other folders of a run, and `stages` beside `stage`."""


def check(config: Config) -> None:
    """Raise UserError at the first setting that cannot work."""
    check_values(config)
    check_encoder(config.encoder)
    check_llm(config.llm)
    one_of("projector.name", config.projector.name, ("linear", "mlp2x_gelu"))
    one_of("projector.init", config.projector.init, ("torch", "unit_variance", "matched"))
    check_knee("knee", config.knee)
    check_pruner(config.pruner)
    check_pruner_fits(config)
    if not config.ckpt:  # else the stages are those of its run
        check_stage_names(config)
    _check_stages(config)
    _check_peft(config)
    check_optim(config.optim)
    _check_run(config)


def check_stage_names(config: Config) -> None:
    """Raise UserError where a key names a training stage that `stage` does not have."""
    named = {"stages": config.stages, "calibrate.split": [config.calibrate.split]}
    named["bench.stage"] = [config.bench.stage] if config.bench.stage else []
    read = ("stages", f"{config.task}.stage", f"{config.task}.split")
    for key, given in named.items():
        for name in given if key in read else ():
            if name not in config.stage:
                raise UserError(f"{unknown_name(key, name, config.stage)}, or choose a stage= that has it")


def _check_stages(config: Config) -> None:
    for name in config.stage:
        if not name.isidentifier() or iskeyword(name) or name in TAKEN:
            raise UserError(
                f"stage.{name}: a training stage is a folder of its run and a key of data; name it otherwise, in "
                "letters, digits and _"
            )
    stages = [name for name in config.stages if name in config.stage or not config.ckpt]
    if not config.stages:
        raise UserError(f"stages is empty: name some of {', '.join(config.stage) or 'those that a stage= has'}")
    if stages != [name for name in config.stage if name in stages]:
        raise UserError(f"stages={config.stages} must be in order and without repeats: {', '.join(config.stage)}")
    for name in stages:
        _check_stage(config, name, config.stage[name])
        if config.task == "train" and config.data.part(name).annotations is None:
            raise UserError(f"data.{name}.annotations is not set, and stage {name} needs it: {config.data.how_to_get}")


def _check_stage(config: Config, name: str, stage: StageConfig) -> None:
    key = f"stage.{name}"
    one_of(f"{key}.template", stage.template, ("plain", "v1", "chat", "auto"))
    one_of(f"{key}.checkpointed_layers", stage.checkpointed_layers, ("all", "before", "after"))
    one_of(f"{key}.image_aspect_ratio", stage.image_aspect_ratio, ("square", "pad"))
    if not (stage.train_projector or stage.train_llm or stage.train_vision):
        raise UserError(f"{key} trains nothing: set one of train_projector, train_llm, train_vision to true")
    if config.trainer.feature_cache and config.task in CACHING_TASKS:
        check_feature_cache(config, name)
    processes = config.trainer.devices * config.trainer.num_nodes
    strategy = stage.strategy or config.strategy.name
    where = f"{key}.strategy" if stage.strategy else "strategy.name"
    one_of(where, strategy, STRATEGIES)
    if strategy == "single" and processes > 1:
        raise UserError(
            f"{where}=single runs one process, but trainer asks for {processes}: add strategy=ddp, or for "
            f"large models another of {', '.join(STRATEGIES[2:])} (docs/strategies.md)"
        )
    one_pass = processes * (stage.batch_size if stage.token_budget is None else 1)
    if processes > 0 and stage.global_batch_size % one_pass:
        fits = max(1, round(stage.global_batch_size / one_pass)) * one_pass
        what, other = f"{processes} processes", "trainer.devices"
        if stage.token_budget is None:
            what, other = f"{key}.batch_size={stage.batch_size} x {what}", f"{key}.batch_size"
        raise UserError(
            f"{key}.global_batch_size={stage.global_batch_size} is no multiple of {what}: set "
            f"{key}.global_batch_size={fits}, or another {other}"
        )
    tokens = config.encoder.patches
    if stage.max_length <= tokens:
        raise UserError(
            f"{key}.max_length={stage.max_length} has no room for text beside an image of {tokens} tokens: "
            f"set it to {tokens + 256} or more"
        )
    context = config.llm.arch.get("max_position_embeddings")
    if context is not None and stage.max_length > context:
        raise UserError(
            f"{key}.max_length={stage.max_length} is longer than llm {config.llm.name} can read: at most {context}"
        )
    room = (context or math.inf) - tokens
    if config.task == "train" and config.evaluate.after_train and config.evaluate.max_new_tokens >= room:
        raise UserError(
            f"evaluate.max_new_tokens={config.evaluate.max_new_tokens}: llm {config.llm.name} reads {context} tokens, "
            f"{tokens} of them an image's; set less than {room}"
        )


def _check_peft(config: Config) -> None:
    peft, stages = config.peft, config.stage
    one_of("peft.name", peft.name, ("none", "lora", "dora", "qlora"))
    if peft.name == "none":
        return
    if peft.r > (width := config.llm.arch.get("hidden_size") or math.inf):
        raise UserError(
            f"peft.r={peft.r} is more than the width of llm {config.llm.name}: adapters have at most {width}"
        )
    users = [name for name, stage in stages.items() if stage.use_peft]
    if not users:
        raise UserError(f"peft={peft.name}, but no stage uses it: set stage.{list(stages)[-1]}.use_peft=true")
    for name in users:
        if not stages[name].train_llm:
            raise UserError(f"stage.{name} puts adapters on a frozen LLM: set stage.{name}.train_llm=true")
        strategy = stages[name].strategy or config.strategy.name
        if peft.name == "qlora" and strategy in UNQUANTIZED:
            raise UserError(
                f"peft=qlora: strategy={strategy} of stage.{name} shards the frozen weights over the devices, which "
                "4-bit weights do not survive; use strategy=deepspeed_zero2 (or ddp, single), or peft=lora"
            )


def check_optim(optim: OptimConfig) -> None:
    one_of("optim.name", optim.name, ("adamw",))
    one_of("optim.schedule", optim.schedule, ("cosine", "linear", "constant"))
    if len(optim.betas) != 2:
        raise UserError(f"optim.betas={optim.betas} must be two numbers, [0.9,0.999]")


def _check_run(config: Config) -> None:
    trainer, evaluate = config.trainer, config.evaluate
    one_of("trainer.accelerator", trainer.accelerator, ("auto", "cpu", "cuda"))
    one_of("trainer.precision", trainer.precision, ("auto", "bf16", "fp32"))
    one_of("trainer.attention", trainer.attention, ATTENTION)
    one_of("trainer.on_nonfinite", trainer.on_nonfinite, ("stop", "skip"))
    one_of("init_adapters", config.init_adapters, ("auto", "continue", "merge"))
    one_of("data.source", config.data.source, ("easy_vqa", None))
    one_of("evaluate.turns", evaluate.turns, ("all", "first"))
    _check_bench(config)
    _check_calibrate(config)
    one_of("plan.device", config.plan.device, (*DEVICES, CPU, None))
    check_sweep(config.sweep)
    _check_report(config.report)
    if config.logger.wandb is not None:
        one_of("logger.wandb.mode", config.logger.wandb.mode, ("auto", "online", "offline"))
        for key in ("project", "entity"):
            if not re.fullmatch(r"[^/\\#?%:]{1,128}", getattr(config.logger.wandb, key) or "x" * (key == "entity")):
                raise UserError(f"logger.wandb.{key}: 1 to 128 characters, none of them / \\ # ? % :")
        if any(not 1 <= len(tag) <= 64 for tag in config.logger.wandb.tags):
            raise UserError(f"logger.wandb.tags={config.logger.wandb.tags}: tags have 1 to 64 characters")
    check_folder_name("experiment_name", config.experiment_name)
    check_folder_name("run_id", config.run_id)
    check_folder_name("evaluate.name", evaluate.name)
    check_folder_name("pruner.name", config.pruner.name)
    check_folder_name("data.name", config.data.name)
    check_folder_name("encoder.name", config.encoder.name)
    check_folder_name("llm.name", config.llm.name)


def _check_bench(config: Config) -> None:
    settings = config.bench
    for name in settings.measure:
        one_of("bench.measure", name, BENCHED)
    if not settings.measure:
        raise UserError(f"bench.measure is empty: name some of {', '.join(BENCHED)}")
    if not settings.pruners:
        raise UserError("bench.pruners is empty: name what to measure, e.g. bench.pruners=[none,twostage]")


def _check_calibrate(config: Config) -> None:
    settings = config.calibrate
    one_of("calibrate.measure", settings.measure, ("vision", "layer_mean"))
    for name in settings.budgets:
        one_of("calibrate.budgets", name, names("budget"))
    if config.task == "calibrate":
        check_calibrated(config.pruner)


def check_sweep(sweep: SweepConfig) -> None:
    names = sweep.objectives
    if not names or len(set(names)) < len(names):
        raise UserError(f"sweep.objectives={names} must name one number or several different ones")
    for direction in sweep.directions:
        one_of("sweep.directions", direction, DIRECTIONS)
    if len(sweep.directions) != len(names):
        raise UserError(
            f"sweep.directions has {len(sweep.directions)} entries for {len(names)} objectives "
            f"({', '.join(names)}): give each of them maximize or minimize"
        )


def _check_report(report: ReportConfig) -> None:
    if len(set(report.heat)) not in (0, 2):
        raise UserError(f"report.heat={report.heat} needs two different keys, rows first; [] chooses them itself")
