"""The rendered text of every template, exactly."""

from __future__ import annotations

import json

import pytest
from data.conversations import CHATML, ENDS, MANY, SETUPS, STYLES, V1_SYSTEM, llama2_like, record, styled
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from mmprune_train.data.records import Turn
from mmprune_train.data.templates import get_template
from mmprune_train.errors import UserError
from mmprune_train.model.tokenizer import tiny_tokenizer
from mmprune_train.packed.sequence import Kind


def text(spans: list) -> str:
    return "".join(span.text for span in spans)


def test_v1_is_vicunas_string() -> None:
    turns = record(("What?\n<image>", "A cat."), ("Sure?", "Yes.")).turns
    spans = get_template("v1", tiny_tokenizer()).spans(turns)
    expected = V1_SYSTEM + " USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT: Yes.</s>"
    assert text(spans) == expected
    assert [span.text for span in spans if span.supervised] == [" A cat.</s>", " Yes.</s>"]


def test_plain_drops_the_words_and_trains_on_caption_and_newline() -> None:
    spans = get_template("plain", tiny_tokenizer()).spans([Turn("Describe.\n<image>", "a cat")])
    assert [(span.text, span.supervised) for span in spans] == [("<image>", False), ("a cat\n", True)]


def test_plain_refuses_a_conversation() -> None:
    with pytest.raises(UserError, match="one turn, found 2; use template v1 or chat"):
        get_template("plain", tiny_tokenizer()).spans([Turn("a", "b"), Turn("c", "d")])


@pytest.mark.parametrize("style", [style for style in STYLES if style not in ("parts", "named", "opened")])
def test_chat_is_the_tokenizers_own_template_up_to_the_last_end_of_turn(style: str) -> None:
    tokenizer = styled(style)
    turns = record(("<image>\nWhat?", "A cat."), ("Sure?", "Yes."), ("OK", "Bye")).turns
    messages = [m for t in turns for m in ({"role": "user", "content": t.question}, _answer(t))]
    expected = tokenizer.apply_chat_template(messages, tokenize=False)
    expected = expected.removeprefix("<s>") if style in ("headers", "brackets") else expected  # added by the tokenizer
    spans = get_template("chat", tokenizer).spans(turns)
    assert text(spans) == expected.rstrip("\n")
    supervised = [span.text for span in spans if span.supervised]
    end = ENDS.get(style, "</s>")
    assert [s.strip() for s in supervised] == [answer + end for answer in ("A cat.", "Yes.", "Bye")]


@pytest.mark.parametrize("style", ["named", "opened"])
def test_an_answer_that_the_template_does_not_end_ends_with_eos(style: str) -> None:
    turns = record(("What?", "A cat."), ("Sure?", "Yes.")).turns
    template = get_template("chat", styled(style))
    assert [s.text.strip() for s in template.spans(turns) if s.supervised] == ["A cat.</s>", "Yes.</s>"]
    assert template.end == "</s>"


def _answer(turn: Turn) -> dict[str, str]:
    return {"role": "assistant", "content": turn.answer}


def test_the_default_system_text_is_prompt_before_the_first_turn() -> None:
    spans = get_template("chat", styled("chatml")).spans([Turn("q", "a")])
    assert [span.text for span in spans if span.kind == Kind.PROMPT and span.turn == 0] == ["You are helpful."]


@pytest.mark.parametrize("name", SETUPS)
def test_a_prompt_is_the_training_text_up_to_the_answer(name: str) -> None:
    template = get_template(SETUPS[name][0], SETUPS[name][1])
    *history, last = MANY.turns
    spans = template.spans(MANY.turns)
    prompt = template.prompt(last.question, history=history)
    answer = spans[-1].text
    assert spans[-1].supervised and prompt + answer == text(spans)


def test_a_prompt_puts_images_in_front_unless_the_question_places_them() -> None:
    template = get_template("v1", tiny_tokenizer())
    assert template.prompt("What?", n_images=2).endswith("USER: <image>\n<image>\nWhat? ASSISTANT:")
    assert template.prompt("What?\n<image>", n_images=1).endswith("USER: <image>\nWhat? ASSISTANT:")
    assert get_template("plain", tiny_tokenizer()).prompt("Describe.", n_images=1) == "<image>"


def test_unknown_names_get_the_nearest_and_a_missing_chat_template_its_remedy() -> None:
    with pytest.raises(UserError, match="'plan'; did you mean 'plain'"):
        get_template("plan", tiny_tokenizer())
    with pytest.raises(UserError, match=r"set llm\.template=v1"):
        get_template("chat", tiny_tokenizer())


def test_a_chat_template_that_drops_a_message_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(UserError, match=r"drops or reorders the question0"):
        get_template("chat", tokenizer)


def test_a_chat_template_that_fails_in_any_way_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ 1 // 0 }}"
    with pytest.raises(UserError, match=r"cannot be rendered \(.*zero\); set llm\.template=v1"):
        get_template("chat", tokenizer)


def test_of_several_chat_templates_the_default_is_meant() -> None:
    tokenizer = styled("chatml")
    tokenizer.chat_template = {"tools": "{{ 1 }}", "default": CHATML}
    assert get_template("chat", tokenizer).spans(MANY.turns) == get_template("chat", styled("chatml")).spans(MANY.turns)
    tokenizer.chat_template = {"tools": "{{ 1 }}", "rag": CHATML}
    with pytest.raises(UserError, match=r"template chat: .*\['rag', 'tools'\].*name one of them default"):
        get_template("chat", tokenizer)


def test_a_text_that_the_chat_template_rewrites_is_refused() -> None:
    tokenizer = styled("chatml")
    tokenizer.chat_template = CHATML.replace("+ m['content'] +", "+ m['content'].split('</think>')[-1] +")
    template = get_template("chat", tokenizer)
    with pytest.raises(UserError, match=r"drops or rewrites a text that has </think> in it"):
        template.spans([Turn("q", "<think>so</think>yes"), Turn("r", "no")])
    assert text(template.spans([Turn("q <|im_end|>", "<think>")])).endswith("\n<think><|im_end|>")


def test_an_end_that_the_tokenizer_takes_apart_is_refused() -> None:
    parts = json.loads(llama2_like().backend_tokenizer.to_str())
    next(token for token in parts["added_tokens"] if token["content"] == "</s>")["normalized"] = True
    backend = Tokenizer.from_str(json.dumps(parts))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    with pytest.raises(UserError, match=r"does not read </s>, which ends an answer, as one token"):
        get_template("v1", tokenizer)
