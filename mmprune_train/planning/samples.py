"""A sample of a stage's data without its images: exact where files and tokenizer are there, else stated assumptions."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mmprune_train.config.schema import Config
from mmprune_train.data.batch import Sample
from mmprune_train.data.encode import Example, encode
from mmprune_train.data.records import IMAGE_PLACEHOLDER, Turn, read_records
from mmprune_train.data.sources import data_root, image_folder
from mmprune_train.data.templates import get_template
from mmprune_train.errors import NotHere
from mmprune_train.model.tokenizer import load_tokenizer
from mmprune_train.model.weights.places import llm_folder
from mmprune_train.model.weights.start import first_start, locate
from mmprune_train.pruning import IGNORE, Kind
from mmprune_train.training.inputs import template_of

CHARACTERS_PER_TOKEN = 4.0
"""Of English text, where no tokenizer is at hand: a rule of thumb."""
SYSTEM, ROLE = 35, 5
"""Tokens of a system text and of a role's marker, where no tokenizer is at hand."""
ASSUMED = 512
"""Samples that are made up where there is no file, at most."""


@dataclass(frozen=True)
class StageSamples:
    """What a stage's samples look like."""

    samples: list[Sample]
    """Without pixels."""
    total: int | None
    """Samples of the whole stage; None: not known."""
    images: int | None
    """Different images of the whole stage; None: not known."""
    source: str
    """Where the lengths come from, in words."""


class Sketch(NamedTuple):
    """Samples of one kind, made up."""

    size: int
    """Published number of samples."""
    images: int
    turns: int
    question: int
    """Tokens."""
    answer: int


LLAVA_PRETRAIN = (Sketch(558_128, 1, 1, 0, 16),)
LLAVA_INSTRUCT = (
    Sketch(57_669, 1, 4, 14, 60),  # LLaVA's conversations
    Sketch(23_240, 1, 1, 14, 110),  # its descriptions
    Sketch(76_803, 1, 1, 22, 130),  # its reasoning
    Sketch(40_688, 0, 5, 60, 260),  # ShareGPT
    Sketch(82_783, 1, 5, 16, 3),  # VQAv2
    Sketch(72_140, 1, 13, 18, 3),  # GQA
    Sketch(8_998, 1, 1, 18, 3),  # OKVQA
    Sketch(80_000, 1, 5, 18, 6),  # OCR-VQA
    Sketch(66_160, 1, 1, 60, 2),  # A-OKVQA
    Sketch(21_953, 1, 1, 60, 14),  # TextCaps
    Sketch(48_447, 1, 8, 24, 20),  # RefCOCO
    Sketch(86_417, 1, 9, 24, 20),  # Visual Genome
)
"""The parts of `llava_v1_5_mix665k` by the sizes its authors publish; turns and lengths are rough guesses of ours."""
UNKNOWN = (Sketch(1, 1, 1, 20, 40),)


Shape = tuple[str, list[tuple[int, int, int]], Sequence[Path]]
"""A sample's name, the (images, question's tokens, answer's tokens) of its turns, and its images."""


def stage_samples(config: Config, name: str, image_tokens: int, count: int) -> StageSamples:
    """Up to `count` samples of stage `name`, drawn by `config.seed`.

    Args:
        image_tokens: visual tokens of one image.
    Raises:
        UserError: the annotation file is there and holds a malformed sample among those drawn.
    """
    split = getattr(config.data, name)
    file = data_root(config.data) / Path(split.annotations or "").expanduser()
    if split.annotations and file.is_file():
        return _from_file(config, name, image_tokens, count, file)
    kinds: Sequence[Sketch] = UNKNOWN
    total, what = split.limit, "one image, 20 + 40 tokens of text"
    if config.data.name == "llava_v1_5":
        kinds = LLAVA_PRETRAIN if name == "pretrain" else LLAVA_INSTRUCT
        published = sum(kind.size for kind in kinds)
        total, what = min(published, split.limit or published), "LLaVA-1.5's published mix with guessed text lengths"
    made = _without_texts(config, name, image_tokens, _made_up(kinds, min(count, ASSUMED), config.seed))
    return StageSamples(made, total, total, f"ASSUMED, the data are not here: {what}")


