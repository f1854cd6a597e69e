"""The one question of a command line, `generate.*`, for the tasks that ask it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mmprune_train.config.task_schema import GenerateConfig
from mmprune_train.data.images import read_image
from mmprune_train.data.records import IMAGE_PLACEHOLDER
from mmprune_train.errors import UserError
from mmprune_train.evaluation.questions import Question
from mmprune_train.storage.user_files import file_status

IMAGES = "generate.images"
LONGEST_QUESTION = 1 << 20
"""Bytes of a question's file, or characters from standard input."""


def typed_question(asked: GenerateConfig, name: str) -> Question:
    """The question with its images.

    Args:
        name: of the task.
    Raises:
        UserError: a file is missing or cannot be read as text, standard input is empty, or placeholders and images do
            not match.
    """
    images = [Path(path).expanduser() for path in asked.images]
    for path in images:
        if not os.path.lexists(path):
            comma = " (a comma in a file's name wants quotes: '[\"a, b.png\"]')" if len(images) > 1 else ""
            raise UserError(f"{IMAGES}: there is no file {path}{comma}")
        read_image(path, IMAGES)
    text, key = _text(asked)
    placeholders = text.count(IMAGE_PLACEHOLDER)
    if placeholders not in (0, len(images)):
        raise UserError(
            f"{key} has {placeholders} {IMAGE_PLACEHOLDER} for {len(images)} {IMAGES}: write one for each, in "
            "their order, or none, and they stand before the question"
        )
    return Question(name, images, text, "", "open", where=IMAGES)


def _text(asked: GenerateConfig) -> tuple[str, str]:
    """The question, and the key that it comes from."""
    key = "generate.question"
    if asked.question_file is not None:
        key = "generate.question_file"
        if asked.question != GenerateConfig.question:
            raise UserError(f"{key} and generate.question are both given: leave one out")
        try:
            file = Path(asked.question_file).expanduser()
            if (size := file_status(file).st_size) > LONGEST_QUESTION:
                raise OSError(f"it has {size:,} bytes, at most {LONGEST_QUESTION:,} are read")
            text = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{key}={asked.question_file}: cannot be read as text ({error}); name another") from None
        if not text.strip():
            raise UserError(f"{key}={asked.question_file}: the file is empty; write the question into it")
    elif asked.question == "-":
        if sys.stdin.isatty():
            print("the question, ended by Ctrl-D on a line of its own:", file=sys.stderr, flush=True)
        text = sys.stdin.read(LONGEST_QUESTION + 1)
        if len(text) > LONGEST_QUESTION:
            raise UserError(
                f"{key}=-: more than {LONGEST_QUESTION:,} characters came from standard input; ask in fewer"
            )
        if not text.strip():
            raise UserError(f"{key}=-: nothing came from standard input")
    else:
        text = asked.question
    text = text.strip("\r\n")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{key}: the text is not valid UTF-8; write it again, or give generate.question_file") from None
    return text, key
