"""Kinds and turns of a sequence that is only known by its token ids, as at inference.

`encode` knows the parts of a conversation because it wrote them; here they are found again by the template's role
markers, with the same result.
"""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mmprune_train.data.encode import tokenise
from mmprune_train.data.records import IMAGE_PLACEHOLDER, Turn
from mmprune_train.data.spans import lead_spans
from mmprune_train.data.templates import Template
from mmprune_train.data.tokens import Pieces, special_pattern
from mmprune_train.packed.sequence import Kind

_PROBES = tuple(Turn(text, "So.") for text in ("Why?", f"{IMAGE_PLACEHOLDER}\nWhy?", IMAGE_PLACEHOLDER, ""))
"""Questions of every kind: what stands beside a role marker decides its tokens."""


class Annotator:
    """Finds system text, questions and answers in token ids.

    A text without the template's markers is one question: all its plain text is PROMPT of turn 1.
    """

    def __init__(self, template: Template, tokenizer: PreTrainedTokenizerBase, image_token_id: int) -> None:
        self._tokenizer = tokenizer
        self._pieces = Pieces(tokenizer)
        self._image_id = image_token_id
        self._special_ids = template.rules.special
        self._special_text = special_pattern(tokenizer)
        self._special = re.compile(self._special_text.pattern.encode())
        self._bos = b"".join(self._pieces(template.rules.bos))
        self._image_gap = re.compile(re.escape(IMAGE_PLACEHOLDER.encode()) + rb"(\s+)")
        self._header = self._question = self._answer = None
        if marks := template.marks:
            self._header = self._system(marks.system) if marks.system else None
            self._question = self._any(template, (marks.question,), behind=True)
            self._answer = self._any(template, marks.answer, behind=False)

    def __call__(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids [L] of one sequence without padding -> kind [L], turn [L], int64 on the device of `ids`."""
        tokens = ids.tolist()
        pieces = self._pieces(tokens)
        text = b"".join(pieces)
        byte_kind, byte_turn = self._parts(text)
        last = np.clip(np.cumsum([len(piece) for piece in pieces], dtype=np.int64) - 1, 0, max(len(text) - 1, 0))
        kind, turn = (byte_kind[last], byte_turn[last]) if text else (last, last)
        array = np.array(tokens, dtype=np.int64)
        special = np.isin(array, self._special_ids) & (kind != int(Kind.ANSWER))
        kind = np.where(special, int(Kind.SPECIAL), kind)
        kind = np.where(array == self._image_id, int(Kind.VISUAL), kind)
        return torch.from_numpy(kind).to(ids.device), torch.from_numpy(turn).to(ids.device)

    def words(self, ids: Tensor) -> str:
        """The text behind ids [n], without the spaces around it."""
        return b"".join(self._pieces(ids.tolist())).decode("utf-8", errors="replace").strip()

    def _parts(self, text: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Kind and turn of every byte, both [B] int64; special tokens are left to the caller."""
        kind = np.full(len(text), int(Kind.SPECIAL), dtype=np.int64)
        turn = np.zeros(len(text), dtype=np.int64)
        start = len(self._bos) if self._bos and text.startswith(self._bos) else 0
        opening = self._question.search(text, start) if self._question else None
        if opening is None or self._answer is None or self._question is None:
            self._question_part(text, start, len(text), 1, kind, turn)
            return kind, turn
        self._lead(text, start, opening.start(), kind)
        number = 0
        while opening:
            number += 1
            turn[opening.start() :] = number
            closing = self._answer.search(text, opening.end())
            self._question_part(text, opening.end(), closing.start() if closing else len(text), number, kind, turn)
            if closing is None:
                break
            end = self._special.search(text, closing.end())
            opening = self._question.search(text, end.end() if end else closing.end())
            stop = end.end() if end else opening.start() if opening else len(text)
            kind[closing.end() : stop] = int(Kind.ANSWER)
        return kind, turn

    def _question_part(
        self, text: bytes, start: int, stop: int, number: int, kind: np.ndarray, turn: np.ndarray
    ) -> None:
        kind[start:stop] = int(Kind.PROMPT)
        turn[start:stop] = number
        for gap in self._image_gap.finditer(text, start, stop):
            kind[gap.start(1) : gap.end(1)] = int(Kind.SPECIAL)

    def _lead(self, text: bytes, start: int, stop: int, kind: np.ndarray) -> None:
        """The part before the first question, by the rule that templates use."""
        words = text[start:stop].decode("utf-8", errors="replace")
        header = self._header.match(text[start:stop]) if self._header else None
        at = start
        for span in lead_spans(words, header[0].decode() if header else "", self._special_text):
            size = len(span.text.encode())
            kind[at : at + size] = int(span.kind)
            at += size

    def _any(self, template: Template, literals: tuple[str, ...], behind: bool) -> re.Pattern[bytes]:
        """Matches any of a template's role markers as they stand in ids, where case, spaces and line ends may differ
        from the template's: a tokenizer normalises them, or its special tokens swallow them. `behind`: with the
        spaces there."""
        found: set[bytes] = set()
        for turn in _PROBES:
            spans = template.spans([turn, turn])
            ids, owner = tokenise(spans, template)
            parts = [b""] * len(spans)
            for number, piece in zip(owner.tolist(), self._pieces(ids.tolist()), strict=True):
                parts[number] += piece
            found |= {part for part, span in zip(parts, spans, strict=True) if span.text in literals}
        for literal in literals:  # one that opens only a generated answer stands in no conversation
            found.add(b"".join(self._pieces(self.spell(literal))))
        spaces = max(1, *(len(part) - len(part.rstrip(b" ")) for part in found)) if behind else 0
        patterns = sorted({part.strip(b" ") for part in found} - {b""}, key=len, reverse=True)
        return re.compile(b" ?(?:" + b"|".join(map(re.escape, patterns)) + b") {0,%d}" % spaces)

    def _system(self, header: str) -> re.Pattern[bytes]:
        text = b"".join(self._pieces(self.spell(header))).rstrip()
        return re.compile(re.escape(text) + (rb"\s*" if header != header.rstrip() else b""))

    def spell(self, text: str) -> list[int]:
        """The ids of a text, without special tokens around it."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
