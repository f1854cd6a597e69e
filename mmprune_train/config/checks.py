"""What types cannot say: values out of range, unknown names, settings that contradict each other.

Every message names the key and the fix. Only the config is read; whether files exist is the tasks' business. What
concerns the pruner alone is in `pruner.py`.
"""

from __future__ import annotations

import re
from typing import Any

from mmprune_train.config.explain import unknown_name
from mmprune_train.config.pruner import (
    KNEE_METHODS,
    SCORE_NEEDS,
    TEXT_SCORES,
    check_knee,
    check_pruner,
    possible_scores,
    projects,
    pruned_layers,
    reads_text,
    stage_one_scores,
)
from mmprune_train.config.schema import STAGES, Config, EncoderConfig, LlmConfig, OptimConfig, StageConfig, WheelConfig
from mmprune_train.config.task_schema import PlanConfig, ReportConfig, SweepConfig
from mmprune_train.config.values import at_least, file_name, one_of
from mmprune_train.errors import UserError

STRATEGIES = (
    "single", "ddp", "fsdp2", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3", "deepspeed_zero2_offload",
    "deepspeed_zero3_offload",
)  # fmt: skip
UNQUANTIZED = ("deepspeed_zero3", "deepspeed_zero3_offload", "fsdp2")
"""Strategies that spread the frozen weights, which they cannot do with 4-bit ones."""
BENCHED = ("train", "generate", "selection")
ATTENTION = ("auto", "flash_4", "flash_3", "flash_2", "torch_varlen", "flex", "cpu_flash", "sdpa_per_sample")
CACHING_TASKS = ("train", "prepare", "plan")
"""Tasks that `trainer.feature_cache` concerns."""
DEVICES = (
    "b200_180gb", "h200_141gb", "h100_80gb", "h100_pcie_80gb", "h100_nvl_94gb", "a100_80gb", "a100_40gb", "l40s_48gb",
    "rtx_a6000_48gb", "rtx4090_24gb", "rtx3090_24gb", "l4_24gb", "a10_24gb", "cpu",
)  # fmt: skip
"""Names of `plan.device`."""
DIRECTIONS = ("maximize", "minimize")


def check(config: Config) -> None:
    """Raise UserError at the first setting that cannot work."""
    check_encoder(config.encoder)
    check_llm(config.llm)
    one_of("projector.name", config.projector.name, ("linear", "mlp2x_gelu"))
    one_of("projector.init", config.projector.init, ("torch", "unit_variance", "matched"))
    check_knee("knee", config.knee)
    check_pruner(config.pruner)
    check_pruner_fits(config)
    _check_stages(config)
    _check_peft(config)
    check_optim(config.optim)
    _check_run(config)


def check_encoder(encoder: EncoderConfig) -> None:
    arch = encoder.arch
    _model_type("encoder", arch)
    _wheel("encoder.wheel", encoder.wheel)
    at_least("encoder.image_size", encoder.image_size, 1)
    at_least("encoder.patch_size", encoder.patch_size, 1)
    if arch.get("patch_size", encoder.patch_size) != encoder.patch_size:
        raise UserError(
            f"encoder.patch_size={encoder.patch_size} differs from encoder.arch.patch_size={arch['patch_size']}: "
            "a patch size belongs to the weights, so set both to theirs"
        )
    trained = arch.get("image_size", encoder.image_size)
    if arch["model_type"] == "dinov2":  # interpolates its position embeddings
        if encoder.image_size % encoder.patch_size:
            raise UserError(
                f"encoder.image_size={encoder.image_size} is no multiple of encoder.patch_size={encoder.patch_size}: "
                f"use {max(1, round(encoder.image_size / encoder.patch_size)) * encoder.patch_size}"
            )
    elif encoder.image_size != trained:
        raise UserError(
            f"encoder.image_size={encoder.image_size}: {arch['model_type']} has position embeddings for "
            f"{trained} pixels only; set encoder.image_size={trained} (or choose encoder=dinov2_small)"
        )
    layers = arch.get("num_hidden_layers")
    if layers is not None and not -layers - 1 <= encoder.feature_layer <= layers:
        raise UserError(
            f"encoder.feature_layer={encoder.feature_layer}: {encoder.name} has {layers} layers, so hidden states "
            f"{-layers - 1}..{layers}; LLaVA uses -2"
        )
    for key in ("image_mean", "image_std"):
        if len(getattr(encoder, key)) != 3:
            raise UserError(f"encoder.{key} needs three numbers (red, green, blue), got {getattr(encoder, key)}")
    if encoder.text is not None and arch["model_type"] != "clip_vision_model":
        raise UserError(f"encoder.text: a CLIP text tower does not fit a {arch['model_type']}; set encoder.text=null")


