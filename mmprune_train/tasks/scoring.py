"""From questions to a result: a checkpoint is loaded once and asked under its pruner, or under several in turn."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmprune_train.config.compose import load_pruner, saved_pruner
from mmprune_train.config.pruner import components, refuse_foreign
from mmprune_train.config.pruner_fits import check_pruner_fits
from mmprune_train.config.pruner_schema import PrunerConfig
from mmprune_train.config.pruner_vision import has_weights, reads_tower
from mmprune_train.config.task_schema import EvaluateConfig
from mmprune_train.errors import UserError
from mmprune_train.evaluation.asking import Asker, costs, stamps
from mmprune_train.evaluation.bring import QUESTIONS, Brought, bring, prunes
from mmprune_train.evaluation.comparison import COSTS, Row, comparison
from mmprune_train.evaluation.generate import check_room
from mmprune_train.evaluation.questions import Question
from mmprune_train.evaluation.run import Measured, token_counts
from mmprune_train.model.build import saved_settings
from mmprune_train.reporting.comparison import comparison_text, latex, markdown
from mmprune_train.storage.atomic import write_atomically
from mmprune_train.storage.conf import options
from mmprune_train.storage.files import write_json
from mmprune_train.tasks.checkpoint import Checkpoint, Results, beside, load, prompt_template
from mmprune_train.training.rundir import versions
from mmprune_train.training.sources import component_hashes
from mmprune_train.workers import ALONE, Ranks

KEPT = "evaluate.answers"
"""Folder, in the run directory, of the answers of an evaluation that has not ended."""
DOWNSAMPLE = "downsample"
"""Preset that others are compared with at their own number of tokens."""


@dataclass(frozen=True)
class Questions:
    """What is asked: a run's own questions, or public benchmarks."""

    chosen: Sequence[Question]
    new_tokens: int
    """Most that an answer has."""
    measure: Callable[[Asker, bool], Measured]
    """Asks them all; also with the images blanked where that is wanted."""
    text: Callable[[Mapping[str, Any]], str]
    """The tables of one result."""


def score(found: Checkpoint, questions: Questions, results: Results, ranks: Ranks = ALONE) -> dict[str, Any]:
    """Ask a checkpoint, under each of `evaluate.pruners` where there are some; what was found goes to `results`: an
    earlier evaluation there is moved aside when the new answers are there, not before. All ranks answer, the first
    writes; the others return an empty result."""
    settings = found.config.evaluate
    pruners = chosen_pruners(found) if compares(settings) else {}
    ask = open_asker(found, ranks, list(pruners.values()))
    check_room("evaluate.max_new_tokens", questions.new_tokens, ask.model)
    if not pruners:
        own = ask.model.pruner.settings
        rows = [_row(ask, questions, own.name, own, blank=True, title=ask.title)]
    else:
        rows = ask_under(pruners, ask, questions, settings.budgets, settings.downsample)
    if ranks.rank:
        return {}
    compared = comparison(rows)
    if pruners:
        parts = {row.label: {"pruner": row.pruner, **row.measured.result} for row in rows}
        result = {"ckpt": str(found.model), "pruners": parts, "comparison": compared}
    else:
        result = {"pruner": rows[0].pruner, **rows[0].measured.result, "comparison": compared}
    with results.writing() as folder:
        for row in rows:
            row.measured.write(folder / row.label if pruners else folder)
            if pruners:
                write_json(folder / row.label / "result.json", parts[row.label], checked=True)
        write_atomically(folder / "table.md", markdown(compared))
        write_atomically(folder / "table.tex", latex(compared))
        write_json(folder / "result.json", result, checked=True)
    ask.forget()
    return result


def compares(settings: EvaluateConfig) -> bool:
    """Whether several pruners, or budgets, are asked for."""
    return bool(settings.pruners or settings.budgets)


def which_pruners(found: Checkpoint) -> str | None:
    """For a folder's name: `pruners` where several are compared, else the pruner that is not the checkpoint's own."""
    if compares(found.config.evaluate):
        return "pruners"
    return None if found.pruner is None else found.pruner.name


def text_of(result: Mapping[str, Any], questions: Questions) -> str:
    """What an evaluation ends with."""
    parts = [] if "pruners" in result else [questions.text(result)]
    return "\n\n".join([*parts, comparison_text(result["comparison"])])


def chosen_pruners(found: Checkpoint) -> dict[str, PrunerConfig]:
    """Settings by name of what `evaluate.pruners` lists; the checkpoint's own pruner has its own settings.

    Raises UserError for an unknown name, or a pruner that does not fit.
    """
    own, settings = _own_pruner(found), found.config.evaluate
    names = dict.fromkeys(settings.pruners or ([own.name] if own else []))
    if not names:
        raise UserError(f"evaluate.budgets: {found.model} does not say its pruner; give evaluate.pruners=[NAME,...]")
    try:
        pruners = {name: own if own and name == own.name else load_pruner(name) for name in names}
    except UserError as error:
        raise UserError(f"evaluate.pruners: {error}") from error
    for pruner in pruners.values() if found.trained is not None else ():
        check_pruner_fits(replace(found.config, pruner=pruner))
    return pruners


