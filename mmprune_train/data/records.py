"""LLaVA's annotation format, read and checked: every problem is reported with its file, index, id and remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmprune_train.data.extras import foreign_placeholder, is_address, unread_picture
from mmprune_train.data.image_folder import OUTSIDE_REMEDY, ImageFolder
from mmprune_train.errors import UserError
from mmprune_train.storage.user_files import BadJson, check_text, item_refused, parse_json, reason_of, short

IMAGE_PLACEHOLDER = "<image>"
KNOWN = frozenset({"id", "image", "conversations", "kind"})
"""Keys of a record. Others may hold metadata, never a picture."""
OTHER_ROLES = {
    "user": "write human",
    "assistant": "write gpt",
    "system": "write its text into the first question, or remove the message",
}
"""Other formats' roles, and what to do with a message of theirs."""

LONGEST_PATH = 4096
"""Characters, as Linux has it."""

SYSTEM = frozenset({"system", "system_prompt", "system_message"})
"""Keys under which other formats have a text for the model."""


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

    @property
    def told(self) -> str:
        """Where it is, and its id, for messages."""
        return f"{self.where} (id {short(self.id, 80)})"


@dataclass(frozen=True)
class Annotations:
    """What is used of an annotation file."""

    records: list[Record]
    available: int
    """Samples in the file, of which `records` are the first."""


def read_annotations(
    annotations: Path, images: ImageFolder | Path, limit: int | None = None, require_answers: bool = True
) -> Annotations:
    """The first `limit` records of a LLaVA JSON or JSONL file; image paths start from `images`, and stay in it.

    A first turn that is not human is dropped, as in LLaVA. Images are not opened here. `require_answers=False` lets the
    last question stand without an answer. Raises UserError at the first malformed sample.
    """
    folder = images if isinstance(images, ImageFolder) else ImageFolder(images)
    records: list[Record] = []
    available = 0
    for available, item in enumerate(_items(Path(annotations), limit), 1):
        if limit is None or available <= limit:
            records.append(parse_record(item, f"{annotations}[{available - 1}]", folder, require_answers))
    if not records:
        raise UserError(f"{annotations} holds no samples; check the file or the split's `limit`")
    return Annotations(records, available)


def count_samples(annotations: Path) -> int:
    """Samples in a file, none of them looked into. Raises UserError where it is no JSON."""
    return sum(1 for _ in _items(Path(annotations), 0))


def _items(file: Path, limit: int | None) -> Iterator[Any]:
    """Each sample; lines behind `limit` of a JSONL file, which are only counted, as None."""
    try:
        check_text(file)
        with file.open(encoding="utf-8-sig") as stream:
            if file.suffix == ".jsonl":
                lines = ((number, line) for number, line in enumerate(stream, 1) if line.strip())
                for taken, (number, line) in enumerate(lines):
                    try:
                        item = parse_json(line, strict=True) if limit is None or taken < limit else None
                    except BadJson as error:
                        raise UserError(f"{file}, line {number}: {error}; correct that line") from None
                    yield item
                return
            text = stream.read()
            items = parse_json(text, strict=True)
    except FileNotFoundError:
        raise UserError(
            f"there is no annotation file {file}; correct the split's `annotations` or run `task=prepare`"
        ) from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({reason_of(error)}); correct the split's `annotations`") from None
    except (BadJson, UnicodeDecodeError) as error:
        hint = "; name a file of one object a line .jsonl" if isinstance(error.__cause__, ValueError) else ""
        told, place = (error, item_refused(text)) if isinstance(error, BadJson) else (f"not JSON ({error})", None)
        where = "" if place is None else f"[{place}]"
        raise UserError(f"{file}{where}: {told}; correct the file{hint}") from None
    if not isinstance(items, list):
        raise UserError(f"{file}: expected a list of samples, found {type(items).__name__}; see docs/data.md")
    yield from items


