"""What types cannot say: values out of range, unknown names, settings that contradict each other.

Every message names the key and the fix. Only the config is read; whether files exist is the tasks' business.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from mmprune_train.config.explain import unknown_name
from mmprune_train.config.schema import (
    STAGES,
    Config,
    EncoderConfig,
    KneeConfig,
    LanguageStageConfig,
    LlmConfig,
    OptimConfig,
    PeftConfig,
    PrunerConfig,
    RecoverConfig,
    ScheduleConfig,
    StageConfig,
    VisionStageConfig,
    WheelConfig,
)
from mmprune_train.errors import UserError

STRATEGIES = ("single", "ddp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3")
KNEE_METHODS = (
    "kneedle", "max_chord", "l_method", "menger", "second_difference", "otsu", "iqr", "lof",
    "cumulative_mass", "attention_entropy", "effective_rank", "fixed_ratio", "fixed_count",
)  # fmt: skip
SHARE_METHODS = ("cumulative_mass", "attention_entropy")
"""Budgets that share out the sum of the scores, which must not be negative."""
TEXT_SCORES = ("text_similarity", "text_similarity_bare", "text_dissimilarity")
"""Stage-1 scores that read the question."""
SIGNED_SCORES = ("cls_cosine", "pooled_cosine", *TEXT_SCORES, "text_cosine", "key_norm")
"""Scores that can be negative."""
VISION_SCORES = (
    *("cls_attention", "cls_attention_wide", "cls_cosine", "map_attention"),
    *("pooled_cosine", "feature_norm", *TEXT_SCORES, "uniform_grid", "random"),
)
SCORE_NEEDS = {
    "cls_attention": "a CLS token",
    "cls_attention_wide": "a CLS token",
    "cls_cosine": "a CLS token",
    "map_attention": "an attention pooling head",
    **dict.fromkeys(TEXT_SCORES, "a CLIP text tower"),
}
LANGUAGE_SCORES = ("text_attention", "text_cosine", "last_token_attention", "key_norm", "random")
RATED_SCORES = ("text_attention", "text_cosine")
"""Stage-2 scores in which question text votes."""
TURNS = ("first", "mean", "max")
DIVERSE_SELECTIONS = ("max_min", "dpp", "top_and_distinct")
"""Selections that look at the features."""
SELECTIONS = ("top", "max_min", "dpp", "top_and_uniform", "top_and_distinct")
MERGES = ("none", "nearest", "mean_token", "prumerge", "contextual", "centres")
WEIGHING_MERGES = ("prumerge", "centres")
"""Merges that weigh patches by their scores, which must not be negative."""
PRUNING_STAGES = ("vision", "language")
POSITIONS = ("contiguous", "original")


def check(config: Config) -> None:
    """Raise UserError at the first setting that cannot work."""
    check_encoder(config.encoder)
    check_llm(config.llm)
    _one_of("projector.name", config.projector.name, ("linear", "mlp2x_gelu"))
    _one_of("projector.init", config.projector.init, ("torch", "unit_variance", "matched"))
    check_knee("knee", config.knee)
    check_pruner(config.pruner)
    _check_pruner_fits(config)
    _check_stages(config)
    _check_peft(config.peft, config.stage)
    check_optim(config.optim)
    _check_run(config)


def check_encoder(encoder: EncoderConfig) -> None:
    arch = encoder.arch
    _model_type("encoder", arch)
    _wheel("encoder.wheel", encoder.wheel)
    _at_least("encoder.image_size", encoder.image_size, 1)
    _at_least("encoder.patch_size", encoder.patch_size, 1)
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
    _one_of("llm.template", llm.template, ("v1", "chat"))


def check_knee(key: str, knee: KneeConfig, least: int = 1) -> None:
    """`key` is the dotted name of this budget, for the messages; `least` the smallest `min_tokens` it may have."""
    _component(f"{key}.method", knee.method, KNEE_METHODS)
    _one_of(f"{key}.no_knee", knee.no_knee, ("keep_all", "max_chord"))
    if not 0 < knee.ratio <= 1:
        raise UserError(f"{key}.ratio={knee.ratio} is a share of the tokens: more than 0, at most 1")
    if knee.sensitivity < 0:
        raise UserError(f"{key}.sensitivity={knee.sensitivity} must not be negative; 1.0 is Kneedle's default")
    if not 0 < knee.mass <= 1:
        raise UserError(f"{key}.mass={knee.mass} is a share of the scores' sum: more than 0, at most 1")
    if not 0 <= knee.factor < math.inf:
        raise UserError(f"{key}.factor={knee.factor} must be finite and not negative; 1.5 is the usual one")
    if not 0 < knee.scale < math.inf:
        raise UserError(f"{key}.scale={knee.scale} must be finite and more than 0; 1.0 keeps the count as measured")
    _at_least(f"{key}.neighbors", knee.neighbors, 1)
    _at_least(f"{key}.count", knee.count, 1)
    _at_least(f"{key}.min_tokens", knee.min_tokens, least)
    if knee.max_tokens is not None and knee.max_tokens < knee.min_tokens:
        raise UserError(
            f"{key}.max_tokens={knee.max_tokens} is less than {key}.min_tokens={knee.min_tokens}: raise it, or set null"
        )


def check_pruner(pruner: PrunerConfig) -> None:
    _check_vision_stage(pruner.vision)
    _check_language_stage(pruner.language)
    _check_schedule(pruner.schedule, pruner)


def _check_language_stage(stage: LanguageStageConfig) -> None:
    key = "pruner.language"
    _component(f"{key}.score", stage.score, LANGUAGE_SCORES)
    _one_of(f"{key}.signal", stage.signal, ("next", "previous"))
    _one_of(f"{key}.turns", stage.turns, TURNS)
    _one_of(f"{key}.raters", stage.raters, ("all", "relevant"))
    _one_of(f"{key}.candidates", stage.candidates, ("visual_and_text", "visual"))
    _one_of(f"{key}.ranking", stage.ranking, ("per_kind", "joint"))
    _one_of(f"{key}.no_text", stage.no_text, ("keep_all", "last_token_attention"))
    _one_of(f"{key}.merge", stage.merge, ("none", "recycle"))
    _one_of(f"{key}.positions", stage.positions, POSITIONS)
    check_knee(f"{key}.knee", stage.knee)
    _check_shares(key, stage, "text_attention")
    if not 0 < stage.merge_share <= 1:
        raise UserError(f"{key}.merge_share={stage.merge_share} is a share of the dropped tokens: in (0, 1]")
    _at_least(f"{key}.merge_size", stage.merge_size, 1)
    layers = _listed(stage.layer)
    if not layers or not all(map(_is_layer, layers)):
        raise UserError(
            f"{key}.layer={stage.layer} must be a layer index (from 0), a share of the depth (between 0 and 1), or a "
            "list of them, [2,8] or [0.25,0.5]"
        )
    for kind in (int, float):
        same = [layer for layer in layers if isinstance(layer, kind)]
        if same != sorted(set(same)):
            raise UserError(f"{key}.layer={stage.layer} must rise: every layer sees a shorter sequence")
    if stage.enabled:
        _check_amounts(f"{key}.amounts", stage)
        if stage.raters == "relevant" and ":" not in stage.score and stage.score not in RATED_SCORES:
            raise UserError(
                f"{key}.raters=relevant: no question text votes in {key}.score={stage.score}; set {key}.raters=all, or "
                f"{key}.score={RATED_SCORES[0]}"
            )


def _check_amounts(key: str, stage: LanguageStageConfig) -> None:
    amounts, method = stage.amounts, stage.knee.method
    if amounts is None:
        return
    if method not in ("fixed_ratio", "fixed_count"):
        raise UserError(
            f"{key}={amounts} goes with a fixed budget, not with {method}: set pruner.language.knee.method=fixed_ratio "
            f"or fixed_count, or {key}=null"
        )
    if len(amounts) != len(_listed(stage.layer)):
        raise UserError(f"{key}={amounts} needs one entry for each of pruner.language.layer={stage.layer}")
    for amount in amounts:
        if method == "fixed_ratio" and not 0 < amount <= 1:
            raise UserError(f"{key}={amounts}: shares of the tokens are more than 0 and at most 1")
        if method == "fixed_count" and not (amount >= 1 and float(amount).is_integer()):
            raise UserError(f"{key}={amounts}: counts of tokens are whole numbers from 1")


def _listed(layer: Any) -> list[Any]:
    return list(layer) if isinstance(layer, list | tuple) else [layer]


def _is_layer(layer: Any) -> bool:
    if isinstance(layer, float):
        return 0 < layer < 1
    return isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0


def pruned_layers(stage: LanguageStageConfig, depth: int) -> dict[int, int]:
    """LLM layers that stage 2 prunes before, ascending, each with its place in `layer` and `amounts`.

    A share of the depth is rounded down, to a layer that has something to look at. Shares that meet in one layer of a
    shallow LLM prune once, as the last of them.

    Args:
        depth: layers of the LLM.
    Raises:
        UserError: a layer that the LLM has not, layers that do not rise, nothing before the first layer to look at.
    """
    listed = _listed(stage.layer)
    first = int(stage.signal == "previous")
    layers = [max(first, int(layer * depth + 1e-9)) if isinstance(layer, float) else layer for layer in listed]
    if layers != sorted(layers):
        raise UserError(f"pruner.language.layer={stage.layer} must rise, and in {depth} layers they are {layers}")
    if layers[-1] >= depth:
        raise UserError(
            f"pruner.language.layer={layers[-1]}: this LLM has {depth} layers, 0..{depth - 1}; shares of the "
            "depth (0.25) fit any"
        )
    if layers[0] < first:
        raise UserError(
            "pruner.language.signal=previous: no layer comes before pruner.language.layer=0; set it to 1 or more, or "
            "pruner.language.signal=next"
        )
    return {layer: place for place, layer in enumerate(layers)}


def projects(stage: VisionStageConfig) -> bool:
    """Whether stage 1 selects by what the projector makes of all patches; a selection of the user's may."""
    looks = stage.selection in DIVERSE_SELECTIONS or ":" in stage.selection
    return stage.enabled and stage.space == "projected" and looks