def check_llm(llm: LlmConfig) -> None:
    _model_type("llm", llm.arch)
    _wheel("llm.wheel", llm.wheel)
    one_of("llm.template", llm.template, ("v1", "chat"))


def check_pruner_fits(config: Config) -> None:
    """Raise UserError where the encoder or the LLM cannot give what the pruner asks."""
    vision, language = config.pruner.vision, config.pruner.language
    first, *others = possible_scores(config.encoder)
    for key, score in stage_one_scores(vision):
        if ":" not in score and score not in (first, *others):
            textual = "choose encoder=clip_vit_l14_336 (or clip_vit_b32), or " if score in TEXT_SCORES else ""
            raise UserError(
                f"{key}={score} needs {SCORE_NEEDS[score]}, which encoder {config.encoder.name} has not: "
                f"{textual}add {key}={first} (or {', '.join(others)})"
            )
    blocks = config.encoder.arch.get("num_hidden_layers")
    if vision.enabled and vision.layer is not None and blocks is not None and not -blocks <= vision.layer < blocks:
        raise UserError(
            f"pruner.vision.layer={vision.layer}: encoder {config.encoder.name} has {blocks} blocks, "
            f"{-blocks}..{blocks - 1}; null takes the one that made the feature layer"
        )
    depth = config.llm.arch.get("num_hidden_layers")
    if language.enabled and depth is not None:
        pruned_layers(language, depth)


def _check_stages(config: Config) -> None:
    for name in config.stage:
        if name not in STAGES:
            raise UserError(unknown_name("stage", name, STAGES))
    if not config.stages:
        raise UserError(f"stages is empty: name one or both of {', '.join(STAGES)}")
    for name in config.stages:
        if name not in STAGES:
            raise UserError(unknown_name("stages", name, STAGES))
        if name not in config.stage:
            raise UserError(f"stages names {name}, but stage.{name} is not set: choose a stage group that has it")
    if [name for name in STAGES if name in config.stages] != config.stages:
        raise UserError(f"stages={config.stages} must be in order and without repeats: {', '.join(STAGES)}")
    for name in config.stages:
        _check_stage(config, name, config.stage[name])
        if config.task == "train" and getattr(config.data, name).annotations is None:
            raise UserError(f"data.{name}.annotations is not set, and stage {name} needs it: {config.data.how_to_get}")


def check_feature_cache(config: Config, name: str) -> None:
    """Raise UserError where what stage 1 leaves of an image changes while stage `name` trains."""
    stage, vision = config.stage[name], config.pruner.vision
    key, off = "trainer.feature_cache=true", "set trainer.feature_cache=false"
    if stage.train_vision:
        raise UserError(f"{key}: stage.{name}.train_vision=true changes the features that would be kept; {off}")
    for where, score in stage_one_scores(vision):
        if score == "random":
            raise UserError(f"{key}: {where}=random must draw anew each time; {off}")
        if score in TEXT_SCORES:
            raise UserError(f"{key}: {where}={score} cuts an image anew for each question; {off}")
    schedule = config.pruner.schedule
    if vision.enabled and schedule.name != "constant" and "vision" in schedule.applies_to:
        raise UserError(
            f"{key}: pruner.schedule.name={schedule.name} moves what stage 1 leaves of an image from step to step; "
            f"{off}, or pruner.schedule.applies_to=[language]"
        )
    if projects(vision) and stage.train_projector:
        raise UserError(
            f"{key}: pruner.vision.space=projected selects by what the projector, which stage.{name} trains, makes of "
            f"the patches; {off}, or pruner.vision.space=features"
        )


