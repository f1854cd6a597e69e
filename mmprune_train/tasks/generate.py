"""`task=generate`: answer one question about one or more images."""

from __future__ import annotations

import time
from typing import Any

from mmprune_train.config.command import Command
from mmprune_train.config.schema import Config
from mmprune_train.errors import UserError
from mmprune_train.evaluation.generate import answer, check_room
from mmprune_train.reporting.tables import table
from mmprune_train.storage.files import json_text, write_json
from mmprune_train.storage.locks import publishing
from mmprune_train.storage.secrets import masked_texts
from mmprune_train.tasks.checkpoint import find_checkpoint, load, prompt_template
from mmprune_train.tasks.question import typed_question


def run(config: Config, command: Command = Command()) -> dict[str, Any]:
    """Print the answer and how many tokens it was read from; add a line to `generate/answers.jsonl`."""
    if not config.ckpt:
        raise UserError("task=generate needs ckpt=FOLDER: a run directory, an exported folder or a llava-hf folder")
    question = typed_question(config.generate, "generate")
    found = find_checkpoint(config, command)
    model, processor, precision = load(found)
    check_room("generate.max_new_tokens", config.generate.max_new_tokens, model)
    prediction = answer(
        model,
        processor,
        prompt_template(processor),
        [question],
        1,
        config.generate.max_new_tokens,
        dtype=precision.dtype,
        title="generate",
    )[0]
    counts = {name: int(prediction.counts[name]) for name in ("dense", "stage1", "stage2")}
    print(f"\n{prediction.text or '(an empty answer: the model ended at once)'}\n")
    print(table([list(counts.values())], ["tokens, dense", "after stage 1", "after stage 2"]))
    result = {
        "asked": {
            "ckpt": str(found.model),
            "images": [str(path) for path in question.images],
            "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        },
        "pruner": model.pruner.settings.name,
        "question": question.text,
        "prediction": prediction.text,
        "tokens": counts,
    }
    folder = found.home / "generate"
    with publishing(folder):
        write_json(folder / "result.json", result)
        with (folder / "answers.jsonl").open("a", encoding="utf-8") as file:
            file.write(json_text(masked_texts(result)) + "\n")
    print(f"\n{folder / 'answers.jsonl'}", flush=True)
    return result