def _check_vision_stage(stage: VisionStageConfig) -> None:
    key = "pruner.vision"
    _component(f"{key}.score", stage.score, VISION_SCORES)
    _component(f"{key}.selection", stage.selection, SELECTIONS)
    _one_of(f"{key}.space", stage.space, ("features", "projected"))
    _component(f"{key}.merge", stage.merge, MERGES)
    _one_of(f"{key}.order", stage.order, ("raster", "rank"))
    _one_of(f"{key}.positions", stage.positions, POSITIONS)
    check_knee(f"{key}.knee", stage.knee)
    _check_shares(key, stage, "cls_attention")
    _at_least(f"{key}.merge_count", stage.merge_count, 1)
    if not 0 <= stage.share <= 1:
        raise UserError(f"{key}.share={stage.share} is the share of the budget that goes by score: from 0 to 1")
    _component(f"{key}.recover.score", stage.recover.score, VISION_SCORES)
    check_knee(f"{key}.recover.knee", stage.recover.knee, least=0)
    if not stage.enabled:
        return
    _check_shares(f"{key}.recover", stage.recover, "cls_attention")
    if stage.merge in WEIGHING_MERGES and stage.score in SIGNED_SCORES:
        raise UserError(
            f"{key}.merge={stage.merge} weighs patches by score, and {key}.score={stage.score} can be negative: "
            f"set {key}.score=cls_attention_wide, or another {key}.merge"
        )
    if stage.order == "rank" and stage.positions == "original":
        raise UserError(
            f"{key}.order=rank moves patches, so {key}.positions=original would give them each other's places: "
            f"set {key}.positions=contiguous, or {key}.order=raster"
        )


