"""Run directories and sweeps as runs leave them, written without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmprune_train.reporting.sweeps import JobRecord, relative


def write_run(folder: Path, accuracy: float | None = 0.9, keep: float = 0.1, steps: int = 20, **settings: Any) -> Path:
    """A finished run; without an accuracy, one that stopped in its second stage."""
    folder.mkdir(parents=True)
    tree = {"seed": 42, "knee": {"method": "kneedle"}, "pruner": {"name": "twostage", "language": {"layer": 2}}}
    (folder / "config.yaml").write_text(json.dumps(merged(tree, settings)))  # JSON is YAML
    done = {"state": "done", "steps": steps, "train_minutes": 1.5, "step_seconds": 0.5, "keep_ratio": keep, "loss": 0.4}
    second = done if accuracy is not None else {"state": "running", "steps": steps}
    manifest = {"created": "2026-01-01T00:00:00", "seed": 42, "experiment": folder.parent.name}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "stages": {"pretrain": done, "instruct": second}}))
    for stage, lines in (("pretrain", steps), ("instruct", steps if accuracy is not None else steps // 2)):
        (folder / stage).mkdir()
        rows = [json.dumps(row(step, keep)) for step in range(1, lines + 1)]
        (folder / stage / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    if accuracy is not None:
        kinds = {"accuracy": {"open": accuracy, "yes_no": 0.5}, "blind_majority": {"open": 0.2, "yes_no": 0.8}}
        evaluate = {"pruner": "twostage", "questions": 40, "keep_ratio": keep, "tokens_dense": 294.0, **kinds}
        result = {"run": str(folder), "stages": {"pretrain": done, "instruct": done}, "evaluate": evaluate}
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def row(step: int, keep: float) -> dict[str, float]:
    return {
        "step": step, "loss": 3 / (step + 1) + 0.2 * keep, "samples": 8, "tokens_dense": 2352, "tokens_stage1": 480,
        "tokens_stage2": 220, "tokens_layer_mean": 2352 * keep, "keep_ratio": keep, "step_seconds": 0.5 + 0.01 * step,
        "data_seconds": 0.02, "mfu": 0.2,
    }  # fmt: skip


def merged(tree: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """`tree` with the entries of `more`, whose keys are dotted with two underscores."""
    for key, value in more.items():
        *parents, last = key.split("__")
        node = tree
        for parent in parents:
            node = node[parent]
        node[last] = value
    return tree


def write_sweep(root: Path, **more: Any) -> Path:
    """Three knees at two layers; one job failed, one run is cut short."""
    sweep = root / "sweeps" / "smoke-1"
    (sweep / "jobs").mkdir(parents=True)
    (sweep / "sweep.json").write_text(json.dumps({"overrides": ["+experiment=smoke"], "first_job": 0}))
    for number, (knee, layer) in enumerate((k, x) for k in ("kneedle", "otsu", "max_chord") for x in (2, 10)):
        overrides = [f"pruner.language.layer={layer}", f"knee={knee}", "+experiment=smoke"]
        record = JobRecord(number, overrides, started="2026-01-01T00:00:00", seconds=90.0)
        if number == 5:
            record.state, record.mistake, record.error = "failed", True, "pruner.language.layer=10: <too deep>"
        else:
            accuracy = None if number == 3 else 0.99 - 0.4 / (number + 1)
            settings = {"knee__method": knee, "pruner__language__layer": layer}
            run = write_run(root / "smoke" / f"run{number}", accuracy, 0.1 + 0.1 * ((number * 2) % 5), **settings)
            record.run, record.state = relative(run, sweep), "unfinished" if accuracy is None else "done"
        record.write(sweep)
    return sweep
