"""LLaVA's annotation format, read and checked: every problem is reported with its file, index, id and remedy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmprune_train.errors import UserError

IMAGE_PLACEHOLDER = "<image>"


@dataclass(frozen=True)
class Turn:
    question: str
    """Text of the user, `<image>` placeholders where they were written."""
    answer: str
    """Text the model learns to write; empty where a question comes without one (allowed in evaluation only)."""


@dataclass(frozen=True)
class Record:
    id: str
    images: list[Path]
    """In the order of the placeholders; empty for text-only samples."""
    turns: list[Turn]
    where: str
    """`file[index]`, for messages."""
    kind: str = ""
    """Optional class of the question (`open`, `yes_no`), by which evaluation reports."""


def read_records(
    annotations: Path, image_root: Path, limit: int | None = None, require_answers: bool = True
) -> list[Record]:
    """The first `limit` records of a LLaVA JSON or JSONL file; image paths start from `image_root`.

    A first turn that is not human is dropped, as in LLaVA. Images are not opened here. `require_answers=False` lets the
    last question stand without an answer. Raises UserError at the first malformed sample.
    """
    records = []
    for index, item in enumerate(_items(Path(annotations), limit)):
        records.append(parse_record(item, f"{annotations}[{index}]", Path(image_root), require_answers))
    if not records:
        raise UserError(f"{annotations} holds no samples; check the file or the split's `limit`")
    return records


def _items(file: Path, limit: int | None) -> Iterator[Any]:
    if not file.is_file():
        raise UserError(f"there is no annotation file {file}; correct the split's `annotations` or run `task=prepare`")
    try:
        with file.open(encoding="utf-8-sig") as stream:
            if file.suffix == ".jsonl":
                lines = ((number, line) for number, line in enumerate(stream, 1) if line.strip())
                for taken, (number, line) in enumerate(lines):
                    if limit is not None and taken >= limit:
                        return
                    try:
                        item = json.loads(line)
                    except json.JSONDecodeError as error:
                        raise UserError(f"{file}, line {number}: not JSON ({error}); correct that line") from None
                    yield item
                return
            items = json.load(stream)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        hint = "; name a file of one object a line .jsonl" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{file}: not JSON ({error}); correct the file{hint}") from None
    if not isinstance(items, list):
        raise UserError(f"{file}: expected a list of samples, found {type(items).__name__}; see LLaVA's format")
    yield from items[:limit]


def parse_record(item: Any, where: str, image_root: Path, require_answers: bool = True) -> Record:
    """One sample; `where` is named in errors. Raises UserError with the reason and what to change."""
    if not isinstance(item, dict):
        raise UserError(f"{where}: a sample must be an object with `conversations`, found {type(item).__name__}")
    name = str(item.get("id", where.rsplit("/", 1)[-1]))

    def wrong(reason: str, remedy: str) -> UserError:
        return UserError(f"{where} (id {name}): {reason}; {remedy}")

    turns = _turns(item.get("conversations"), wrong, require_answers)
    images = item.get("image")
    paths = [] if images is None else [images] if isinstance(images, str) else images
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise wrong("`image` must be a path or a list of paths", "leave the key out for a text-only sample")
    if any(IMAGE_PLACEHOLDER in turn.answer for turn in turns):
        raise wrong(f"an answer contains {IMAGE_PLACEHOLDER}", "move it into the question")
    placeholders = sum(turn.question.count(IMAGE_PLACEHOLDER) for turn in turns)
    if placeholders != len(paths):
        raise wrong(
            f"{placeholders} {IMAGE_PLACEHOLDER} for {len(paths)} image(s)",
            "write one placeholder for each image into the questions",
        )
    return Record(name, [image_root / path for path in paths], turns, where, str(item.get("kind", "")))


def _turns(conversation: Any, wrong: Any, require_answers: bool) -> list[Turn]:
    if not isinstance(conversation, list) or not conversation:
        raise wrong("`conversations` is missing or empty", "give a list of {from, value}")
    for message in conversation:
        if not isinstance(message, dict) or not isinstance(message.get("value"), str):
            raise wrong("a message is not {from, value} with a text value", "correct it")
        if message.get("from") not in ("human", "gpt"):
            raise wrong(f"unknown role {message.get('from')!r}", "use human or gpt")
    if conversation[0]["from"] != "human":
        conversation = conversation[1:]
    for position, message in enumerate(conversation):
        if message["from"] != ("human", "gpt")[position % 2]:
            raise wrong(f"two {message['from']} messages in a row (message {position})", "roles must alternate")
    if not conversation:
        raise wrong("there is no question", "start with a human message")
    if len(conversation) % 2:
        if require_answers:
            raise wrong("the last question has no answer", "add a gpt message or drop the question")
        conversation = [*conversation, {"from": "gpt", "value": ""}]
    for position, message in enumerate(conversation):
        if require_answers and position % 2 and not message["value"].strip():
            raise wrong(f"the answer of turn {position // 2 + 1} is empty", "write it, or drop the turn")
    pairs = zip(conversation[::2], conversation[1::2], strict=True)
    return [Turn(question["value"].strip(), answer["value"].strip()) for question, answer in pairs]