def parse_record(item: Any, where: str, images: ImageFolder, require_answers: bool = True) -> Record:
    """One sample; `where` is named in errors. Raises UserError with the reason and what to change."""
    if not isinstance(item, dict):
        raise UserError(f"{where}: a sample must be an object with `conversations`, found {type(item).__name__}")
    asked = item.get("id")
    name = where.rsplit("/", 1)[-1] if asked is None or isinstance(asked, dict | list) else str(asked)

    def wrong(reason: str, remedy: str) -> UserError:
        return UserError(short(f"{where} (id {short(name, 80)}): {reason}; {remedy}", 800))

    if isinstance(asked, dict | list):
        raise wrong(f"`id` is a {type(asked).__name__}", "write a name or a number")
    named = item.get("image")
    paths = [] if named is None else [named] if isinstance(named, str) else named
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise wrong("`image` must be a path or a list of paths", "leave the key out for a text-only sample")
    for path in paths:
        if is_address(path):
            raise wrong(f"`image` is an address ({path[:60]})", "save the picture as a file below the image folder")
        if "\0" in path or len(path) > LONGEST_PATH:
            what = "contains a NUL character" if "\0" in path else f"has {len(path):,} characters"
            raise wrong(f"a path in `image` {what}", "correct it")
    kind = item.get("kind")
    if not isinstance(kind, str | int | None):
        raise wrong("`kind` is not a word", "write the class that the question is counted in, or leave it out")
    kind = "" if kind is None else str(kind).strip()
    for what, text in (("the id", name), ("a path in `image`", "".join(paths)), ("`kind`", kind)):
        _check_text(what, text, wrong)
    places = []
    for path in paths:
        place, fault = images.place(path)
        if fault:
            raise wrong(f"image {short(path)} {fault}", OUTSIDE_REMEDY)
        places.append(place)
    _check_extras("`{}`", {key: item[key] for key in item.keys() - KNOWN}, paths, images.path, wrong)
    turns = _turns(item, paths, images.path, wrong, require_answers)
    if any(IMAGE_PLACEHOLDER in turn.answer for turn in turns):
        raise wrong(f"an answer contains {IMAGE_PLACEHOLDER}", "move it into the question")
    placeholders = sum(turn.question.count(IMAGE_PLACEHOLDER) for turn in turns)
    if placeholders != len(paths):
        raise wrong(
            f"{placeholders} {IMAGE_PLACEHOLDER} for {len(paths)} image(s)",
            "write one placeholder for each image into the questions, and name each picture under `image`",
        )
    return Record(name, places, turns, where, kind)


Wrong = Callable[[str, str], UserError]
"""(reason, remedy) -> the error that names the sample."""


def _check_extras(key: str, extras: dict[str, Any], images: list[str], root: Path, wrong: Wrong) -> None:
    """Raise where what is not read holds a picture, or a system text."""
    if not extras:
        return
    if found := unread_picture(extras, images, root):
        raise wrong(
            f"{key.format(short(found[0], 80))} names a picture, a video or a sound ({found[1]}) and is not read",
            "name pictures under `image`, a path or a list of paths, with one <image> for each in the questions; "
            "remove the key if it is none",
        )
    for name, text in extras.items():
        if name.lower() in SYSTEM and (text.strip() if isinstance(text, str) else text):
            raise wrong(f"{key.format(name)} is not read", "write its text into the first question, or remove the key")


def _check_text(what: str, text: str, wrong: Wrong) -> None:
    """Raise where a text is none that can be written as UTF-8, which tokenizers and files need."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = short(text[error.start])
        raise wrong(
            f"{what} has half of a surrogate pair ({half}) at character {error.start}",
            "write the whole character, or remove it",
        ) from None


def _turns(item: dict[str, Any], images: list[str], root: Path, wrong: Wrong, require_answers: bool) -> list[Turn]:
    conversation = item.get("conversations")
    if not isinstance(conversation, list) or not conversation:
        hint = "; `messages` with role and content are not read: rename them" if item.get("messages") else ""
        raise wrong("`conversations` is missing or empty", f"give a list of {{from, value}}{hint}")
    for position, message in enumerate(conversation):
        if isinstance(message, dict) and isinstance(parts := message.get("value", message.get("content")), list):
            raise wrong(
                f"message {position} is a list of {len(parts)} parts",
                "write its text as one string with <image> where a picture stands, and name the pictures under `image`",
            )
        if not isinstance(message, dict) or not isinstance(message.get("value"), str):
            raise wrong("a message is not {from, value} with a text value", "correct it")
        if message.get("from") not in ("human", "gpt"):
            role = message.get("from")
            told = repr(short(role, 80)) if isinstance(role, str) else f"of type {type(role).__name__}"
            remedy = OTHER_ROLES.get(role, "use human or gpt") if isinstance(role, str) else "use human or gpt"
            raise wrong(f"unknown role {told}", remedy)
        text = message["value"]
        _check_text(f"message {position}", text, wrong)
        if written := foreign_placeholder(text):
            raise wrong(
                f"message {position} has another format's picture ({written[:60]})",
                "write <image> in its place, and name the picture under `image`",
            )
        if len(message) > 2:
            extras = {key: message[key] for key in message.keys() - {"from", "value"}}
            _check_extras(f"`{{}}` of message {position}", extras, images, root, wrong)
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