def reads_text(stage: VisionStageConfig) -> bool:
    """Whether stage 1 reads the question, so that an image is cut anew for each."""
    return any(score in TEXT_SCORES for _, score in stage_one_scores(stage))


def stage_one_scores(stage: VisionStageConfig) -> list[tuple[str, str]]:
    """(key, score) of each pass of stage 1 over the patches; empty where it is off."""
    passes = [("pruner.vision.score", stage.score)] if stage.enabled else []
    return passes + ([("pruner.vision.recover.score", stage.recover.score)] if passes and stage.recover.enabled else [])


def _check_shares(key: str, stage: VisionStageConfig | LanguageStageConfig | RecoverConfig, softmaxed: str) -> None:
    if stage.enabled and stage.knee.method in SHARE_METHODS and stage.score in SIGNED_SCORES:
        raise UserError(
            f"{key}.knee.method={stage.knee.method} needs scores >= 0, and {key}.score={stage.score} can be negative: "
            f"set {key}.score={softmaxed}, or another {key}.knee.method"
        )


def _check_schedule(schedule: ScheduleConfig, pruner: PrunerConfig) -> None:
    key = "pruner.schedule"
    _one_of(f"{key}.name", schedule.name, ("constant", "anneal", "random"))
    _one_of(f"{key}.shape", schedule.shape, ("cosine", "linear"))
    for name in schedule.applies_to:
        _one_of(f"{key}.applies_to", name, PRUNING_STAGES)
    if not 0 <= schedule.start < schedule.end <= 1:
        raise UserError(
            f"{key}.start={schedule.start} and {key}.end={schedule.end} are shares of the steps: 0 <= start < end <= 1"
        )
    if not 0 < schedule.low <= schedule.high <= 1:
        raise UserError(
            f"{key}.low={schedule.low} and {key}.high={schedule.high} are shares of the tokens: 0 < low <= high <= 1"
        )
    if schedule.name != "constant" and not any(getattr(pruner, name).enabled for name in schedule.applies_to):
        on = [name for name in PRUNING_STAGES if getattr(pruner, name).enabled]
        raise UserError(
            f"{key}.name={schedule.name} moves nothing: pruner={pruner.name} runs no stage that "
            f"{key}.applies_to=[{','.join(schedule.applies_to)}] names; set "
            + (f"{key}.applies_to=[{','.join(on)}]" if on else f"{key}.name=constant, or choose another pruner")
        )


