"""`task=calibrate`: what each budget keeps of a sample, the parameter that meets a target, and a preset that has it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmprune_train.components.registry import declared, find
from mmprune_train.config.command import Command
from mmprune_train.config.compose import to_yaml
from mmprune_train.config.identity import run_dir
from mmprune_train.config.pruner_schema import PrunerConfig
from mmprune_train.config.pruner_vision import has_weights
from mmprune_train.config.schema import Config
from mmprune_train.config.task_schema import CalibrateConfig
from mmprune_train.config.typed import group_of
from mmprune_train.data.images import ImageReader
from mmprune_train.data.records import Record, read_annotations
from mmprune_train.data.sources import split_files
from mmprune_train.data.templates import get_template
from mmprune_train.errors import UserError
from mmprune_train.evaluation.budgets import BudgetRow, Report, budgets_asked, report_budgets
from mmprune_train.evaluation.calibration import (
    EncodedImages,
    Encoder,
    SamplePasses,
    draw_records,
    encode_images,
    pack,
    with_knee,
)
from mmprune_train.evaluation.calibration_text import WHAT, outcome, sentence, share, summary, text
from mmprune_train.model.begin import begin, tower_of
from mmprune_train.model.llava import PackedLlava
from mmprune_train.model.vision import encode
from mmprune_train.model.weights.start import first_start
from mmprune_train.pruning import Pruner
from mmprune_train.pruning.calibration import ScoredImages, searched
from mmprune_train.quiet import quiet
from mmprune_train.reporting.budget_figure import draw_budgets
from mmprune_train.storage.files import write_json, write_yaml
from mmprune_train.tasks import unread
from mmprune_train.tasks.checkpoint import Checkpoint, Results, find_checkpoint, load
from mmprune_train.tasks.prepare import prepare_data
from mmprune_train.training.inputs import stage_reader, template_of
from mmprune_train.training.network import MATCHED_IMAGES, fit_projector
from mmprune_train.training.precision import choose_accelerator, choose_precision
from mmprune_train.training.starts import start_of

PRESET = "calibrated"
"""Name of the pruner preset that is written, for the run's own budget."""
LEFT_OUT = {"task", "calibrate", "ckpt", "pruner", "knee"}
"""Keys of the command that the next one does not repeat: the preset holds what they said."""


def run(config: Config, command: Command = Command()) -> dict[str, Any]:
    """Write `calibrate/result.json`, `budgets.png` and `conf/pruner/calibrated.yaml` below the run directory.

    Without `ckpt=` what a training run would start from is measured: `init_from`, else the base weights.

    Raises:
        UserError: the run's own budget cannot meet the target; the report is written nevertheless.
    """
    asked = config.calibrate
    found = find_checkpoint(config, command) if config.ckpt else None
    chosen, pruner = (found.config, found.pruner) if found else (config, config.pruner)
    folder = (found.home if found else run_dir(config)) / "calibrate"
    if pruner is not None:
        check_subject(pruner, asked)
    prepare_data(chosen, asked.split)
    subject = load_subject(chosen, pruner, found)
    check_subject(subject.pruner, asked)
    report, images = measure(chosen, subject)
    with (results := Results(folder)).writing() as folder:
        written = write_presets(folder / "conf", report, chosen, command)
        result = {**summary(report), "seed": config.seed, "ckpt": config.ckpt}
        result["presets"] = sorted(written)
        if PRESET in written:
            result["next"] = next_command(config, command, folder / "conf")
        write_json(folder / "result.json", result)
        draw(report, images, folder / "budgets.png")
    print(f"\n{text(report)}\n\n{results.place}", flush=True)
    own = report.own
    if own.solution is not None and own.solved is None:
        low, high = own.solution.reachable
        raise UserError(
            f"calibrate.target={asked.target}: {own.name} keeps {share(low)} to {share(high)} of this sample, whatever "
            f"its {own.solution.parameter.name} ({own.solution.problem}); choose another target, or another knee="
        )
    if PRESET in written:
        print(f"\n{sentence(report)}\nNext: {result['next']}", flush=True)
    return result


