"""Train and evaluate every cell of this study that is not there yet, one after the other, and write results.csv. It may
be stopped at any time: the next start goes on. usage: python experiments/learned/sweep.py RUNS_DIR [PREFIX...]

PREFIX: a command that each run is started with, e.g. nice."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

SEEDS = (42, 1, 2)
RATIOS = (0.05, 0.22)
SCORES = {
    "cls_attention": ("pruner=encoder_only", "pruner.vision.knee.method=fixed_ratio"),
    "learned": ("pruner=learned", "trainer.feature_cache=false"),
}
SHORTER = (
    "stage.pretrain.max_steps=60", "stage.instruct.max_steps=90", "evaluate.limit=300", "evaluate.kinds=[open]",
    "evaluate.blank=false",
)  # fmt: skip
COLUMNS = ("seed", "ratio", "score", "accuracy", "keep_ratio", "pretrain_loss", "loss", "step_seconds", "minutes")


def main(runs: Path, prefix: list[str]) -> None:
    for seed in SEEDS:
        for ratio in RATIOS:
            for score, settings in SCORES.items():
                name = f"{score}-{ratio:g}-{seed}"
                if not (runs / "demo" / name / "result.json").is_file():
                    own = (*settings, f"pruner.vision.knee.ratio={ratio}", f"seed={seed}", *SHORTER)
                    command = [sys.executable, "-m", "mmprune_train", "+experiment=demo", *own]
                    subprocess.run([*prefix, *command, f"runs_dir={runs}", f"run_id={name}"], check=True)
                write(runs)


def write(runs: Path) -> None:
    """The table of the runs that have ended."""
    rows = []
    for file in sorted(runs.glob("demo/*/result.json")):
        score, ratio, seed = file.parent.name.split("-")
        if score not in SCORES:
            continue
        found = json.loads(file.read_text(encoding="utf-8"))
        first, last = found["stages"]["pretrain"], found["stages"]["instruct"]
        asked = found["evaluate"]
        minutes = first["train_minutes"] + last["train_minutes"]
        numbers = (asked["accuracy"]["open"], asked["keep_ratio"], first["loss"], last["loss"], last["step_seconds"])
        rows.append((seed, ratio, score, *(round(number, 4) for number in (*numbers, minutes))))
    with (Path(__file__).parent / "results.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
