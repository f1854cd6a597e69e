"""Conversation templates: from turns to text spans that say what each piece is and whether it is trained on.

Labels come from these spans, so no tokenizer surprise can mask a whole sample. Three templates:

- `plain` (LLaVA's pretraining): images, caption, newline; the question's words are dropped; no EOS.
- `v1` (Vicuna): system text, `USER: q ASSISTANT: a</s>`; with another tokenizer its own EOS.
- `chat`: the tokenizer's own chat template.

In all of them the images of a turn move to its start, each followed by a newline (in `plain` by nothing). The last two
are Jinja texts, and `chat_template` is what a model's folder gets: it renders messages to the very text trained on.
"""

from __future__ import annotations

import difflib
import json
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from mmprune_train.data.records import IMAGE_PLACEHOLDER, Turn
from mmprune_train.data.spans import Span, lead_spans, question_spans
from mmprune_train.data.tokens import gap_of, rules_of, special_pattern
from mmprune_train.errors import UserError
from mmprune_train.packed.sequence import Kind

FILES = Path(__file__).parent / "chat_templates"
GENERATION = re.compile(r"(\{%[-+]?\s*)(end)?generation(?=\s*[-+]?%\})")
"""The tags by which transformers alone marks answers; it finds wrong ones behind a macro."""
TAG = re.compile(r"</?[^<>\s'\"]+>|\[/?[^\[\]\s'\"]+\]")
"""What templates look for in contents to write these differently: `</think>`, `<tool_response>`."""
SAVED = re.compile(r"\{#- mmprune_train template (\w+):")
"""How a chat template begins that this module has written."""


@dataclass(frozen=True)
class Marks:
    """What tells the parts of a rendered conversation apart, for reading one back from its tokens."""

    system: str
    """Opens the system text; empty where that stands bare."""
    question: str
    """Role marker that opens a question."""
    answer: tuple[str, ...]
    """What closes the question and opens the answer."""


class Template(ABC):
    marks: Marks | None = None
    """None: a text has no parts to tell apart (`plain`)."""
    end = ""
    """The special token that ends every answer; empty: none does (`plain`)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.rules = rules_of(tokenizer)

    @abstractmethod
    def spans(self, turns: Sequence[Turn]) -> list[Span]:
        """The conversation as spans, without the BOS that the tokenizer adds on its own."""

    def prompt(self, question: str, n_images: int = 0, history: Sequence[Turn] = ()) -> str:
        """The text to generate from: `spans` up to where the last answer starts.

        `n_images` placeholders are put in front of a question that has none of its own.
        """
        if IMAGE_PLACEHOLDER not in question:
            question = IMAGE_PLACEHOLDER * n_images + question
        spans = self.spans([*history, Turn(question, "")])
        last = max(index for index, span in enumerate(spans) if span.supervised)
        return "".join(span.text for span in spans[:last])


def get_template(name: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template `plain`, `v1` or `chat` for this tokenizer. Raises UserError for another name."""
    kinds: dict[str, Callable[[PreTrainedTokenizerBase], Template]] = {"plain": PlainTemplate, "v1": _v1, "chat": _own}
    if name not in kinds:
        near = difflib.get_close_matches(name, kinds, 1) or ["chat"]
        raise UserError(f"unknown template {name!r}; did you mean {near[0]!r}? ({', '.join(kinds)})")
    return kinds[name](tokenizer)


def template_name(chat_template: str | None) -> str:
    """The template behind a model folder's chat template: the one it was saved with, else `v1` where it writes LLaVA's
    roles or there is none, else `chat`."""
    if chat_template and (saved := SAVED.match(chat_template)):
        return saved[1]
    return "chat" if chat_template and "USER:" not in chat_template and "upper()" not in chat_template else "v1"