def check_subject(pruner: PrunerConfig, asked: CalibrateConfig) -> None:
    """Raise UserError where a pruner has nothing that could be calibrated this way."""
    vision, language = pruner.vision, pruner.language
    if not (vision.enabled or language.enabled):
        raise UserError(
            f"task=calibrate: pruner={pruner.name} keeps everything; choose one that prunes: pruner=twostage"
        )
    if asked.measure == "vision" and not vision.enabled:
        raise UserError(
            f"calibrate.measure=vision: pruner={pruner.name} has no stage 1; set calibrate.measure=layer_mean, or "
            "pruner=twostage"
        )
    knee = (vision if vision.enabled else language).knee
    if asked.measure == "layer_mean" and asked.target is not None and searched(knee, 1) is None:
        able = [one.name for one in declared()["budget"].values() if one.calibrated]
        raise UserError(
            f"calibrate.measure=layer_mean: {knee.method} has no parameter to solve for; choose knee={able[0]} (or "
            f"{', '.join(able[1:])}), or set calibrate.target=null"
        )


@dataclass
class Subject:
    """What is calibrated."""

    pruner: PrunerConfig
    encoder: Encoder
    reader: ImageReader
    device: torch.device
    model: PackedLlava | None = None
    """None where stage 1, without weights of its own, is measured on base weights: the LLM need not be there."""
    processor: Any = None
    fits: bool = False
    """Whether training would fit its new projector first (`projector.init=matched`)."""


def load_subject(config: Config, pruner: PrunerConfig | None, found: Checkpoint | None) -> Subject:
    """The model, or its encoder alone where that is enough.

    Args:
        pruner: None: the checkpoint's own.
        found: the checkpoint; None: what the training of the split starts from, adapters of it merged.
    """
    asked = config.calibrate
    device = torch.device(choose_accelerator(config.trainer.accelerator))
    reader = stage_reader(config, asked.split)
    with quiet():
        if found is not None:
            model, processor, _ = load(found)
            reader = ImageReader(processor.image_processor, reader.folder)
            return Subject(model.pruner.settings, model.encode_images, reader, device, model, processor)
        start = start_of(config, None, asked.split)
        assert pruner is not None
        if asked.measure == "vision" and not has_weights(pruner.vision):
            torch.manual_seed(config.seed)  # random weights are to be those of a run
            tower = tower_of(config, start).to(device).eval()
            encoder = partial(
                encode,
                tower,
                feature_layer=config.encoder.feature_layer,
                drop_cls=config.encoder.has_cls,
                layers=Pruner(pruner).blocks,
            )
            return Subject(pruner, encoder, reader, device)
        model, processor = begin(config, start and replace(start, goes_on=False))
        model.to(device).eval()
    fits = config.projector.init == "matched" and (start is None or start.new_projector)
    return Subject(model.pruner.settings, model.encode_images, reader, device, model, processor, fits)


def measure(config: Config, subject: Subject) -> tuple[Report, EncodedImages]:
    """Draw the sample, encode its images once, and look at every budget."""
    asked, pruner = config.calibrate, subject.pruner
    records = read_annotations(*split_files(config.data, asked.split), config.data.part(asked.split).limit).records
    drawn = draw_records(records, asked.images, config.seed)
    paths = {path: record.told for record in drawn for path in record.images}
    if not paths:
        raise UserError(f"data.{asked.split}.annotations: no sample has an image; choose another calibrate.split")
    dtype = choose_precision(config.trainer.precision, subject.device.type).dtype
    passing = asked.measure == "layer_mean"
    budgets = [find("budget", name, "knee.method") for name in [*budgets_asked(asked), pruner.vision.knee.method]]
    ranks = pruner.vision.enabled and any("feature_rank" in one.reads for one in budgets)
    images = encode_images(
        subject.encoder,
        Pruner(pruner),
        paths,
        subject.reader,
        config.trainer.vision_chunk,
        subject.device,
        dtype,
        ranks,
        passing,
    )
    scored = None if images.scores is None else ScoredImages(pruner.vision, images.scores, images.feature_rank)
    passes = sample_passes(config, subject, drawn, images, dtype) if passing else None
    return report_budgets(asked, pruner, scored, passes, len(paths), len(drawn), images.patches), images