def _check_stage(config: Config, name: str, stage: StageConfig) -> None:
    key = f"stage.{name}"
    one_of(f"{key}.template", stage.template, ("plain", "v1", "chat", "auto"))
    one_of(f"{key}.checkpointed_layers", stage.checkpointed_layers, ("all", "before", "after"))
    one_of(f"{key}.image_aspect_ratio", stage.image_aspect_ratio, ("square", "pad"))
    if not (stage.train_projector or stage.train_llm or stage.train_vision):
        raise UserError(f"{key} trains nothing: set one of train_projector, train_llm, train_vision to true")
    for rate in ("lr", "projector_lr", "vision_lr"):
        value = getattr(stage, rate)
        if value is not None and value <= 0:
            raise UserError(f"{key}.{rate}={value} must be more than 0; to freeze a part set its train_ key to false")
    for count in ("batch_size", "global_batch_size", "token_budget", "epochs", "max_steps"):
        if getattr(stage, count) is not None:
            at_least(f"{key}.{count}", getattr(stage, count), 1)
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


def _check_peft(config: Config) -> None:
    peft, stages = config.peft, config.stage
    one_of("peft.name", peft.name, ("none", "lora", "dora", "qlora"))
    at_least("peft.r", peft.r, 1)
    at_least("peft.alpha", peft.alpha, 1)
    if not 0 <= peft.dropout < 1:
        raise UserError(f"peft.dropout={peft.dropout} is a probability: from 0 to less than 1")
    if peft.name == "none":
        return
    users = [name for name, stage in stages.items() if stage.use_peft]
    if not users:
        raise UserError(f"peft={peft.name}, but no stage uses it: set stage.instruct.use_peft=true")
    for name in users:
        if not stages[name].train_llm:
            raise UserError(f"stage.{name} puts adapters on a frozen LLM: set stage.{name}.train_llm=true")
        strategy = stages[name].strategy or config.strategy.name
        if peft.name == "qlora" and strategy in UNQUANTIZED:
            raise UserError(
                f"peft=qlora: strategy={strategy} of stage.{name} spreads the frozen weights over the devices, which "
                "4-bit weights do not survive; use strategy=deepspeed_zero2 (or ddp, single), or peft=lora"
            )


def check_optim(optim: OptimConfig) -> None:
    one_of("optim.name", optim.name, ("adamw",))
    one_of("optim.schedule", optim.schedule, ("cosine", "linear", "constant"))
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        raise UserError(f"optim.betas={optim.betas} must be two numbers from 0 to less than 1, [0.9,0.999]")
    if optim.eps <= 0:
        raise UserError(f"optim.eps={optim.eps} must be more than 0")
    if optim.weight_decay < 0:
        raise UserError(f"optim.weight_decay={optim.weight_decay} must not be negative")
    if not 0 <= optim.warmup_ratio < 1:
        raise UserError(f"optim.warmup_ratio={optim.warmup_ratio} is a share of the steps: from 0 to less than 1")
    if optim.grad_clip is not None and optim.grad_clip <= 0:
        raise UserError(f"optim.grad_clip={optim.grad_clip} must be more than 0; null turns clipping off")


def _check_run(config: Config) -> None:
    trainer, evaluate = config.trainer, config.evaluate
    one_of("trainer.accelerator", trainer.accelerator, ("auto", "cpu", "cuda"))
    one_of("trainer.precision", trainer.precision, ("auto", "bf16", "fp32"))
    one_of("trainer.attention", trainer.attention, ATTENTION)
    for count in ("devices", "num_nodes", "log_every", "keep_checkpoints", "vision_chunk", "logits_chunk"):
        at_least(f"trainer.{count}", getattr(trainer, count), 1)
    if trainer.checkpoint_every_steps is not None:
        at_least("trainer.checkpoint_every_steps", trainer.checkpoint_every_steps, 1)
    if trainer.save_every_minutes is not None and trainer.save_every_minutes <= 0:
        raise UserError(
            f"trainer.save_every_minutes={trainer.save_every_minutes} must be more than 0; null saves by "
            "trainer.checkpoint_every_steps alone"
        )
    at_least("trainer.num_workers", trainer.num_workers, 0)
    one_of("init_adapters", config.init_adapters, ("auto", "continue", "merge"))
    one_of("data.source", config.data.source, ("easy_vqa", None))
    for split in (*STAGES, "evaluate"):
        if (limit := getattr(config.data, split).limit) is not None:
            at_least(f"data.{split}.limit", limit, 1)
    if evaluate.limit is not None:
        at_least("evaluate.limit", evaluate.limit, 1)
    one_of("evaluate.turns", evaluate.turns, ("all", "first"))
    at_least("evaluate.batch_size", evaluate.batch_size, 1)
    at_least("evaluate.max_new_tokens", evaluate.max_new_tokens, 1)
    at_least("generate.max_new_tokens", config.generate.max_new_tokens, 1)
    _check_bench(config)
    _check_calibrate(config)
    _check_plan(config.plan)
    check_sweep(config.sweep)
    _check_report(config.report)
    if config.logger.wandb is not None:
        one_of("logger.wandb.mode", config.logger.wandb.mode, ("auto", "online", "offline"))
    names = {"experiment_name": config.experiment_name, "run_id": config.run_id, "evaluate.name": evaluate.name}
    for key, name in names.items():
        if name is not None:
            file_name(key, name, "; runs_dir= says where runs go")
    for key, part in (
        ("encoder", config.encoder),
        ("llm", config.llm),
        ("data", config.data),
        ("pruner", config.pruner),
    ):
        file_name(f"{key}.name", part.name)


