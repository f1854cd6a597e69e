"""The built-in tokenizer and the image token."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mmprune_train.model.tokenizer import add_image_token, load_tokenizer, tiny_tokenizer


def test_the_vocabulary_never_changes() -> None:
    """Saved tiny models would read other text with another one."""
    vocabulary = sorted(tiny_tokenizer().get_vocab().items())
    digest = hashlib.sha256(str(vocabulary).encode()).hexdigest()
    assert digest == "acac3b1843f228ea8af01f73d5388f132ed80ecc5839070de559cf86327f8f65"


def test_special_ids_bos_and_any_text_comes_back() -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<s>", "</s>", "<image>"]) == [0, 1, 2, 3]
    assert len(tokenizer) == 512
    text = "USER: <image>\nWie heißt das? 日本 🙂</s>"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == 1 and ids.count(3) == 1 and ids[-1] == 2
    assert tokenizer.decode(ids) == "<s>" + text


def test_it_survives_saving_as_a_hugging_face_folder(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "USER: <image>\nWhat is this? ASSISTANT: a red shape</s>"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert add_image_token(again) == 3 and len(again) == 512


def test_the_image_token_is_added_once_and_is_never_split() -> None:
    tokenizer = tiny_tokenizer()
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
    assert add_image_token(plain) == add_image_token(plain) == 3
    assert plain("x<image>y", add_special_tokens=False)["input_ids"].count(3) == 1


def test_an_image_token_that_is_an_ordinary_word_of_the_vocabulary_becomes_one_token() -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<": 1, "image": 2, ">": 3, "<image>": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    assert tokenizer("<image>")["input_ids"] == [1, 2, 3]
    assert add_image_token(tokenizer) == 4 and len(tokenizer) == 5
    assert tokenizer("image<image>")["input_ids"] == [2, 4]


def test_a_loaded_tokenizer_can_pad() -> None:
    assert load_tokenizer(None).pad_token_id == 0