def sample_passes(
    config: Config, subject: Subject, records: list[Record], images: EncodedImages, dtype: torch.dtype
) -> SamplePasses:
    """Passes over the drawn samples, packed as their stage trains them."""
    model, tokenizer = subject.model, subject.processor.tokenizer
    assert model is not None
    split = config.calibrate.split
    stage = config.stage[split]
    template = get_template(template_of(config, split), tokenizer)
    packed = pack(records, template, tokenizer, model.config.image_seq_length, stage.max_length, stage.batch_size)
    passes = SamplePasses(model.eval(), packed, images, dtype, config.seed)
    if subject.fits:
        fit_projector(model, passes.kept_features(MATCHED_IMAGES))
    return passes


def write_presets(folder: Path, report: Report, config: Config, command: Command) -> dict[str, Path]:
    """`pruner/calibrated.yaml` for the run's own budget and `pruner/calibrated_NAME.yaml` for every other one that was
    solved. By name."""
    written = {}
    for row in report.rows:
        if row.solved is not None:
            name = PRESET if row is report.own else f"{PRESET}_{row.name}"
            settings = with_knee(report.pruner, report.stage, row.solved)
            settings = replace(settings, name=f"{settings.name.removesuffix('-' + PRESET)}-{PRESET}")
            written[name] = folder / "pruner" / f"{name}.yaml"
            write_yaml(written[name], "".join(header(report, row, config, command)) + to_yaml(settings))
    return written


def header(report: Report, row: BudgetRow, config: Config, command: Command) -> list[str]:
    """Comment lines that say what a preset was computed from."""
    asked = report.asked
    found, reached = outcome(row.solution)
    typed = shlex.join(["python", "-m", "mmprune_train", *(command.overrides or ["task=calibrate"])])
    begun = first_start(config, asked.split)
    weights = f"encoder {config.encoder.name}, llm {config.llm.name}, {f'from {begun[1]}' if begun else 'not trained'}"
    weights = config.ckpt or weights
    score = getattr(report.pruner, report.stage).score
    return [
        f"# {typed}\n",
        f"# {report.images} images in {report.samples} samples of {asked.split}, seed {config.seed}; {weights}.\n",
        f"# pruner.{report.stage}: score {score}, {row.name}, {found}. {asked.measure} ({WHAT[asked.measure]}):\n",
        f"# target {asked.target}, reached {reached}. Every setting is pinned: knee=... moves nothing here,\n",
        "# pruner.vision.knee.* and pruner.language.knee.* do.\n",
    ]


def next_command(config: Config, command: Command, folder: Path) -> str:
    """The command that uses the preset: evaluates the checkpoint with it, or trains."""
    kept = [override for override in command.overrides if group_of(override) not in LEFT_OUT]
    task = ["task=evaluate", f"ckpt={config.ckpt}"] if config.ckpt else []
    idle = unread("evaluate" if task else "train", [*task, *kept])
    arguments = ["--config-dir", str(folder), *task, *(one for one in kept if one not in idle), f"pruner={PRESET}"]
    return shlex.join(["python", "-m", "mmprune_train", *arguments])


def draw(report: Report, images: EncodedImages, path: Path) -> None:
    """The figure."""
    shown = {
        row.name: (row.kept.numpy(), None if row.kept_at_target is None else row.kept_at_target.numpy())
        for row in report.rows
        if row.kept is not None
    }
    asked, own = report.asked, report.own.name
    aimed = asked.target * report.patches if asked.target and asked.measure == "vision" else None
    what = "tokens kept of an image" if report.stage == "vision" else "tokens of a sample after stage 2"
    score = getattr(report.pruner, report.stage).score
    title = f"{report.pruner.name}, {score}: {report.images} images of {asked.split}"
    scores = None if images.scores is None else images.scores.double().numpy()
    draw_budgets(shown, own, scores, aimed, what, title, path)