def _v1(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    if not tokenizer.eos_token:
        raise UserError("template v1 needs a tokenizer with an EOS token; set one or use template chat")
    return ChatTemplate("v1", tokenizer, (FILES / "v1.jinja").read_text(encoding="utf-8").removesuffix("\n"))


def _own(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    if not tokenizer.chat_template:
        raise UserError("template chat needs a tokenizer with a chat template; set llm.template=v1")
    try:
        own = tokenizer.get_chat_template()
    except ValueError as error:  # several, and none of them the default
        raise UserError(f"template chat: {error}; name one of them default in the tokenizer's files") from None
    if (saved := SAVED.match(own)) and saved[1] != "chat":
        raise UserError(
            f"template chat: this folder was saved with template {saved[1]}, which stands in the place of its "
            f"tokenizer's own chat template; use template {saved[1]}"
        )
    return ChatTemplate("chat", tokenizer, own)


class PlainTemplate(Template):
    def spans(self, turns: Sequence[Turn]) -> list[Span]:
        if len(turns) != 1:
            raise UserError(f"the plain template takes one turn, found {len(turns)}; use template v1 or chat")
        images = turns[0].question.count(IMAGE_PLACEHOLDER)
        return [
            Span(IMAGE_PLACEHOLDER * images, Kind.SPECIAL, 1),
            Span(turns[0].answer + "\n", Kind.ANSWER, 1, supervised=True),
        ]


class ChatTemplate(Template):
    """A Jinja template (`v1` or `chat`), taken apart by rendering it around contents that cannot occur by chance."""

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, jinja: str) -> None:
        super().__init__(tokenizer)
        self.name = name
        self._jinja = jinja
        self._special = special_pattern(tokenizer)
        self._gap = gap_of(tokenizer)
        self._tags = set(TAG.findall(jinja)) - {IMAGE_PLACEHOLDER}
        self._literals_of: dict[int, list[str]] = {}
        # contents may be written only as lists of parts, as in the templates of llava-hf folders
        self._in_parts = not self._writes(in_parts=False) and self._writes(in_parts=True)
        self.marks = self._find_marks()
        self._ending = self._find_ending()
        self.end = self._special.findall(self._ending)[-1] if self._ending else str(tokenizer.eos_token)
        ended = tokenizer(f"a{self.end}", add_special_tokens=False)["input_ids"]
        if ended[-1] != tokenizer.convert_tokens_to_ids(self.end):
            raise UserError(
                f"the tokenizer does not read {self.end}, which ends an answer, as one token behind a word; give it "
                "normalized=false in tokenizer.json"
            )

    @property
    def chat_template(self) -> str:
        """Jinja for the model's folder, by which any library renders messages to what `spans` and `prompt` write.

        Contents may be strings with `<image>` in them, or lists of image and text parts.
        """
        if SAVED.match(self._jinja):
            return self._jinja
        parts = {
            "NAME": self.name,
            "CONTENT": "[{'type': 'text', 'text': turn.text}]" if self._in_parts else "turn.text",
            "ANSWER_END": json.dumps("" if self._ending else self.end),
            "ADDED_BOS": json.dumps(self._added_bos),
            "GAP": json.dumps(self._gap),
            "BODY": GENERATION.sub(
                lambda tag: tag[1] + ("endif" if tag[2] else "if true"), re.sub("\r\n?", "\n", self._jinja)
            ).removesuffix("\n"),
        }
        text = (FILES / "saved.jinja").read_text(encoding="utf-8").removesuffix("\n")
        return re.sub("|".join(parts), lambda found: parts[found[0]], text)

    def spans(self, turns: Sequence[Turn]) -> list[Span]:
        lead, *others = self._literals(len(turns))
        before, opening = self._cut_opening(lead)
        spans = lead_spans(before, self.marks.system if self.marks else "", self._special)
        spans.append(Span(opening, Kind.SPECIAL, 1))
        for k, turn in enumerate(turns, 1):
            close, gap = self._before_the_gap(others[2 * k - 2])
            after, opening = self._cut_opening(others[2 * k - 1])
            spans += [*question_spans(turn.question, k), Span(close, Kind.SPECIAL, k)]
            found = self._special.search(after) if self._ending else None
            ending = after[: found.end()] if found else self._ending if k == len(turns) else ""
            spans.append(Span(gap + turn.answer.strip() + (ending or self.end), Kind.ANSWER, k, supervised=True))
            if k < len(turns):  # what the template writes after the last answer's end teaches nothing
                rest = after[len(ending) :]
                spans += [Span(rest, Kind.SPECIAL, k), Span(opening, Kind.SPECIAL, k + 1)]
        spans = [span for span in spans if span.text]
        if any(tag in text for tag in self._tags for turn in turns for text in (turn.question, turn.answer)):
            self._check_written(turns, "".join(span.text for span in spans))
        return spans

    def _check_written(self, turns: Sequence[Turn], text: str) -> None:
        """Raise UserError where the template writes a conversation in another way than around any other contents."""
        questions = ["".join(span.text for span in question_spans(turn.question, 0)) for turn in turns]
        answers = [turn.answer.strip() + ("" if self._ending else self.end) for turn in turns]
        contents = [content for pair in zip(questions, answers, strict=True) for content in pair]
        written = self._render(contents, ["user", "assistant"] * len(turns)).removeprefix(self._added_bos)
        if not (written.startswith(text) or text.startswith(written)):
            found = sorted(tag for tag in self._tags if any(tag in content for content in contents))
            raise UserError(
                f"the tokenizer's chat template drops or rewrites a text that has {' or '.join(found)} in it; take it "
                "out of the texts, or set llm.template=v1"
            )

    def _cut_opening(self, literal: str) -> tuple[str, str]:
        opening = self.marks.question if self.marks else ""
        return (literal.removesuffix(opening), opening) if literal.endswith(opening) else (literal, "")

    def _before_the_gap(self, close: str) -> tuple[str, str]:
        """A literal without the spaces at its end, and these: they belong to the answer's first token (`[/INST] yes`),
        and a prompt that ended with them would be tokenised in another way."""
        text = close.rstrip(self._gap)
        return text, close[len(text) :]

    def _find_ending(self) -> str:
        """What the template writes from an answer to the special token that ends it; empty where it writes none, so
        that EOS must be put there for the model to learn to stop."""
        after = self._cut_opening(self._literals(2)[2])[0]
        found = self._special.search(after)
        if found is None and not self.tokenizer.eos_token:
            raise UserError("the tokenizer's chat template ends no answer, and there is no EOS token to do it; set one")
        return after[: found.end()] if found else ""

    @property
    def _added_bos(self) -> str:
        """The BOS that the tokenizer puts before any text, which the template must not write, too."""
        return "".join(self.tokenizer.convert_ids_to_tokens(self.rules.bos))

    def _literals(self, turns: int) -> list[str]:
        """The 2 * turns + 1 pieces of template text around the questions and answers of a conversation."""
        if turns not in self._literals_of:
            names = [f"{role}{k}" for k in range(turns) for role in ("question", "answer")]
            self._literals_of[turns] = self._render_around(names, ["user", "assistant"] * turns)
        return self._literals_of[turns]

    def _render_around(self, names: list[str], roles: list[str], generate: bool = False) -> list[str]:
        contents = [f"c{secrets.token_hex(6)}{name}" for name in names]
        text = self._render(contents, roles, generate).removeprefix(self._added_bos)
        pieces = []
        for name, content in zip(names, contents, strict=True):
            before, found, text = text.partition(content)
            if not found:
                raise UserError(f"the tokenizer's chat template drops or reorders the {name}; set llm.template=v1")
            pieces.append(before)
        return [*pieces, text]

    def _render(self, contents: list[str], roles: list[str], generate: bool = False) -> str:
        def content(text: str) -> str | list[dict[str, str]]:
            return [{"type": "text", "text": text}] if self._in_parts else text

        messages = [{"role": role, "content": content(text)} for role, text in zip(roles, contents, strict=True)]
        try:
            text = self.tokenizer.apply_chat_template(
                messages, chat_template=self._jinja, tokenize=False, add_generation_prompt=generate
            )
        except Exception as error:  # a template may do anything
            raise UserError(
                f"the tokenizer's chat template cannot be rendered ({error}); set llm.template=v1, or mend it"
            ) from error
        return str(text)

    def _writes(self, in_parts: bool) -> bool:
        self._in_parts, probe = in_parts, f"c{secrets.token_hex(6)}"
        try:
            return self._render([probe, "a"], ["user", "assistant"]).count(probe) == 1
        except UserError:
            return False

    def _find_marks(self) -> Marks | None:
        lead, close, _ = self._literals(1)
        _, first, between, second, _ = self._literals(2)
        generating = self._render_around(["question0"], ["user"], generate=True)[1]
        closes = {self._before_the_gap(text)[0] for text in (close, first, second, generating)}
        common = next(lead[at:] for at in range(len(lead) + 1) if between.endswith(lead[at:]))
        opening = _distinct_suffix(common, closes, self._special)
        if not opening or not all(closes):
            return None
        try:
            system = self._render_around(["system", "question0"], ["system", "user"])[0]
        except UserError:  # the template has no system role
            system = ""
        return Marks(system, opening, tuple(sorted(closes, key=len, reverse=True)))


def _distinct_suffix(text: str, closes: set[str], special: re.Pattern[str]) -> str:
    """The shortest end of `text` that starts at a special token and tells a question from an answer."""
    for match in reversed(list(special.finditer(text))):
        suffix = text[match.start() :]
        if not any(close.endswith(suffix) for close in closes):
            return suffix
    return text if not any(close.endswith(text) for close in closes) else ""
