"""Ids, kinds and labels of a conversation, and that reading it back from its ids gives the same."""

from __future__ import annotations

import pytest
import torch
from data.conversations import MANY, SETUPS, STYLES, V1_SYSTEM, record, unknowing

from mmprune_train.data.annotate import Annotator
from mmprune_train.data.encode import Example, encode
from mmprune_train.data.records import Record
from mmprune_train.data.templates import get_template
from mmprune_train.errors import UserError
from mmprune_train.model.tokenizer import tiny_tokenizer
from mmprune_train.packed.sequence import IGNORE, Kind

PATCHES = 5


def encoded(name: str, sample: Record = MANY, max_length: int = 4096) -> Example:
    template, tokenizer = SETUPS[name]
    return encode(sample, get_template(template, tokenizer), tokenizer, PATCHES, max_length)


def words(name: str, example: Example, mask: torch.Tensor) -> str:
    return SETUPS[name][1].decode(example.ids[mask], clean_up_tokenization_spaces=False)


def as_read(name: str, text: str) -> str:
    return text.lower() if "lower-case" in name else text


@pytest.mark.parametrize("name", SETUPS)
def test_ids_are_what_the_tokenizer_makes_of_the_whole_text(name: str) -> None:
    template, tokenizer = SETUPS[name]
    spans = get_template(template, tokenizer).spans(MANY.turns)
    whole = "".join(span.text for span in spans).replace("<image>", "<image>" * PATCHES)
    assert encoded(name).ids.tolist() == tokenizer(whole)["input_ids"]


@pytest.mark.parametrize("name", SETUPS)
def test_labels_are_the_answers_and_their_ends_and_nothing_else(name: str) -> None:
    example = encoded(name)
    trained = example.labels != IGNORE
    assert torch.equal(example.labels[trained], example.ids[trained])
    assert torch.equal(trained, example.kind == Kind.ANSWER)
    end = SETUPS[name][1].decode(example.ids[-1:])
    for k, turn in enumerate(MANY.turns, 1):
        assert words(name, example, trained & (example.turn == k)).strip() == as_read(name, turn.answer) + end


@pytest.mark.parametrize("name", SETUPS)
def test_question_words_and_only_they_are_prompt_text_of_their_turn(name: str) -> None:
    example = encoded(name)
    prompt = example.kind == Kind.PROMPT
    found = [words(name, example, prompt & (example.turn == k)).strip() for k in range(1, 5)]
    assert found == [as_read(name, "What is this?"), as_read(name, "Is it red?"), "and", ""]
    system = V1_SYSTEM if name.startswith("v1") else "You are helpful." if name.startswith("chatml") else ""
    assert words(name, example, prompt & (example.turn == 0)).strip() == as_read(name, system)


@pytest.mark.parametrize("name", SETUPS)
def test_images_are_expanded_in_the_turn_they_stand_in(name: str) -> None:
    example = encoded(name)
    visual = example.kind == Kind.VISUAL
    assert torch.bincount(example.turn[visual], minlength=5).tolist() == [0, 2 * PATCHES, 0, PATCHES, PATCHES]
    assert example.n_images == 4
    image = SETUPS[name][1].convert_tokens_to_ids("<image>")
    assert torch.equal(visual, example.ids == image)


@pytest.mark.parametrize("name", SETUPS)
def test_reading_the_ids_back_gives_the_same_kinds_and_turns(name: str) -> None:
    template, tokenizer = SETUPS[name]
    annotator = Annotator(get_template(template, tokenizer), tokenizer, tokenizer.convert_tokens_to_ids("<image>"))
    example = encoded(name)
    kind, turn = annotator(example.ids)
    assert torch.equal(kind, example.kind) and torch.equal(turn, example.turn)


@pytest.mark.parametrize("turns", [1, 2, 3, 4])
@pytest.mark.parametrize("name", SETUPS)
def test_a_prompt_as_the_processor_tokenises_it_is_read_as_in_training(name: str, turns: int) -> None:
    template_name, tokenizer = SETUPS[name]
    template = get_template(template_name, tokenizer)
    *history, last = MANY.turns[:turns]
    text = template.prompt(last.question, history=history).replace("<image>", "<image>" * PATCHES)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    annotator = Annotator(template, tokenizer, tokenizer.convert_tokens_to_ids("<image>"))
    kind, turn = annotator(ids)
    sample = record(*((t.question, t.answer) for t in MANY.turns[:turns]))
    example = encoded(name, sample)
    assert torch.equal(ids, example.ids[: len(ids)])
    assert torch.equal(kind, example.kind[: len(ids)])
    assert torch.equal(turn, example.turn[: len(ids)])


