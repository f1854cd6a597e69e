"""`task=evaluate`: answers to the evaluation questions, their scores, and what a blind guess would reach."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mmprune_train.config.compose import config_from_file
from mmprune_train.config.identity import run_dir
from mmprune_train.config.schema import Config
from mmprune_train.data.records import IMAGE_PLACEHOLDER, read_records
from mmprune_train.data.sources import split_files
from mmprune_train.data.templates import get_template
from mmprune_train.errors import UserError
from mmprune_train.evaluation.questions import read_questions
from mmprune_train.evaluation.run import evaluate
from mmprune_train.model.build import load_model
from mmprune_train.quiet import quiet
from mmprune_train.reporting.evaluation import result_table
from mmprune_train.tasks.prepare import prepare_data
from mmprune_train.training.files import write_json
from mmprune_train.training.precision import choose_accelerator, choose_precision
from mmprune_train.training.rundir import free_name


def run(config: Config) -> dict[str, Any]:
    """Evaluate `ckpt=` (a run directory, an exported or a llava-hf folder), by default this config's own run."""
    source = Path(config.ckpt) if config.ckpt else run_dir(config)
    if not config.ckpt and not (source / "manifest.json").is_file():
        raise UserError(f"ckpt= is not given and {source} has no run; give ckpt=FOLDER or train first")
    chosen, pruner = with_run_settings(config, source)
    name = f"evaluate-{chosen.pruner.name}" if pruner else "evaluate"
    folder = source / name if (source / "manifest.json").is_file() else run_dir(config) / name
    prepare_data(chosen, ["evaluate"])
    keep_earlier(folder)
    result = evaluate_folder(chosen, config.ckpt or source, folder, pruner)
    write_json(folder / "result.json", result)
    print(f"\n{result_table(result)}\n\n{folder}", flush=True)
    return result


def keep_earlier(folder: Path) -> None:
    """Move an earlier evaluation's folder aside; what a run was once found to answer is not lost."""
    if (folder / "predictions.jsonl").is_file():
        aside = free_name(folder)
        folder.rename(aside)
        print(f"moved the earlier evaluation to {aside}", flush=True)


def with_run_settings(config: Config, source: Path) -> tuple[Config, Any]:
    """Settings a trained run is evaluated with, and the pruner to use instead of its own (None: its own).

    What the command line does not name is taken from the run directory's config. A folder that is no run directory is
    evaluated with this config's data, and its own pruner unless one is named.
    """
    named = named_groups()
    pruner = config.pruner if named & {"pruner", "knee"} else None
    if not (source / "config.yaml").is_file():
        return config, pruner
    trained = config_from_file(source / "config.yaml")
    groups = ("data", "encoder", "llm", "stage")
    kept = {group: getattr(trained, group) for group in groups if not named & {group, "experiment"}}
    if pruner == trained.pruner:
        pruner = None
    return replace(config, **kept), pruner


def named_groups() -> set[str]:
    """First parts of the keys that the command line gives, e.g. {"pruner", "evaluate"}; empty outside of it."""
    return {group_of(override) for override in command_line()}


def command_line() -> list[str]:
    """The overrides as they were typed; empty outside of the command line."""
    from hydra.core.hydra_config import HydraConfig

    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def group_of(override: str) -> str:
    """First part of an override's key: `pruner` of `+pruner.vision.score=random`."""
    return override.split("=", 1)[0].lstrip("+~").split(".", 1)[0].split("@", 1)[0]


def evaluate_folder(config: Config, source: str | Path, folder: Path, pruner: Any = None) -> dict[str, Any]:
    """Load a model and evaluate it; predictions.jsonl goes to `folder`.

    Args:
        config: data, and settings of `evaluate` and `trainer`.
        source: what `load_model` takes.
        pruner: instead of the one the folder was trained with.
    """
    accelerator = choose_accelerator(config.trainer.accelerator)
    precision = choose_precision(config.trainer.precision, accelerator)
    questions = read_questions(*split_files(config.data, "evaluate"), config.data.evaluate.limit)
    with quiet():
        model, processor = load_model(source, pruner=pruner, device=accelerator, text=config.encoder.text, key="ckpt")
    model.vision_chunk, model.attention = config.trainer.vision_chunk, config.trainer.attention
    result = evaluate(
        model,
        processor,
        prompt_template(model, processor, config),
        questions,
        training_answers(config),
        config.evaluate,
        folder,
        precision.dtype,
    )
    return {"pruner": model.pruner.settings.name, **result}


def prompt_template(model: Any, processor: Any, config: Config) -> Any:
    """The template the model was trained with; `plain` asks nothing, so the LLM's own is used then."""
    name = config.llm.template if model.template == "plain" else model.template
    return get_template(name, processor.tokenizer)


def training_answers(config: Config) -> list[tuple[str, str]]:
    """(question, answer) of the instruction data, all of it; empty where there is none."""
    file = config.data.blind or config.data.instruct.annotations
    if not file:
        return []
    data = replace(config.data, instruct=replace(config.data.instruct, annotations=file))
    try:
        annotations, images = split_files(data, "instruct")
    except UserError:
        return []
    turns = [turn for record in read_records(annotations, images) for turn in record.turns]
    return [(turn.question.replace(IMAGE_PLACEHOLDER, "").strip(), turn.answer) for turn in turns]
