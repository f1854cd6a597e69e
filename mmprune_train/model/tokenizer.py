"""Tokenizers: the LLM's own, or a small built-in one that needs no download; and the image token in either."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mmprune_train.errors import UserError
from mmprune_train.model.weights.auto import tokenizer_of
from mmprune_train.model.weights.outline import no_report
from mmprune_train.storage.user_files import reason_of

IMAGE_TOKEN = "<image>"
VOCABULARY = 512

_CORPUS = """
A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and
polite answers to the user's questions. USER: ASSISTANT: What is the color of the shape? what color is the circle? what
shape is in the image? what shape does the image contain? is there a red shape in the image? is no blue rectangle
present? is there not a green triangle in the image? does the image not contain a yellow shape? does the image contain
a teal shape? a black circle a gray rectangle a brown triangle yes no Describe this picture in a few words. Where is
the person standing, and what are they holding in their hand? How many of these things can be seen in the photograph?
The picture shows a small animal sitting on the grass in front of a house with a door and some windows. There are
several people walking along the street with an umbrella. This one is on the left, that one on the right, and another
behind both of them. 0 1 2 3 4 5 6 7 8 9 10 100 1000 one two three four five six seven eight nine ten
"""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 512 entries, the same on every machine: ids 0..3 are `<pad> <s> </s> <image>`, BOS is added.

    Trained in a moment on a text in this file, so that tests and smoke runs need no download.
    """
    specials = ["<pad>", "<s>", "</s>", IMAGE_TOKEN]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=1,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in specials],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(_CORPUS.split())], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
        model_max_length=1 << 20,
    )


def load_tokenizer(folder: Path | None, key: str = "llm.path") -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, or the built-in one for None; with a padding token and the image token.

    `key` is what gave the folder. Raises UserError where only a slow tokenizer exists: labels come from character
    offsets, which it does not give.
    """
    try:
        with no_report():
            tokenizer = tiny_tokenizer() if folder is None else tokenizer_of(folder)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    except Exception as error:  # a damaged file is answered by any kind
        raise UserError(
            f"{key}: {folder} has no tokenizer that loads ({type(error).__name__}: {reason_of(error)}); copy its "
            "tokenizer files there again"
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"{key}: {folder} has no fast tokenizer; add a tokenizer.json (save_pretrained of a fast one)")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    add_image_token(tokenizer)
    return tokenizer


def add_image_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Make `<image>` one special token of `tokenizer` (in place) and return its id, which may be a new last one."""
    known = tokenizer.get_vocab().get(IMAGE_TOKEN)
    if known is None or tokenizer.encode(IMAGE_TOKEN, add_special_tokens=False) != [known]:
        tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    return int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
