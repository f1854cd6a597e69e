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
from mmprune_train.config.pruner_vision import has_weights
from mmprune_train.config.ranges import check_values
from mmprune_train.config.schema import STRATEGIES, Config, DataConfig, StageConfig, WandbConfig
from mmprune_train.config.task_schema import BENCHED, SweepConfig
from mmprune_train.errors import UserError, unknown_name

UNQUANTIZED = ("deepspeed_zero3", "deepspeed_zero3_offload", "fsdp2")
"""Strategies that shard the frozen weights, which they cannot do with 4-bit ones."""
CACHING_TASKS = ("train", "prepare", "plan")
"""Tasks that `trainer.feature_cache` concerns."""
TAKEN = {*dir(DataConfig), *(item.name for item in dataclasses.fields(DataConfig))} - {"pretrain", "instruct"}
TAKEN |= {"bench", "calibrate", "check_data", "export", "generate", "inspect", "plan", "prepare", "report", "stages"}
"""What no training stage can be called: other keys of `data`, other folders of a run, and `stages` beside `stage`."""


def check(config: Config) -> None:
    """Raise UserError at the first setting that cannot work."""
    check_values(config)
    check_encoder(config.encoder)
    check_llm(config.llm)
    check_knee("knee", config.knee)
    check_pruner(config.pruner)
    check_pruner_fits(config)
    if not config.ckpt:  # else the stages are those of its run
        check_stage_names(config)
    _check_stages(config)
    _check_peft(config)
    if len(config.optim.betas) != 2:
        raise UserError(f"optim.betas={config.optim.betas} must be two numbers, [0.9,0.999]")
    _check_tasks(config)
    _check_wandb(config.logger.wandb)


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
    scores = stage.train_scorer and has_weights(config.pruner.vision)
    if not (stage.train_projector or stage.train_llm or stage.train_vision or scores):
        raise UserError(f"{key} trains nothing: set one of train_projector, train_llm, train_vision to true")
    if config.trainer.feature_cache and config.task in CACHING_TASKS:
        check_feature_cache(config, name)
    processes = 1 if config.task == "evaluate" else config.trainer.devices * config.trainer.num_nodes
    if (stage.strategy or config.strategy.name) == "single" and processes > 1:
        where = f"{key}.strategy" if stage.strategy else "strategy.name"
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
    if config.task == "train" and config.evaluate.after_train and config.evaluate.benchmarks:
        raise UserError(
            "evaluate.benchmarks: after training data.evaluate alone is asked; leave it out, and ask the run with "
            "task=evaluate ckpt=RUN"
        )
    room = (context or math.inf) - tokens
    if config.task == "train" and config.evaluate.after_train and config.evaluate.max_new_tokens >= room:
        raise UserError(
            f"evaluate.max_new_tokens={config.evaluate.max_new_tokens}: llm {config.llm.name} reads {context} tokens, "
            f"{tokens} of them an image's; set less than {room}"
        )


def _check_peft(config: Config) -> None:
    peft, stages = config.peft, config.stage
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


def _check_wandb(wandb: WandbConfig | None) -> None:
    for key in ("project", "entity") if wandb else ():
        if not re.fullmatch(r"[^/\\#?%:]{1,128}", getattr(wandb, key) or "x" * (key == "entity")):
            raise UserError(f"logger.wandb.{key}: 1 to 128 characters, none of them / \\ # ? % :")
    if wandb and any(not 1 <= len(tag) <= 64 for tag in wandb.tags):
        raise UserError(f"logger.wandb.tags={wandb.tags}: tags have 1 to 64 characters")


def _check_tasks(config: Config) -> None:
    told = [f"{share:g}" for share in config.evaluate.budgets]
    if len(set(told)) < len(told):
        raise UserError(f"evaluate.budgets={config.evaluate.budgets}: two shares have one name; leave one out")
    if not config.bench.measure:
        raise UserError(f"bench.measure is empty: name some of {', '.join(BENCHED)}")
    if not config.bench.pruners:
        raise UserError("bench.pruners is empty: name what to measure, e.g. bench.pruners=[none,twostage]")
    for name in config.calibrate.budgets:
        if name not in names("budget"):
            raise UserError(unknown_name("calibrate.budgets", name, names("budget")))
    if config.task == "calibrate":
        check_calibrated(config.pruner)
    check_sweep(config.sweep)
    if len(set(heat := config.report.heat)) not in (0, 2):
        raise UserError(f"report.heat={heat} needs two different keys, rows first; [] chooses them itself")


def check_sweep(sweep: SweepConfig) -> None:
    check_values(sweep, "sweep.")
    names = sweep.objectives
    if not names or len(set(names)) < len(names):
        raise UserError(f"sweep.objectives={names} must name one number or several different ones")
    if len(sweep.directions) != len(names):
        raise UserError(
            f"sweep.directions has {len(sweep.directions)} entries for {len(names)} objectives "
            f"({', '.join(names)}): give each of them maximize or minimize"
        )