@pytest.mark.parametrize("name", ["v1", "v1-sentencepiece"])
def test_a_hand_written_prompt_without_system_text(name: str) -> None:
    template, tokenizer = SETUPS[name]
    annotator = Annotator(get_template(template, tokenizer), tokenizer, tokenizer.convert_tokens_to_ids("<image>"))
    ids = torch.tensor(tokenizer("USER: " + "<image>" * PATCHES + "\nWhat is this? ASSISTANT:")["input_ids"])
    kind, turn = annotator(ids)
    assert tokenizer.decode(ids[kind == Kind.PROMPT]).strip() == "What is this?"
    assert int((kind == Kind.VISUAL).sum()) == PATCHES
    assert kind[0] == kind[-1] == Kind.SPECIAL and turn[0] == 0 and turn[-1] == 1


def test_unknown_words_are_words() -> None:
    tokenizer = unknowing()
    template = get_template("v1", tokenizer)
    example = encode(record(("Is 日 it?", "no 日 yes"), ("it", "no")), template, tokenizer, PATCHES, 4096)
    assert tokenizer.decode(example.ids[(example.kind == Kind.PROMPT) & (example.turn == 1)]) == "Is <unk> it?"
    kind, _ = Annotator(template, tokenizer, tokenizer.convert_tokens_to_ids("<image>"))(example.ids)
    assert torch.equal(kind, example.kind)


@pytest.mark.parametrize("name", [*STYLES, "v1", "llama2"])
def test_white_space_around_an_answer_is_not_trained(name: str) -> None:
    spaced = encoded(name, record(("a", "\n  yes "), ("b", " no\n")))
    assert torch.equal(spaced.labels, encoded(name, record(("a", "yes"), ("b", "no"))).labels)


def test_text_without_markers_is_one_question() -> None:
    template, tokenizer = SETUPS["v1"]
    annotator = Annotator(get_template(template, tokenizer), tokenizer, tokenizer.convert_tokens_to_ids("<image>"))
    ids = torch.tensor(tokenizer("<image>what is it?")["input_ids"])
    kind, turn = annotator(ids)
    assert kind[:2].tolist() == [Kind.SPECIAL, Kind.VISUAL] and turn[:2].tolist() == [0, 1]
    assert set(kind[2:].tolist()) == {Kind.PROMPT} and set(turn[2:].tolist()) == {1}
    assert [len(part) for part in annotator(ids[:0])] == [0, 0]


def test_plain_masks_bos_and_image_and_ends_with_the_newline() -> None:
    tokenizer = tiny_tokenizer()
    example = encode(record(("Describe.\n<image>", "a cat")), get_template("plain", tokenizer), tokenizer, 2, 99)
    assert example.ids[:3].tolist() == [1, 3, 3]
    assert example.kind[:3].tolist() == [Kind.SPECIAL, Kind.VISUAL, Kind.VISUAL]
    assert example.labels[:3].tolist() == [IGNORE] * 3
    assert tokenizer.decode(example.labels[3:]) == "a cat\n"


def test_a_cut_keeps_what_fits_and_counts_the_images_that_are_left() -> None:
    whole = encoded("chatml")
    third = int((whole.turn == 3).nonzero()[0])
    cut = encoded("chatml", max_length=third)
    assert cut.n_images == 2 and torch.equal(cut.ids, whole.ids[:third])
    assert (whole.truncated, cut.truncated) == (0, len(whole.ids) - third)


def test_a_sample_with_nothing_left_to_learn_is_an_error_with_its_id() -> None:
    sample = record(("<image>\n" + "long " * 40, "yes"), name="sample-9")
    with pytest.raises(UserError, match=r"f\.json\[sample-9\] \(id sample-9\): .* exceed max_length=60.*nothing that"):
        encoded("v1", sample, max_length=60)


def test_an_image_cut_in_two_is_an_error_with_its_id() -> None:
    visual = (encoded("v1").kind == Kind.VISUAL).nonzero().squeeze(1)
    with pytest.raises(UserError, match=r"\(id r\).*through an image of 5 tokens.*max_length"):
        encoded("v1", max_length=int(visual[-2]))


def test_a_template_error_names_the_sample() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(UserError, match=r"\(id r\): the plain template takes one turn"):
        encode(MANY, get_template("plain", tokenizer), tokenizer, 2, 99)