def _own_pruner(found: Checkpoint) -> PrunerConfig | None:
    """The pruner that the command asks for, else the one that the checkpoint was trained with, where it says so."""
    if found.pruner is not None:
        return found.pruner
    if found.trained is not None:
        file, own = found.home / "config.yaml", found.trained.pruner
    else:
        file = Path(found.model) / "config.json"
        saved = saved_settings("ckpt", file.parent).get("pruner") if file.is_file() else None
        if saved is None:
            return None
        own = saved_pruner(saved)
    if not found.config.trust_components:
        refuse_foreign(file, components(own), components(found.config.pruner))
    return own


def open_asker(found: Checkpoint, ranks: Ranks = ALONE, pruners: Sequence[PrunerConfig] = ()) -> Asker:
    """The checkpoint, loaded; with its text tower where one of the pruners reads questions, and with the weights of
    their score.

    Raises UserError for a pruner that scores by weights that it is not loaded with.
    """
    needy = [one for one in pruners if reads_tower(one.vision) or has_weights(one.vision)]
    needy.sort(key=lambda one: (reads_tower(one.vision), has_weights(one.vision)), reverse=True)
    model, processor, precision = load(replace(found, pruner=needy[0]) if needy else found)
    for pruner in pruners:
        try:
            model.pruned_by(pruner)
        except UserError as error:
            raise UserError(f"evaluate.pruners: {error}; or ask it alone: [{pruner.name}]") from error
    hashes = [component_hashes(pruner) for pruner in (model.pruner.settings, *pruners)]
    return Asker(
        model,
        processor,
        prompt_template(processor),
        precision.dtype,
        found.config.evaluate.batch_size,
        found.home / KEPT,
        {"weights": weights(found), "components": dict(ChainMap(*hashes)), "versions": versions()},
        found.config.seed,
        ranks,
    )


def weights(found: Checkpoint) -> list[list[Any]]:
    """Stamps of all that a checkpoint is loaded from: itself, and the parts that the command or its run names."""
    parts, text = beside(found), found.config.encoder.text
    return [stamps(place) for place in (found.model, parts.encoder, parts.llm, text and text.path) if place]


def ask_under(
    pruners: Mapping[str, PrunerConfig], ask: Asker, questions: Questions, budgets: Sequence[float], downsample: bool
) -> list[Row]:
    """A row for each pruner, at each budget where there are some, and beside those that prune one for the image
    averaged down to as many tokens.

    Args:
        downsample: add that one, where there is such a preset.
    """
    patches, rows = ask.model.config.image_seq_length, list[Row]()
    shown = [question for question in questions.chosen if question.images]
    sample = shown[:: max(1, -(-len(shown) // QUESTIONS))]

    def brought(pruner: PrunerConfig, target: float, key: str) -> Brought:
        if not sample:
            raise UserError(f"{key}: no question has an image, so there is nothing to prune")
        made = bring(pruner, target, lambda settings: ask.kept_share(sample, settings), patches, key)
        return ask.ranks.exchange(made)[0]

    todo = list[tuple[str, PrunerConfig, Brought | None]]()
    for name, pruner in pruners.items():
        if name == DOWNSAMPLE:
            continue
        if budgets and prunes(pruner):
            todo += [(f"{name}@{each:g}", pruner, brought(pruner, each, "evaluate.budgets")) for each in budgets]
        else:
            todo.append((name, pruner, None))
    for label, pruner, made in todo:
        rows.append(_row(ask, questions, label, pruner, made, blank=not rows))
    small = pruners.get(DOWNSAMPLE)
    if small is None and downsample and DOWNSAMPLE in options("pruner"):
        small = load_pruner(DOWNSAMPLE)
    if small is None or not sample:
        return rows
    beside: dict[str, Row] = {}

    def averaged(target: float) -> str:
        """Label of the row of so many tokens, which is asked where it was not before."""
        made = brought(small, target, f"{DOWNSAMPLE} at the same number of tokens")
        label = f"{DOWNSAMPLE}@{made.reached * patches:.0f}"
        if label not in beside:
            beside[label] = _row(ask, questions, label, small, made, blank=not rows)
        return label

    for number, row in enumerate(rows):
        if not row.dense:
            target = row.set_to["target"] if row.set_to else row.costs["visual_keep_ratio"]
            assert target is not None
            rows[number] = replace(row, beside=averaged(target))
    if DOWNSAMPLE in pruners:
        for budget in budgets:
            averaged(budget)
        if not beside:
            beside[DOWNSAMPLE] = _row(ask, questions, DOWNSAMPLE, small, blank=not rows)
    return [*rows, *beside.values()]


def _row(
    ask: Asker,
    questions: Questions,
    label: str,
    pruner: PrunerConfig,
    made: Brought | None = None,
    blank: bool = False,
    title: str | None = None,
) -> Row:
    """A pruner, or what was made of it for a budget, on all questions."""
    settings = pruner if made is None else made.pruner
    with ask.model.pruned_by(settings):
        measured = questions.measure(replace(ask, title=title or label), blank)
    seen = measured.predictions
    took: dict[str, float | None] = {**token_counts(seen), **costs(seen)}
    told = None if made is None else {"setting": made.setting, "target": made.target, "reached": made.reached}
    return Row(label, pruner.name, not prunes(settings), measured, {key: took[key] for key in COSTS}, told)
