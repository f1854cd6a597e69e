"""`task=generate`: answer one question about one or more images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmprune_train.config.identity import run_dir
from mmprune_train.config.schema import Config
from mmprune_train.errors import UserError
from mmprune_train.evaluation.generate import answer
from mmprune_train.evaluation.questions import Question
from mmprune_train.model.build import load_model
from mmprune_train.quiet import quiet
from mmprune_train.reporting.tables import table
from mmprune_train.tasks.evaluate import prompt_template, with_run_settings
from mmprune_train.training.files import write_json
from mmprune_train.training.precision import choose_accelerator, choose_precision


def run(config: Config) -> dict[str, Any]:
    """Print the answer and how many tokens it was read from."""
    if not config.ckpt:
        raise UserError("task=generate needs ckpt=FOLDER: a run directory, an exported folder or a llava-hf folder")
    images = [Path(path) for path in config.generate.images]
    for path in images:
        if not path.is_file():
            raise UserError(f"generate.images: there is no file {path}")
    chosen, pruner = with_run_settings(config, Path(config.ckpt))
    accelerator = choose_accelerator(config.trainer.accelerator)
    precision = choose_precision(config.trainer.precision, accelerator)
    with quiet():
        model, processor = load_model(
            config.ckpt, pruner=pruner, device=accelerator, text=chosen.encoder.text, key="ckpt"
        )
    model.attention = config.trainer.attention
    question = Question("generate", images, config.generate.question, "", "open")
    template = prompt_template(model, processor, chosen)
    prediction = answer(
        model,
        processor,
        template,
        [question],
        1,
        config.generate.max_new_tokens,
        dtype=precision.dtype,
        title="generate",
    )[0]
    counts = {name: int(prediction.counts[name]) for name in ("dense", "stage1", "stage2")}
    print(f"\n{prediction.text}\n")
    print(table([list(counts.values())], ["tokens, dense", "after stage 1", "after stage 2"]))
    result = {"question": config.generate.question, "prediction": prediction.text, "tokens": counts}
    write_json(run_dir(config) / "generate" / "result.json", result)
    return result