def possible_scores(encoder: EncoderConfig) -> list[str]:
    """Stage-1 scores that an encoder can give. The pooling head is SigLIP's, unless it is built without."""
    arch = encoder.arch
    pools = arch.get("model_type") == "siglip_vision_model" and arch.get("vision_use_head", True)
    has = {
        "a CLS token": encoder.has_cls,
        "an attention pooling head": pools,
        "a CLIP text tower": encoder.text is not None,
    }
    return [score for score in VISION_SCORES if score not in SCORE_NEEDS or has[SCORE_NEEDS[score]]]


def _check_pruner_fits(config: Config) -> None:
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


def _check_memory(config: Config, name: str, stage: StageConfig) -> None:
    vision = config.pruner.vision
    key = f"trainer.remember_images={config.trainer.remember_images}"
    if stage.train_vision:
        raise UserError(f"{key}: stage.{name}.train_vision=true changes the features that would be remembered; set 0")
    for where, score in stage_one_scores(vision):
        if score == "random":
            raise UserError(f"{key}: {where}=random must draw anew each time; set trainer.remember_images=0")
        if score in TEXT_SCORES:
            raise UserError(
                f"{key}: {where}={score} cuts an image anew for each question; set trainer.remember_images=0"
            )
    schedule = config.pruner.schedule
    if vision.enabled and schedule.name != "constant" and "vision" in schedule.applies_to:
        raise UserError(
            f"{key}: pruner.schedule.name={schedule.name} moves what stage 1 leaves of an image from step to step; "
            "set trainer.remember_images=0, or pruner.schedule.applies_to=[language]"
        )
    if projects(vision) and stage.train_projector:
        raise UserError(
            f"{key}: pruner.vision.space=projected selects by what the projector, which stage.{name} trains, makes of "
            "the patches; set trainer.remember_images=0, or pruner.vision.space=features"
        )
    if (stage.strategy or config.strategy.name) == "deepspeed_zero3":
        raise UserError(
            f"{key}: under deepspeed_zero3 every rank must run the encoder at every step; set trainer.remember_images=0"
        )


