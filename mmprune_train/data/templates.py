"""Conversation templates: from turns to text spans that say what each piece is and whether it is trained on.

Labels come from these spans, so no tokenizer surprise can mask a whole sample. Three templates:

- `plain` (LLaVA's pretraining): images, caption, newline; the question's words are dropped; no EOS.
- `v1` (Vicuna): system text, `USER: q ASSISTANT: a</s>`; with another tokenizer its own EOS.
- `chat`: the tokenizer's own chat template.

In all of them the images of a turn move to its start, each followed by a newline (in `plain` by nothing).
"""

from __future__ import annotations

import difflib
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol

import jinja2
from transformers import PreTrainedTokenizerBase

from mmprune_train.data.records import IMAGE_PLACEHOLDER, Turn
from mmprune_train.data.tokens import bos_prefix, special_pattern
from mmprune_train.errors import UserError
from mmprune_train.pruning.packed import Kind

V1_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True)
class Span:
    """A piece of the rendered text. Special tokens in it become VISUAL or SPECIAL when it is not supervised."""

    text: str
    kind: Kind
    turn: int
    supervised: bool = False


@dataclass(frozen=True)
class Marks:
    """What tells the parts of a rendered conversation apart, for reading one back from its tokens."""

    system: str
    """Opens the system text; empty where that stands bare."""
    question: tuple[str, ...]
    """Role markers that open a question."""
    answer: tuple[str, ...]
    """What closes the question and opens the answer."""


class Template(Protocol):
    tokenizer: PreTrainedTokenizerBase
    marks: Marks | None
    """None: a text has no parts to tell apart (`plain`)."""

    def spans(self, turns: Sequence[Turn]) -> list[Span]:
        """The conversation as spans, without the BOS that the tokenizer adds on its own."""
        ...

    def prompt(self, question: str, n_images: int = 0, history: Sequence[Turn] = ()) -> str:
        """The text to generate from: `spans` up to where the last answer starts.

        `n_images` placeholders are put in front of a question that has none of its own.
        """
        ...


def get_template(name: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template `plain`, `v1` or `chat` for this tokenizer. Raises UserError for another name."""
    kinds: dict[str, Callable[[PreTrainedTokenizerBase], Template]]
    kinds = {"plain": PlainTemplate, "v1": V1Template, "chat": ChatTemplate}
    if name not in kinds:
        near = difflib.get_close_matches(name, kinds, 1) or ["chat"]
        raise UserError(f"unknown template {name!r}; did you mean {near[0]!r}? ({', '.join(kinds)})")
    return kinds[name](tokenizer)


class _Rendered:
    """What the templates share: the prompt is the spans before the last supervised one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def spans(self, turns: Sequence[Turn]) -> list[Span]:
        raise NotImplementedError

    def prompt(self, question: str, n_images: int = 0, history: Sequence[Turn] = ()) -> str:
        if IMAGE_PLACEHOLDER not in question:
            question = IMAGE_PLACEHOLDER * n_images + question
        spans = self.spans([*history, Turn(question, "")])
        last = max(index for index, span in enumerate(spans) if span.supervised)
        return "".join(span.text for span in spans[:last])


class PlainTemplate(_Rendered):
    marks: Marks | None = None

    def spans(self, turns: Sequence[Turn]) -> list[Span]:
        if len(turns) != 1:
            raise UserError(f"the plain template takes one turn, found {len(turns)}; use template v1 or chat")
        images = turns[0].question.count(IMAGE_PLACEHOLDER)
        return [
            Span(IMAGE_PLACEHOLDER * images, Kind.SPECIAL, 1),
            Span(turns[0].answer + "\n", Kind.ANSWER, 1, supervised=True),
        ]


class V1Template(_Rendered):
    marks: Marks | None = Marks(system="", question=("USER: ", "USER:"), answer=(" ASSISTANT:", "ASSISTANT:"))

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer)
        if not tokenizer.eos_token:
            raise UserError("template v1 needs a tokenizer with an EOS token; set one or use template chat")

    def spans(self, turns: Sequence[Turn]) -> list[Span]:
        spans = [Span(V1_SYSTEM, Kind.PROMPT, 0)]
        for k, turn in enumerate(turns, 1):
            spans += [
                Span(" USER: " if k == 1 else "USER: ", Kind.SPECIAL, k),
                *question_spans(turn.question, k),
                Span(" ASSISTANT:", Kind.SPECIAL, k),
                Span(f" {turn.answer}{self.tokenizer.eos_token}", Kind.ANSWER, k, supervised=True),
            ]
        return spans