def _from_file(config: Config, name: str, image_tokens: int, count: int, file: Path) -> StageSamples:
    split, max_length = getattr(config.data, name), config.stage[name].max_length
    records = read_records(file, image_folder(config.data, name), split.limit)
    drawn = random.Random(config.seed).sample(records, min(count, len(records)))
    images = len({path for record in records for path in record.images})
    source, tokenizer = f"{len(drawn)} of {len(records)} samples", _tokenizer(config, name)
    if tokenizer is None:
        source += f"; text ESTIMATED at {CHARACTERS_PER_TOKEN:g} characters a token: the tokenizer is not here"
        shapes = ((record.id, [_estimated(turn) for turn in record.turns], record.images) for record in drawn)
        return StageSamples(_without_texts(config, name, image_tokens, shapes), len(records), images, source)
    template = get_template(template_of(config, name), tokenizer)
    examples = [encode(record, template, tokenizer, image_tokens, max_length) for record in drawn]
    samples = [_without_pixels(example, record.images) for example, record in zip(examples, drawn, strict=True)]
    cut = sum(example.truncated > 0 for example in examples)
    source += ", tokenised" + (f"; max_length={max_length} cuts {cut} of them" if cut else "")
    return StageSamples(samples, len(records), images, source)


def _tokenizer(config: Config, name: str) -> Any:
    """Of what stage `name` starts from, or of the LLM, where it is here; None: it would have to be downloaded."""
    try:
        asked = first_start(config, name)
        folder = locate(*asked, download=False).tokenizer if asked else None
        return load_tokenizer(folder or llm_folder(config.llm, download=False))
    except NotHere:
        return None


def _without_pixels(example: Example, images: Sequence[Path]) -> Sample:
    paths = list(images)[: example.n_images]
    return Sample(example, paths, [torch.empty(0)] * len(paths))


def _estimated(turn: Turn) -> tuple[int, int, int]:
    text = turn.question.replace(IMAGE_PLACEHOLDER, "")
    images = turn.question.count(IMAGE_PLACEHOLDER)
    return images, round(len(text) / CHARACTERS_PER_TOKEN), round(len(turn.answer) / CHARACTERS_PER_TOKEN)


def _made_up(kinds: Sequence[Sketch], count: int, seed: int) -> Iterator[Shape]:
    """Samples of each kind in its proportion, their texts' lengths varied by a factor of e^0.5 either way."""
    chance = random.Random(seed)

    def varied(mean: int) -> int:
        return round(mean * chance.lognormvariate(-0.125, 0.5))

    for number in range(count):
        kind = chance.choices(kinds, [kind.size for kind in kinds])[0]
        turns = [(kind.images * (k == 0), varied(kind.question), varied(kind.answer)) for k in range(kind.turns)]
        yield str(number), turns, [Path(f"{number}-{image}") for image in range(kind.images)]


def _without_texts(config: Config, name: str, image_tokens: int, shapes: Iterable[Shape]) -> list[Sample]:
    """Samples of stage `name` whose tokens have kinds and no meaning."""
    plain, max_length = template_of(config, name) == "plain", config.stage[name].max_length
    samples = []
    for told, turns, paths in shapes:
        tokens = [(Kind.SPECIAL, 0)] + [(Kind.PROMPT, 0)] * (0 if plain else SYSTEM)
        for k, (images, question, answer) in enumerate(turns, 1):
            if plain:
                tokens += [(Kind.VISUAL, k)] * images * image_tokens
            else:
                role = [(Kind.SPECIAL, k)] * ROLE
                seen = ([(Kind.VISUAL, k)] * image_tokens + [(Kind.SPECIAL, k)]) * images
                tokens += [*role, *seen, *[(Kind.PROMPT, k)] * question, *role]
            tokens += [(Kind.ANSWER, k)] * (answer + 1)
        kind, turn = torch.tensor(tokens[:max_length]).unbind(1)
        ids = torch.zeros_like(kind)
        labels = torch.where(kind == Kind.ANSWER, ids, IGNORE)
        n_images = int((kind == Kind.VISUAL).sum()) // image_tokens
        samples.append(_without_pixels(Example(told, ids, kind, turn, labels, n_images), paths))
    return samples