def _check_stage(config: Config, name: str, stage: StageConfig) -> None:
    key = f"stage.{name}"
    _one_of(f"{key}.template", stage.template, ("plain", "v1", "chat", "auto"))
    _one_of(f"{key}.image_aspect_ratio", stage.image_aspect_ratio, ("square", "pad"))
    if not (stage.train_projector or stage.train_llm or stage.train_vision):
        raise UserError(f"{key} trains nothing: set one of train_projector, train_llm, train_vision to true")
    for rate in ("lr", "projector_lr", "vision_lr"):
        value = getattr(stage, rate)
        if value is not None and value <= 0:
            raise UserError(f"{key}.{rate}={value} must be more than 0; to freeze a part set its train_ key to false")
    for count in ("batch_size", "global_batch_size", "epochs", "max_steps"):
        if getattr(stage, count) is not None:
            _at_least(f"{key}.{count}", getattr(stage, count), 1)
    if config.trainer.remember_images:
        _check_memory(config, name, stage)
    processes = config.trainer.devices * config.trainer.num_nodes
    strategy = stage.strategy or config.strategy.name
    where = f"{key}.strategy" if stage.strategy else "strategy.name"
    _one_of(where, strategy, STRATEGIES)
    if strategy == "single" and processes > 1:
        raise UserError(f"{where}=single runs one process, but trainer asks for {processes}: add strategy=ddp")
    one_pass = stage.batch_size * processes
    if processes > 0 and stage.global_batch_size % one_pass:
        fits = max(1, round(stage.global_batch_size / one_pass)) * one_pass
        raise UserError(
            f"{key}.global_batch_size={stage.global_batch_size} is no multiple of {key}.batch_size={stage.batch_size} "
            f"x {processes} processes: set {key}.global_batch_size={fits}, or another {key}.batch_size"
        )
    tokens = (config.encoder.image_size // config.encoder.patch_size) ** 2
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


def _check_peft(peft: PeftConfig, stages: dict[str, StageConfig]) -> None:
    _one_of("peft.name", peft.name, ("none", "lora", "dora"))
    _at_least("peft.r", peft.r, 1)
    _at_least("peft.alpha", peft.alpha, 1)
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


def check_optim(optim: OptimConfig) -> None:
    _one_of("optim.name", optim.name, ("adamw",))
    _one_of("optim.schedule", optim.schedule, ("cosine", "linear", "constant"))
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
    _one_of("trainer.accelerator", trainer.accelerator, ("auto", "cpu", "cuda"))
    _one_of("trainer.precision", trainer.precision, ("auto", "bf16", "fp32"))
    _at_least("trainer.remember_images", config.trainer.remember_images, 0)
    for count in ("devices", "num_nodes", "log_every", "checkpoint_every_steps", "keep_checkpoints", "vision_chunk"):
        _at_least(f"trainer.{count}", getattr(trainer, count), 1)
    _at_least("trainer.num_workers", trainer.num_workers, 0)
    _one_of("data.source", config.data.source, ("easy_vqa", None))
    for split in (*STAGES, "evaluate"):
        if (limit := getattr(config.data, split).limit) is not None:
            _at_least(f"data.{split}.limit", limit, 1)
    if evaluate.limit is not None:
        _at_least("evaluate.limit", evaluate.limit, 1)
    _at_least("evaluate.batch_size", evaluate.batch_size, 1)
    _at_least("evaluate.max_new_tokens", evaluate.max_new_tokens, 1)
    _at_least("generate.max_new_tokens", config.generate.max_new_tokens, 1)
    _at_least("bench.images", config.bench.images, 1)
    _at_least("bench.repeats", config.bench.repeats, 1)
    if not config.bench.pruners:
        raise UserError("bench.pruners is empty: name what to measure, e.g. bench.pruners=[none,twostage]")
    _check_calibrate(config)
    if config.logger.wandb is not None:
        _one_of("logger.wandb.mode", config.logger.wandb.mode, ("auto", "online", "offline"))
    for key in ("experiment_name", "run_id"):
        name = getattr(config, key)
        if name is not None and (not name or name in (".", "..") or "/" in name or "\\" in name):
            raise UserError(f"{key}={name} names a folder: no slashes, not empty; runs_dir= says where it goes")


def _check_calibrate(config: Config) -> None:
    settings = config.calibrate
    _at_least("calibrate.images", settings.images, 1)
    _one_of("calibrate.split", settings.split, STAGES)
    _one_of("calibrate.measure", settings.measure, ("vision", "layer_mean"))
    for name in settings.budgets:
        _one_of("calibrate.budgets", name, KNEE_METHODS)
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
    if config.task == "calibrate" and settings.split not in config.stage:
        raise UserError(
            f"calibrate.split={settings.split}, but stage.{settings.split} is not set: it says how images and samples "
            "are prepared; choose the other split, or a stage group that has it"
        )


def _one_of(key: str, value: Any, known: Sequence[str | None]) -> None:
    if value not in known:
        raise UserError(unknown_name(key, value, [name or "null" for name in known]))


def _component(key: str, name: str, known: Sequence[str]) -> None:
    """One of the library's own, or a function of the user's; the latter is imported when the pruner is built."""
    if ":" not in name:
        _one_of(key, name, known)
    elif not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        raise UserError(f"{key}={name}: a function of your own is written module:function, e.g. my_pruner:my_score")


def _at_least(key: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"{key}={value} must be at least {least}")


def _model_type(key: str, arch: dict[str, Any]) -> None:
    if not arch.get("model_type"):
        raise UserError(f"{key}.arch.model_type is not set: name a transformers model, e.g. llama; see conf/{key}/")


def _wheel(key: str, wheel: WheelConfig | None) -> None:
    for part in ("package", "version", "file", "sha256"):
        if wheel is not None and not getattr(wheel, part):
            raise UserError(f"{key}.{part} is not set: a wheel needs package, version, file and sha256")