def _check_bench(config: Config) -> None:
    settings = config.bench
    at_least("bench.images", settings.images, 1)
    at_least("bench.repeats", settings.repeats, 1)
    at_least("bench.new_tokens", settings.new_tokens, 2)
    if settings.batch_size is not None:
        at_least("bench.batch_size", settings.batch_size, 1)
    for name in settings.measure:
        one_of("bench.measure", name, BENCHED)
    if not settings.measure:
        raise UserError(f"bench.measure is empty: name some of {', '.join(BENCHED)}")
    if not settings.pruners:
        raise UserError("bench.pruners is empty: name what to measure, e.g. bench.pruners=[none,twostage]")
    if settings.stage is not None:
        one_of("bench.stage", settings.stage, tuple(config.stage))


def _check_calibrate(config: Config) -> None:
    settings = config.calibrate
    at_least("calibrate.images", settings.images, 1)
    one_of("calibrate.split", settings.split, STAGES)
    one_of("calibrate.measure", settings.measure, ("vision", "layer_mean"))
    for name in settings.budgets:
        one_of("calibrate.budgets", name, KNEE_METHODS)
    if settings.target is not None and not 0 < settings.target <= 1:
        raise UserError(
            f"calibrate.target={settings.target} is a share of the tokens: more than 0, at most 1; null reports only"
        )
    vision = config.pruner.vision
    if config.task == "calibrate" and (reads_text(vision) or (vision.enabled and vision.recover.enabled)):
        raise UserError(
            f"task=calibrate measures one curve an image, and pruner={config.pruner.name} reads questions or keeps "
            "patches in two passes; choose a pruner that does neither"
        )
    for key, name in (("knee.method", vision.knee.method), ("selection", vision.selection), ("merge", vision.merge)):
        if config.task == "calibrate" and vision.enabled and (":" in name or name == "centres"):
            raise UserError(
                f"pruner.vision.{key}={name}: task=calibrate does not know what it keeps for which parameter; choose "
                "another, and see what yours keeps in the keep_ratio of task=evaluate"
            )
    if config.task == "calibrate" and settings.split not in config.stage:
        raise UserError(
            f"calibrate.split={settings.split}, but stage.{settings.split} is not set: it says how images and samples "
            "are prepared; choose the other split, or a stage group that has it"
        )


def _check_plan(plan: PlanConfig) -> None:
    if plan.device is not None:
        one_of("plan.device", plan.device, DEVICES)
    if not 0 < plan.mfu <= 1:
        raise UserError(f"plan.mfu={plan.mfu} is a share of the device's peak: more than 0, at most 1")
    if plan.keep is not None and not 0 < plan.keep <= 1:
        raise UserError(f"plan.keep={plan.keep} is a share of the visual tokens: more than 0, at most 1")
    at_least("plan.samples", plan.samples, 1)


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


def _model_type(key: str, arch: dict[str, Any]) -> None:
    if not arch.get("model_type"):
        raise UserError(f"{key}.arch.model_type is not set: name a transformers model, e.g. llama; see conf/{key}/")


def _wheel(key: str, wheel: WheelConfig | None) -> None:
    for part in ("package", "version", "file", "sha256"):
        if wheel is not None and not getattr(wheel, part):
            raise UserError(f"{key}.{part} is not set: a wheel needs package, version, file and sha256")
    if wheel is not None:
        file_name(f"{key}.package", wheel.package)
        file_name(f"{key}.version", wheel.version)
        if not re.fullmatch("[0-9a-fA-F]{64}", wheel.sha256):
            raise UserError(f"{key}.sha256={wheel.sha256} is no SHA-256: 64 hexadecimal digits")
