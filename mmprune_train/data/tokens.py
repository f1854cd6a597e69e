"""What a tokenizer adds, which of its tokens are special, and the exact bytes behind every token."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

BYTES = {character: byte for byte, character in bytes_to_unicode().items()}
"""GPT-2's printable stand-in -> the byte that it stands for."""


@dataclass(frozen=True)
class Rules:
    """What a tokenizer does on its own, found once for all samples."""

    bos: list[int]
    """Ids that it puts before a text."""
    special: np.ndarray
    """Ids of its special tokens."""
    greedy: dict[int, str]
    """id -> text of the added tokens that swallow white space beside them, as Phi-3's turn marks do."""


def rules_of(tokenizer: PreTrainedTokenizerBase) -> Rules:
    """Of a tokenizer that is not changed afterwards."""
    added = tokenizer.added_tokens_decoder.items()
    greedy = {int(id): token.content for id, token in added if token.rstrip or token.lstrip}
    return Rules(bos_prefix(tokenizer), np.array(sorted(special_tokens(tokenizer))), greedy)


def bos_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that `tokenizer(text)` puts in front on its own: [bos] or nothing, as a rule. Never an EOS at the end."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    ahead = (n for n in range(len(whole)) if whole[n : n + len(bare)] == bare)
    return list(whole[: next(ahead, 0)])


def add_no_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let `tokenizer(text)` put no EOS behind the text (in place): a prompt that ends is no prompt."""
    if getattr(tokenizer, "add_eos_token", False):
        tokenizer.add_eos_token = False
    if tokenizer("")["input_ids"] == bos_prefix(tokenizer):
        return
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    for processor in _each(parts["post_processor"], "TemplateProcessing", "processors"):
        for form in ("single", "pair"):
            items = processor[form]
            added = [item.get("SpecialToken", {}).get("id") == tokenizer.eos_token for item in items]
            processor[form] = [item for n, item in enumerate(items) if n == 0 or not added[n]]
    tokenizer.backend_tokenizer.post_processor = Tokenizer.from_str(json.dumps(parts)).post_processor


def gap_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The white space that cannot end a prompt: what follows takes spaces into its first token, and some normalisers
    drop line ends, too."""
    bare, ended = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "a\n"))
    return " \n" if bare == ended else " "


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """id -> text of every special token: BOS, EOS, padding, turn marks, the image token. Not of the one that stands for
    an unknown word, unless it is one of them, too."""
    word = {tokenizer.unk_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id}
    added = tokenizer.added_tokens_decoder.items()
    return {int(id): token.content for id, token in added if token.special and id not in word}


def special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches any special token's text; the longest first, as tokenizers do."""
    texts = sorted(special_tokens(tokenizer).values(), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")


class Pieces:
    """Token id -> the UTF-8 bytes it stands for, so that any id sequence can be searched as text.

    `decode` will not do: it cleans spaces and replaces the halves of a character that two tokens share.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._added = {int(id): token.content for id, token in tokenizer.added_tokens_decoder.items()}
        decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"]
        self._byte_level = bool(_each(decoder, "ByteLevel", "decoders"))
        self._known: dict[int, bytes] = {}

    def __call__(self, ids: list[int]) -> list[bytes]:
        for id in set(ids) - self._known.keys():
            self._known[id] = self._bytes(id)
        return [self._known[id] for id in ids]

    def _bytes(self, id: int) -> bytes:
        if id in self._added:
            return self._added[id].encode()
        token = self._tokenizer.convert_ids_to_tokens(id)
        if token is None:
            return b""
        if self._byte_level:
            return bytes(BYTES[character] for character in token)
        if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token):
            return bytes([int(match[1], 16)])
        return str(token).replace("\u2581", " ").encode()


def _each(part: Any, kind: str, inside: str) -> list[dict[str, Any]]:
    """The parts of that type in a tokenizer's description; a sequence of parts holds them under `inside`."""
    if not part:
        return []
    inner = [found for one in part.get(inside, []) for found in _each(one, kind, inside)]
    return [part, *inner] if part["type"] == kind else inner
