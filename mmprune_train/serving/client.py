"""Questions to an OpenAI-compatible server, images as embeddings of the visual tokens that stage 1 keeps."""

from __future__ import annotations

import base64
import io
import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmprune_train.data.images import read_image
from mmprune_train.errors import UserError
from mmprune_train.serving.vision_side import VisionSide

Picture = str | Path | Image.Image


@dataclass(frozen=True)
class Answer:
    """What the server answered."""

    text: str
    visual_tokens: list[int]
    """Of each image."""
    prompt_tokens: int | None
    """As the server counted them."""


class Client:
    """Asks a model that vLLM serves with `--enable-mm-embeds`; see docs/serving.md.

    Args:
        vision: what runs here.
        url: of the server, up to and with `/v1`.
        model: the name under which it serves.
        api_key: where it wants one.
        piece: visual tokens of an embedding that is sent. vLLM ends when images of different lengths meet in one step,
            so all are cut into pieces of one length; 1 fits any number. None: an image is one piece, for pruners that
            keep equally many of every image.
        timeout: seconds to wait for an answer.
    """

    def __init__(
        self,
        vision: VisionSide,
        url: str,
        model: str,
        api_key: str | None = None,
        piece: int | None = 1,
        timeout: float = 600,
    ) -> None:
        self.vision = vision
        self.url = url.rstrip("/")
        self.model = model
        self.api_key = api_key
        self.piece = piece
        self.timeout = timeout

    def ask(self, question: str, images: Sequence[Picture] = (), **options: Any) -> Answer:
        """One question about some images; `options` as in `chat`."""
        parts: list[dict[str, str]] = [{"type": "image"}] * len(images) + [{"type": "text", "text": question}]
        return self.chat([{"role": "user", "content": parts}], images, **options)

    def chat(self, messages: Sequence[Mapping[str, Any]], images: Sequence[Picture] = (), **options: Any) -> Answer:
        """The answer to a conversation.

        Args:
            messages: with `role` and `content`, a text or a list of `{"type": "image"}` and text parts.
            images: files or pictures, in the order of their parts.
            options: of the request: `max_tokens`, `temperature`, `stop`, ...
        Raises:
            UserError: images and their parts do not match; no server answers, or it refuses, or its answer is no chat
                completion, or it counts other tokens than were sent.
        """
        return self._post(*self.request(messages, images, **options))

    def request(
        self, messages: Sequence[Mapping[str, Any]], images: Sequence[Picture] = (), **options: Any
    ) -> tuple[dict[str, Any], list[int]]:
        """The body of the request, and the visual tokens of each image."""
        asked = [_text_of(message) for message in messages for part in _parts(message) if part["type"] == "image"]
        if len(asked) != len(images):
            raise UserError(f"{len(images)} images are given, and the messages have parts for {len(asked)} of them")
        embedded = self.vision.embed([self._picture(image) for image in images], asked)
        pieces = [one.split(self._length(len(one))) for one in embedded]
        left, sent = list(pieces), []
        for message in messages:
            content: list[dict[str, Any]] = []
            for part in _parts(message):
                content += [_part(piece) for piece in left.pop(0)] if part["type"] == "image" else [dict(part)]
            sent.append({"role": message["role"], "content": content})
        body = {
            "model": self.model,
            "messages": sent,
            "add_special_tokens": True,  # the chat template leaves BOS to the tokenizer
            "chat_template_kwargs": {"image_pieces": [len(one) for one in pieces]},
            **options,
        }
        return body, [len(one) for one in embedded]

    def _length(self, tokens: int) -> int:
        if self.piece is None:
            return tokens
        if tokens % self.piece:
            raise UserError(
                f"piece={self.piece}: stage 1 kept {tokens} visual tokens, which are no multiple of it; take piece=1, "
                "or a pruner whose budget is one"
            )
        return self.piece

    def _picture(self, image: Picture) -> Image.Image:
        if isinstance(image, Image.Image):
            return image.convert("RGB")
        return read_image(image, orientation=getattr(self.vision.processor.image_processor, "exif_orientation", True))

    def _post(self, body: dict[str, Any], tokens: list[int]) -> Answer:
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                told = reply.read().decode(errors="replace")
        except urllib.error.HTTPError as error:
            refused = error.read().decode(errors="replace")[:300]
            raise UserError(f"{self.url} refuses the request ({error.code}): {refused}") from None
        except (urllib.error.URLError, TimeoutError) as error:
            raise UserError(f"{self.url} does not answer ({getattr(error, 'reason', error)}); serve it there") from None
        try:
            found = json.loads(told)
            text = str(found["choices"][0]["message"]["content"] or "")
            counted = (found.get("usage") or {}).get("prompt_tokens")
        except (ValueError, LookupError, TypeError, AttributeError):
            raise UserError(
                f"{self.url} answers with something else than a chat completion: {told[:300]!r}; give the address of "
                "an OpenAI-compatible server, up to and with /v1"
            ) from None
        if counted is not None and counted <= sum(tokens):
            raise UserError(
                f"{self.url} read a prompt of {counted} tokens, and {sum(tokens)} visual tokens were sent: it does not "
                "take image_embeds; serve with --enable-mm-embeds"
            )
        return Answer(text, tokens, counted)


def _parts(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    if other := [part["type"] for part in parts if part["type"] not in ("image", "text")]:
        raise UserError(f"a message has a part of type {other[0]!r}; give text, and image for each of the images")
    return parts


def _text_of(message: Mapping[str, Any]) -> str:
    """What a turn asks, which a stage 1 that reads the question is shown."""
    return "".join(part["text"] for part in _parts(message) if part["type"] == "text")


def _part(embeds: Tensor) -> dict[str, str]:
    """[n, D] as vLLM reads it: the bytes of `torch.save`, in base64."""
    buffer = io.BytesIO()
    torch.save(embeds.detach().cpu().clone(), buffer)
    return {"type": "image_embeds", "image_embeds": base64.b64encode(buffer.getvalue()).decode()}