class ChatTemplate(_Rendered):
    """The tokenizer's Jinja template, taken apart by rendering it around contents that cannot occur by chance."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer)
        if not tokenizer.chat_template:
            raise UserError("template chat needs a tokenizer with a chat template; set llm.template=v1")
        self._special = special_pattern(tokenizer)
        self._literals_of: dict[int, list[str]] = {}
        self._opening = ""
        self.marks = self._find_marks()
        if self.marks:
            self._opening = self.marks.question[0]

    def spans(self, turns: Sequence[Turn]) -> list[Span]:
        lead, *others = self._literals(len(turns))
        before, opening = self._cut_opening(lead)
        spans = lead_spans(before, self.marks.system if self.marks else "", self._special)
        spans.append(Span(opening, Kind.SPECIAL, 1))
        for k, turn in enumerate(turns, 1):
            close, gap = _before_the_gap(others[2 * k - 2])
            after = others[2 * k - 1]
            spans += [*question_spans(turn.question, k), Span(close, Kind.SPECIAL, k)]
            end = self._special.search(after)
            if end:
                ending, rest = after[: end.end()], after[end.end() :]
            else:  # a template without an end of turn: the model must still learn to stop
                ending, rest = after + (self.tokenizer.eos_token or ""), ""
            spans.append(Span(gap + turn.answer + ending, Kind.ANSWER, k, supervised=True))
            rest, opening = self._cut_opening(rest)
            if k < len(turns):  # what the template writes after the last answer's end teaches nothing
                spans += [Span(rest, Kind.SPECIAL, k), Span(opening, Kind.SPECIAL, k + 1)]
        return [span for span in spans if span.text]

    def _cut_opening(self, literal: str) -> tuple[str, str]:
        if self._opening and literal.endswith(self._opening):
            return literal[: -len(self._opening)], self._opening
        return literal, ""

    def _literals(self, turns: int) -> list[str]:
        """The 2 * turns + 1 pieces of template text around the questions and answers of a conversation."""
        if turns not in self._literals_of:
            names = [f"{role}{k}" for k in range(turns) for role in ("question", "answer")]
            self._literals_of[turns] = self._render_around(names, ["user", "assistant"] * turns)
        return self._literals_of[turns]

    def _render_around(self, names: list[str], roles: list[str], generate: bool = False) -> list[str]:
        contents = [f"c{secrets.token_hex(6)}{name}" for name in names]
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        bos = self.tokenizer.bos_token
        if bos and bos_prefix(self.tokenizer) and text.startswith(bos):
            text = text[len(bos) :]  # the tokenizer adds it again
        pieces = []
        for name, content in zip(names, contents, strict=True):
            before, found, text = text.partition(content)
            if not found:
                raise UserError(f"the tokenizer's chat template drops or reorders the {name}; set llm.template=v1")
            pieces.append(before)
        return [*pieces, text]

    def _find_marks(self) -> Marks | None:
        lead, close, _ = self._literals(1)
        _, first, between, second, _ = self._literals(2)
        generating = self._render_around(["question0"], ["user"], generate=True)[1]
        closes = {_before_the_gap(text)[0] for text in (close, first, second, generating)}
        opening = _distinct_suffix(_common_end(lead, between), closes, self._special)
        if not opening or not all(closes):
            return None
        try:
            system = self._render_around(["system", "question0"], ["system", "user"])[0]
        except (jinja2.TemplateError, UserError):  # the template has no system role
            system = ""
        return Marks(system, (opening,), tuple(sorted(closes, key=len, reverse=True)))


def _before_the_gap(close: str) -> tuple[str, str]:
    """A literal without the spaces at its end, and these: they belong to the answer's first token (`[/INST] yes`), and
    a prompt that ended with them would be tokenised in another way."""
    text = close.rstrip(" ")
    return text, close[len(text) :]


def _common_end(first: str, second: str) -> str:
    pairs = zip(reversed(first), reversed(second), strict=False)
    length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return first[len(first) - length :]


def _distinct_suffix(text: str, closes: set[str], special: re.Pattern[str]) -> str:
    """The shortest end of `text` that starts at a special token and tells a question from an answer."""
    for match in reversed(list(special.finditer(text))):
        suffix = text[match.start() :]
        if not any(close.endswith(suffix) for close in closes):
            return suffix
    return text if not any(close.endswith(text) for close in closes) else ""


def question_spans(question: str, turn: int) -> list[Span]:
    """The images of a question first, each followed by a newline, then its words."""
    images = question.count(IMAGE_PLACEHOLDER)
    words = question.replace(IMAGE_PLACEHOLDER, "").strip()
    placeholders = (IMAGE_PLACEHOLDER + "\n") * images
    spans = [Span(placeholders if words else placeholders.rstrip("\n"), Kind.SPECIAL, turn)]
    return [span for span in [*spans, Span(words, Kind.PROMPT, turn)] if span.text]


def lead_spans(text: str, header: str, special: re.Pattern[str]) -> list[Span]:
    """What stands before the first question: the header, the system text up to its end token, and the rest."""
    spans = []
    if header and text.startswith(header):
        spans.append(Span(header, Kind.SPECIAL, 0))
        text = text[len(header) :]
    found = special.search(text)
    words = text[: found.start()] if found else text
    words = words.rstrip()
    spans += [Span(words, Kind.PROMPT, 0), Span(text[len(words) :], Kind.SPECIAL, 0)]
    return [span for span in spans if span.text]
