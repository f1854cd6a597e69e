"""A server that takes chat requests as vLLM's LLaVA does, and dies as it does, around plain transformers.

What is held against each request, as read in vLLM's sources: an embedding is base64 of a file of torch.save, read as
data, [n, D] of the LLM's width; parts become `{"type": "image"}` for the chat template; the rendered prompt has one
image token for each embedding, which becomes n of them; embeddings that meet in one step have one shape.
"""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration


class Dead(Exception):
    """The engine has ended."""


class Engine:
    def __init__(self, folder: Path, takes_embeds: bool = True) -> None:
        self.hf = LlavaForConditionalGeneration.from_pretrained(folder).eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.takes_embeds = takes_embeds
        self.token = self.hf.config.image_token_id

    def read(self, body: dict[str, Any]) -> tuple[list[int], list[Tensor]]:
        """Ids of the prompt and the embeddings of its image tokens; ValueError for a request that is refused."""
        conversation, embeds = [], []
        for message in body["messages"]:
            content = []
            for part in message["content"]:
                if part["type"] == "image_embeds":
                    embeds.append(self._embedding(part["image_embeds"]))
                content.append({"type": "image"} if part["type"] == "image_embeds" else part)
            conversation.append({"role": message["role"], "content": content})
        text = self.processor.tokenizer.apply_chat_template(
            conversation,
            chat_template=self.processor.chat_template,
            tokenize=False,
            add_generation_prompt=True,
            **body.get("chat_template_kwargs", {}),
        )
        ids = self.processor.tokenizer(text, add_special_tokens=body.get("add_special_tokens", False))["input_ids"]
        if ids.count(self.token) != len(embeds):
            raise ValueError(f"{ids.count(self.token)} placeholders in the prompt for {len(embeds)} items")
        left, grown = list(embeds), []
        for one in ids:
            grown += [self.token] * len(left.pop(0)) if one == self.token else [one]
        return grown, embeds

    def _embedding(self, data: str) -> Tensor:
        if not self.takes_embeds:
            raise ValueError("You must set `--enable-mm-embeds`")
        found = torch.load(io.BytesIO(base64.b64decode(data, validate=True)), weights_only=True)
        if found.ndim != 2 or found.shape[1] != self.hf.config.text_config.hidden_size:
            raise ValueError(f"an embedding of shape {list(found.shape)}")
        return found

    def step(self, requests: Sequence[tuple[list[int], list[Tensor]]]) -> list[Tensor]:
        """Inputs [L, D] of the LLM for requests that were scheduled together."""
        shapes = {tuple(one.shape) for _, embeds in requests for one in embeds}
        if len(shapes) > 1:
            raise Dead(f"image_embeds contains inconsistent shapes: {sorted(shapes)}")
        inputs = []
        for ids, embeds in requests:
            row = torch.tensor(ids)
            states = self.hf.get_input_embeddings()(row.masked_fill(row == self.token, 0)).clone()
            if embeds:
                states[row == self.token] = torch.cat(embeds).to(states.dtype)
            inputs.append(states)
        return inputs

    @torch.no_grad()
    def answer(self, states: Tensor, length: int) -> list[int]:
        """Greedy ids."""
        out, stops = [], self.hf.generation_config.eos_token_id
        for _ in range(length):
            hidden = self.hf.model.language_model(inputs_embeds=states[None]).last_hidden_state
            out.append(int(self.hf.lm_head(hidden[:, -1]).argmax()))
            if out[-1] in (stops if isinstance(stops, list) else [stops]):
                break
            states = torch.cat([states, self.hf.get_input_embeddings()(torch.tensor(out[-1:]))])
        return out


@contextmanager
def serving(engine: Engine) -> Iterator[str]:
    """The address of a server around it, while the context lasts."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                ids, embeds = engine.read(body)
                answer = engine.answer(engine.step([(ids, embeds)])[0], body["max_tokens"])
                text = engine.processor.decode(answer, skip_special_tokens=True)
                message = {"role": "assistant", "content": text}
                code, found = 200, {"choices": [{"message": message}], "usage": {"prompt_tokens": len(ids)}}
            except (ValueError, Dead) as error:
                code, found = (500 if isinstance(error, Dead) else 400), {"error": {"message": str(error)}}
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(found).encode())

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
