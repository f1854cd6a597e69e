"""The files that servers and judges take, in the form that LLaVA's scripts write them."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmprune_train.evaluation.benchmarks.item import Item, Loaded
from mmprune_train.evaluation.metrics.vqa_text import evalai_normalised
from mmprune_train.storage.atomic import write_atomically
from mmprune_train.storage.files import json_text

Answered = Sequence[tuple[Item, str]]
"""Items and what was predicted."""
Submit = Callable[[Path, Answered, Loaded], list[Path]]
"""(folder, answers, what the files hold) -> files written."""
NOT_SENT = ("hint", "category", "source", "image", "image_path", "comment", "l2-category")
"""Columns of MMBench that its upload does not have."""
PREDICTION_AT = 6


def vqav2(folder: Path, answers: Answered, loaded: Loaded) -> list[Path]:
    """For EvalAI; an empty answer to what was not asked, which it wants, too."""
    rows: list[Any] = [{"question_id": int(i.id), "answer": evalai_normalised(text)} for i, text in answers]
    told = {item.id for item, _ in answers}
    others = [*(int(number) for number in loaded.ids if number not in told), *loaded.others]
    rows += [{"question_id": number, "answer": ""} for number in others]
    return [_json(folder / "vqav2_upload.json", rows)]


def vizwiz(folder: Path, answers: Answered, loaded: Loaded) -> list[Path]:
    """For EvalAI."""
    return [_json(folder / "vizwiz_upload.json", [{"image": i.id, "answer": evalai_normalised(t)} for i, t in answers])]


def gqa(folder: Path, answers: Answered, loaded: Loaded) -> list[Path]:
    """For GQA's own `eval.py --tier testdev_balanced`."""
    rows = [{"questionId": item.id, "prediction": text.rstrip(".").lower()} for item, text in answers]
    return [_json(folder / "testdev_balanced_predictions.json", rows)]


def mmvet(folder: Path, answers: Answered, loaded: Loaded) -> list[Path]:
    """For `mm-vet_evaluator`, which asks the judge."""
    return [_json(folder / "mmvet_results.json", {item.id: text for item, text in answers})]


def seed(folder: Path, answers: Answered, loaded: Loaded) -> list[Path]:
    """For the leaderboard: a line a question."""
    path = folder / "seed_upload.jsonl"
    rows = [json_text({"question_id": item.id, "prediction": text}) + "\n" for item, text in answers]
    write_atomically(path, "".join(rows).encode())
    return [path]


def mmbench(folder: Path, answers: Answered, loaded: Loaded) -> list[Path]:
    """The table with a column `prediction`: TSV, and the XLSX that the server takes."""
    columns = [name for name in answers[0][0].extra["row"] if name not in NOT_SENT]
    columns.insert(min(PREDICTION_AT, len(columns)), "prediction")
    rows = [[{**item.extra["row"], "prediction": text}[name] for name in columns] for item, text in answers]
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
    writer.writerows([columns, *rows])
    path = folder / "mmbench_upload.tsv"
    write_atomically(path, stream.getvalue().encode())
    return [path, _xlsx(path.with_suffix(".xlsx"), [columns, *rows])]


def _xlsx(path: Path, rows: Sequence[Sequence[str]]) -> Path:
    from openpyxl import Workbook

    book = Workbook(write_only=True)
    sheet = book.create_sheet()
    for row in rows:
        sheet.append([int(cell) if cell.isdecimal() and at == 0 else cell for at, cell in enumerate(row)])
    stream = io.BytesIO()
    book.save(stream)
    write_atomically(path, stream.getvalue())
    return path


def _json(path: Path, value: Any) -> Path:
    write_atomically(path, json_text(value).encode())
    return path
