"""Settings, a run and a sweep that an earlier commit has written (tests/config/recorded), put where they are wanted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mmprune_train.config.compose import compose_config
from mmprune_train.config.renamed import present_override
from mmprune_train.storage.files import read_json, write_json, write_yaml
from mmprune_train.storage.run_files import files_of_stage

RECORDED = Path(__file__).parent / "config" / "recorded"
PRUNERS: list[dict[str, Any]] = json.loads((RECORDED / "pruners.json").read_text())
"""Overrides, and the `run_id` and `pruner` section that they led to."""
NAMES = [" ".join(case["overrides"]) for case in PRUNERS]


ORDER, WHOLE = "pruner.vision.order=raster", "pruner.vision.question_ends=[]"
PATCHES_ALONE = "pruner.vision.score_args.with_cls=false"
OWN_TURN = "pruner.language.turns_in_generation=null"
FORMER_PRESETS = {
    "cdpruner": [WHOLE],
    "fastervlm": [PATCHES_ALONE],
    "fastv": [OWN_TURN],
    "pyramiddrop": [OWN_TURN],
    "recoverable": [
        ORDER, WHOLE, "pruner.vision.recover.counted=dropped", "pruner.vision.merge_args.share_of=kept",
        "pruner.vision.merge_args.keys_of=own",
    ],
    "sparsevlm": ["pruner.language.order=in_place", "pruner.language.merge_args.ranked=false"],
    "visionzip": [ORDER, PATCHES_ALONE, "pruner.vision.keep_cls=false", "pruner.vision.knee.count=54"],
    "vispruner": [PATCHES_ALONE],
}  # fmt: skip
"""Presets that say something else since, and what they said."""


def config_now(case: dict[str, Any]) -> Any:
    """What the overrides compose to today, under the keys of today and with the presets of then."""
    given = [present_override(one) or one for one in case["overrides"]]
    (name, *_) = [one.removeprefix("pruner=") for one in given if one.startswith("pruner=")] or [""]
    typed = {one.partition("=")[0] for one in given}
    former = [one for one in FORMER_PRESETS.get(name, []) if one.partition("=")[0] not in typed]
    return compose_config(["+experiment=smoke", *former, *given])


def text_of(name: str, data: Path, runs: Path) -> str:
    """A recorded file with the folders it speaks of."""
    return (RECORDED / name).read_text().replace("DATA", str(data)).replace("RUNS", str(runs))


def put_settings(run: Path, data: Path) -> None:
    """Give a run directory the config.yaml, and the models in it the settings, that the recorded run had."""
    text = text_of("run/config.yaml", data, run.parent.parent)
    write_yaml(run / "config.yaml", text)
    (pruner,) = (case["pruner"] for case in PRUNERS if case["overrides"] == ["pruner=sparsevlm"])
    pruner = {**pruner, "language": {**pruner["language"], "amounts": [12.0, 8.0, 4.0]}}
    manifest = read_json(run / "manifest.json") or {}
    for stage, state in manifest["stages"].items():
        if (run / stage / "model").is_dir():
            put_pruner(run / stage / "model", pruner)
        if state["state"] == "done":
            state["files"] = files_of_stage(run / stage)
    write_json(run / "manifest.json", manifest, checked=True)


def put_pruner(model: Path, pruner: dict[str, Any]) -> None:
    """Give a model folder recorded settings."""
    settings = json.loads((model / "config.json").read_text())
    settings["mmprune"]["pruner"] = pruner
    (model / "config.json").write_text(json.dumps(settings, indent=2))


def put_run(to: Path, data: Path) -> Path:
    """The recorded run directory, without models."""
    for file in (RECORDED / "run").rglob("*.*"):
        place = to / file.relative_to(RECORDED / "run")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text_of(str(file.relative_to(RECORDED)), data, to.parent.parent))
    return to


def put_sweep(to: Path) -> Path:
    return Path(shutil.copytree(RECORDED / "sweep", to))
