"""What each stage of a run starts from, as its manifest records it: a run goes on only from what it began with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmprune_train.config.pruner_vision import has_weights, reads_tower
from mmprune_train.config.schema import Config
from mmprune_train.errors import UserError
from mmprune_train.model.question import FOLDER
from mmprune_train.model.scorer import has_scorer
from mmprune_train.model.weights.folders import ADAPTERS, LLAVA
from mmprune_train.model.weights.start import Start, asked_start, find_start, first_start, locate
from mmprune_train.storage.run_files import check_saved
from mmprune_train.training.base_weights import Entry, unchanged
from mmprune_train.training.rundir import RunDirectory

BASE_WEIGHTS = "the base weights"


def start_of(config: Config, directory: RunDirectory | None, stage: str, download: bool = True) -> Start | None:
    """What stage `stage` starts from; None: the base weights.

    Its own `init_from` comes first, then the nearest stage before it that the run has finished, then the run's
    `init_from`.

    Args:
        directory: None: of a run that has trained nothing.
        download: fetch a hub id that is not here.
    """
    asked = asked_start(config, stage)
    if asked is None and directory is not None:
        order = list(config.stage)
        for name in reversed(order[: order.index(stage)]):
            if (directory.model(name) / "config.json").is_file():
                return Start(LLAVA, directory.model(name), f"stage {name}", own=True)
    asked = asked or first_start(config, stage)
    return find_start(config, *asked, stage, download) if asked else None


def begins_anew(config: Config, todo: Sequence[str], stage: str) -> bool:
    """Whether a stage starts from something that is there before any stage of `todo` is trained."""
    return stage == todo[0] or asked_start(config, stage) is not None


def check_scorer(config: Config, stage: str, start: Start | None) -> None:
    """Raise UserError where the score's weights are new, and neither this stage nor a later one trains them."""
    if not has_weights(config.pruner.vision) or (start and start.whole and has_scorer(start.whole.path)):
        return
    order = list(config.stage)
    if not any(config.stage[name].train_scorer for name in order[order.index(stage) :]):
        raise UserError(
            f"stage.{stage}.train_scorer=false: pruner.vision.score={config.pruner.vision.score} begins with random "
            f"weights, which no stage trains: set it to true, or init_from to a model that was trained with this score"
        )


def parts_of(config: Config, start: Start | None) -> set[str]:
    """Which of the base weights, `encoder`, `llm` and `text`, a start needs."""
    parts = {"encoder", "llm"} if start is None else set(start.needs)
    beside = start is not None and (start.path / FOLDER).is_dir()
    if reads_tower(config.pruner.vision) and config.encoder.text is not None and not beside:
        parts.add("text")
    return parts


def note_start(directory: RunDirectory, name: str, start: Start | None) -> None:
    """Record what a stage starts from; UserError on all processes where its checkpoints are of other weights."""
    known = directory.stage_state(name).get("start") if directory.checkpoints(name) else None
    if known is not None and (start is None) != ("sha256" not in known):
        raise UserError(
            f"stages={name}: its checkpoints began with {known['source']}, and it would now start from "
            f"{start.path if start else BASE_WEIGHTS}: ask for the stages= as before, or start a new run with run_id="
        )
    if known is not None and start is not None and known.get("adapters") != _how(start):
        raise UserError(
            f"init_adapters: stage {name} began with its adapters {_told(known.get('adapters'))}, they would now be "
            f"{_told(_how(start))}; give the settings as before, or start a new run with run_id="
        )
    if start is not None and start.own and directory.writable:
        check_saved(start.key, start.path)
    if directory.writable or known is not None:
        directory.update_stage(name, start=entry_of(name, start, known))


def entry_of(stage: str, start: Start | None, known: Mapping[str, Any] | None) -> Entry:
    """What the manifest says of a start: kind, name, SHA-256 of the weights, and the same of an adapter's base.

    Args:
        known: the same of an earlier start. Raises UserError where the weights are not those.
    """
    if start is None:
        return {"source": BASE_WEIGHTS}
    part = f"stage {stage}" if start.own else f"{start.key} of stage {stage}"
    files = [start.path] if start.path.is_file() else None
    entry = {"kind": start.kind, **unchanged(part, start.path, known, files=files)}
    if not start.own:
        entry["key"] = start.key
    if start.kind == ADAPTERS:
        entry["adapters"] = _how(start)
        if start.base is not None:
            entry["base"] = entry_of(stage, start.base, (known or {}).get("base"))
    return entry


def _how(start: Start) -> str | None:
    return None if start.kind != ADAPTERS else "continue" if start.goes_on else "merge"


def _told(how: str | None) -> str:
    return {"continue": "trained further", "merge": "merged"}.get(how or "", "absent")


def as_begun(config: Config, written: Config, directory: RunDirectory) -> Config:
    """`config` with the paths that the run was begun with, where what lies at its own has the same content: weights
    that have moved are the same weights.

    Raises UserError where the content is another.
    """
    for name in config.stages:
        known = directory.stage_state(name).get("start") or {}
        asked, before = first_start(config, name), first_start(written, name)
        if asked is None or before is None or not asked[0] == before[0] == known.get("key"):
            continue
        if not Path(asked[1]).expanduser().exists():
            continue  # a finished run needs it no more, and one that goes on will say so
        entry_of(name, locate(*asked), known)
        if asked[0] == "init_from":
            config = replace(config, init_from=before[1])
        else:
            stage = replace(config.stage[name], init_from=before[1])
            config = replace(config, stage={**config.stage, name: stage})
    return config
