"""What a tokenizer adds, which of its tokens are special, and the exact bytes behind every token."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase


def bos_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that `tokenizer(text)` puts in front on its own: [bos] or nothing. Never an EOS at the end."""
    ids = tokenizer("")["input_ids"]
    return [ids[0]] if ids and ids[0] == tokenizer.bos_token_id else []


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """id -> text of every special token: BOS, EOS, padding, turn marks, the image token."""
    return {int(id): token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}


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
        self._byte_level = "ByteLevel" in _types(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"])
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
            table = _byte_of_character()
            return bytes(table[character] for character in token)
        if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token):
            return bytes([int(match[1], 16)])
        return str(token).replace("\u2581", " ").encode()


def _types(decoder: Any) -> set[str]:
    if not decoder:
        return set()
    return {decoder["type"]}.union(*(_types(inner) for inner in decoder.get("decoders", [])))


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes, read backwards."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}
