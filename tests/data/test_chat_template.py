"""The chat template of a saved folder: what plain transformers asks with it is what was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data.conversations import MANY, SETUPS, record, styled
from PIL import Image
from transformers import AutoProcessor, LlavaProcessor

from mmprune_train.config.schema import EncoderConfig
from mmprune_train.data.encode import Example, encode
from mmprune_train.data.images import image_processor
from mmprune_train.data.records import Turn
from mmprune_train.data.templates import ChatTemplate, get_template, template_name
from mmprune_train.errors import UserError
from mmprune_train.model.tokenizer import tiny_tokenizer
from mmprune_train.packed.sequence import IGNORE

PATCHES = 4  # 16 pixels in patches of 8


@pytest.fixture(scope="module", params=SETUPS)
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """The name of a template and tokenizer, and the processor that transformers loads from what is saved of them."""
    name, tokenizer = SETUPS[request.param]
    processor = LlavaProcessor(
        image_processor=image_processor(EncoderConfig(image_size=16, patch_size=8), "square"),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template(name, tokenizer).chat_template,
    )
    folder = tmp_path_factory.mktemp("folder")
    processor.save_pretrained(folder)
    return request.param, AutoProcessor.from_pretrained(folder)


def chat_template(name: str, tokenizer: Any) -> ChatTemplate:
    template = get_template(name, tokenizer)
    assert isinstance(template, ChatTemplate)
    return template


def trained(name: str, turns: list[Turn]) -> Example:
    template, tokenizer = SETUPS[name]
    sample = record(*((turn.question, turn.answer) for turn in turns))
    return encode(sample, get_template(template, tokenizer), tokenizer, PATCHES, 4096)


def asked(processor: Any, messages: list[dict[str, Any]]) -> list[int]:
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    images = [Image.new("RGB", (20, 16), "red")] * text.count("<image>")
    return processor(images=images or None, text=[text], return_tensors="pt")["input_ids"][0].tolist()


def messages_of(turns: list[Turn]) -> list[dict[str, Any]]:
    both = [({"role": "user", "content": t.question}, {"role": "assistant", "content": t.answer}) for t in turns]
    return [message for pair in both for message in pair]


@pytest.mark.parametrize("turns", [1, 2, 3, 4])
def test_what_is_asked_is_what_was_trained_up_to_the_answer(setup: tuple[str, Any], turns: int) -> None:
    name, processor = setup
    example = trained(name, MANY.turns[:turns])
    answer = int((example.labels != IGNORE).nonzero()[(example.turn[example.labels != IGNORE] == turns).nonzero()[0]])
    assert asked(processor, messages_of(MANY.turns[:turns])[:-1]) == example.ids[:answer].tolist()


def test_lists_of_parts_are_asked_as_strings_are(setup: tuple[str, Any]) -> None:
    _, processor = setup
    image, words = {"type": "image"}, {"type": "text", "text": "what color?"}
    as_text = asked(processor, [{"role": "user", "content": "<image>\nwhat color?"}])
    assert asked(processor, [{"role": "user", "content": [image, words]}]) == as_text
    assert asked(processor, [{"role": "user", "content": [words, image]}]) == as_text
    two = [
        {"role": "user", "content": [image, image, {"type": "text", "text": "what "}, {"type": "text", "text": "?"}]}
    ]
    assert asked(processor, two) == asked(processor, [{"role": "user", "content": "<image><image> what ? "}])


def test_the_processors_own_call_of_the_template_gives_the_same(setup: tuple[str, Any]) -> None:
    _, processor = setup
    message = {"role": "user", "content": "what color?"}
    ids = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=True, return_dict=True)
    assert list(ids["input_ids"][0]) == asked(processor, [message])


def test_the_template_is_known_again_and_is_saved_again_unchanged(setup: tuple[str, Any]) -> None:
    name, processor = setup
    template, tokenizer = SETUPS[name]
    assert template_name(processor.chat_template) == template
    again = chat_template(template, processor.tokenizer)
    assert again.chat_template == processor.chat_template
    before, after = get_template(template, tokenizer).spans(MANY.turns), again.spans(MANY.turns)
    assert [(s.text, s.supervised) for s in before] == [(s.text, s.supervised) for s in after]


def test_a_system_message_stands_where_the_template_puts_it() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}]
    v1, chat = chat_template("v1", tiny_tokenizer()), chat_template("chat", styled("chatml"))
    for template, expected in (
        (v1, "Be brief. USER: What? ASSISTANT:"),
        (chat, "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"),
    ):
        text = template.tokenizer.apply_chat_template(
            messages, chat_template=template.chat_template, tokenize=False, add_generation_prompt=True
        )
        assert text == expected


def test_what_the_model_cannot_read_is_refused() -> None:
    saved = chat_template("v1", tiny_tokenizer()).chat_template
    video = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "what?"}]}]
    with pytest.raises(Exception, match="images and text, not video"):
        tiny_tokenizer().apply_chat_template(video, chat_template=saved, tokenize=False)


def test_another_template_than_the_saved_one_is_not_taken_for_the_tokenizers_own(tmp_path: Path) -> None:
    tokenizer = styled("chatml")
    tokenizer.chat_template = chat_template("v1", tokenizer).chat_template
    with pytest.raises(UserError, match="was saved with template v1"):
        get_template("chat", tokenizer)


def test_no_wrong_answers_are_marked_where_a_template_marks_them(setup: tuple[str, Any]) -> None:
    messages = messages_of(MANY.turns[1:2])
    found = setup[1].apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
    )
    assert not found["assistant_masks"].any()
