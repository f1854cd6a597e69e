"""Answers are read off finite logits, or there are none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import packed, tiny_llava

from mmprune_train.errors import NotFinite
from mmprune_train.evaluation.generate import answer
from mmprune_train.evaluation.questions import Question


class Processor:
    """Ids for each question, by its text."""

    tokenizer = SimpleNamespace(padding_side="left")
    image_processor = None

    def __call__(self, text: list[str], **_: Any) -> Any:
        ids = torch.tensor([[1, 5, 6, int(each)] for each in text])

        class Inputs(dict):
            def to(self, device: object) -> Any:
                return self

        return Inputs(input_ids=ids, attention_mask=torch.ones_like(ids))

    def batch_decode(self, ids: torch.Tensor, **_: Any) -> list[str]:
        return [str(row.tolist()) for row in ids]


def ask(spoil: Any) -> list[Any]:
    model = packed(tiny_llava(), "none").eval()
    spoil(model.hf)
    questions = [Question(f"q{number}", [], str(number), "", "open") for number in (7, 8, 9)]
    template: Any = SimpleNamespace(prompt=lambda question, **_: question)
    return answer(model, Processor(), template, questions, 3, 4, images_of=lambda question: [])


def one_embedding(hf: Any) -> None:
    hf.model.language_model.embed_tokens.weight.data[8] = torch.nan


def head(hf: Any) -> None:
    hf.lm_head.weight.data *= torch.inf


@pytest.mark.parametrize(("spoil", "named"), [(one_embedding, "question q8"), (head, "question q7")])
def test_logits_that_are_not_finite_are_told_not_scored(spoil: Any, named: str) -> None:
    assert len(ask(lambda hf: None)) == 3
    with pytest.raises(NotFinite, match=f"{named}: the model's logits are NaN or infinite.*trainer.precision=fp32"):
        ask(spoil)
