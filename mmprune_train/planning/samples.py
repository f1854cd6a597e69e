"""A sample of a stage's data without its images: exact where files and tokenizer are there, else stated assumptions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mmprune_train.config.schema import Config
from mmprune_train.data.batch import Sample, without_pixels
from mmprune_train.data.encode import Example, encode
from mmprune_train.data.records import IMAGE_PLACEHOLDER, Record, read_annotations
from mmprune_train.data.sources import data_root, image_folder
from mmprune_train.data.templates import get_template
from mmprune_train.errors import NotHere
from mmprune_train.model.tokenizer import load_tokenizer
from mmprune_train.model.weights.places import base_folder
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


LLAVA = {
    "pretrain": (Sketch(558_128, 1, 1, 0, 16),),
    "instruct": (
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
    ),
}
"""Samples of LLaVA-1.5's training stages, those of `llava_v1_5_mix665k` part by part, by the sizes its authors publish;
turns and lengths are rough guesses of ours."""
UNKNOWN = (Sketch(1, 1, 1, 20, 40),)


def stage_samples(config: Config, name: str, image_tokens: int, count: int) -> StageSamples:
    """Up to `count` samples of stage `name`, drawn by `config.seed`.

    Args:
        image_tokens: visual tokens of one image.
    Raises:
        UserError: the annotation file is there and holds a malformed sample among those drawn.
    """
    split = config.data.part(name)
    file = data_root(config.data) / Path(split.annotations or "").expanduser()
    if split.annotations and file.is_file():
        return _from_file(config, name, image_tokens, count, file)
    known = config.data.name == "llava_v1_5" and name in LLAVA
    kinds = LLAVA[name] if known else UNKNOWN
    total = sum(kind.size for kind in kinds) if known else None
    what = "LLaVA-1.5's published mix with guessed text lengths" if known else "one image, 20 + 40 tokens of text"
    total = split.limit if total is None else min(total, split.limit or total)
    source = f"ASSUMED, the data are not here: {what}"
    template = template_of(config, name)
    made = _made_up(kinds, min(count, ASSUMED), config.seed, template, image_tokens, config.stage[name].max_length)
    return StageSamples(made, total, total, source)


def _from_file(config: Config, name: str, image_tokens: int, count: int, file: Path) -> StageSamples:
    split, stage = config.data.part(name), config.stage[name]
    records = read_annotations(file, image_folder(config.data, name), split.limit).records
    drawn = random.Random(config.seed).sample(records, min(count, len(records)))
    images = len({path for record in records for path in record.images})
    template, tokenizer = template_of(config, name), _tokenizer(config, name)
    many = f"{len(drawn)} of {len(records)} samples"
    if tokenizer is None:
        source = f"{many}; text ESTIMATED at {CHARACTERS_PER_TOKEN:g} characters a token: the tokenizer is not here"
        made = [_sketched(record, template, image_tokens, stage.max_length) for record in drawn]
        return StageSamples(made, len(records), images, source)
    rendering = get_template(template, tokenizer)
    examples = [encode(record, rendering, tokenizer, image_tokens, stage.max_length) for record in drawn]
    samples = [without_pixels(example, record.images) for example, record in zip(examples, drawn, strict=True)]
    cut = sum(example.truncated > 0 for example in examples)
    told = f"; max_length={stage.max_length} cuts {cut} of them" if cut else ""
    return StageSamples(samples, len(records), images, f"{many}, tokenised{told}")


def _tokenizer(config: Config, name: str) -> Any:
    """Of what stage `name` starts from, or of the LLM, where it is here; None: it would have to be downloaded."""
    try:
        asked = first_start(config, name)
        folder = locate(*asked, download=False).tokenizer if asked else None
        return load_tokenizer(folder or base_folder(config.llm, download=False))
    except NotHere:
        return None


def _sketched(record: Record, template: str, image_tokens: int, max_length: int) -> Sample:
    turns = []
    for turn in record.turns:
        texts = turn.question.replace(IMAGE_PLACEHOLDER, ""), turn.answer
        question, answer = (round(len(text) / CHARACTERS_PER_TOKEN) for text in texts)
        turns.append((turn.question.count(IMAGE_PLACEHOLDER), question, answer))
    return without_pixels(_example(record.id, turns, template, image_tokens, max_length), record.images)


def _made_up(
    kinds: Sequence[Sketch], count: int, seed: int, template: str, image_tokens: int, max_length: int
) -> list[Sample]:
    """Samples of each kind in its share, their texts' lengths spread by a factor of e^0.5 either way."""
    chance = random.Random(seed)
    samples = []
    for number in range(count):
        kind = chance.choices(kinds, [kind.size for kind in kinds])[0]

        def around(mean: int) -> int:
            return round(mean * chance.lognormvariate(-0.125, 0.5))

        turns = [(kind.images * (k == 0), around(kind.question), around(kind.answer)) for k in range(kind.turns)]
        paths = [Path(f"{number}-{image}") for image in range(kind.images)]
        samples.append(without_pixels(_example(str(number), turns, template, image_tokens, max_length), paths))
    return samples


def _example(
    name: str, turns: Sequence[tuple[int, int, int]], template: str, image_tokens: int, max_length: int
) -> Example:
    """A sample whose tokens have kinds and no meaning; turns of (images, question's, answer's tokens)."""
    kinds, numbers = [Kind.SPECIAL], [0]

    def add(kind: Kind, count: int, turn: int) -> None:
        kinds.extend([kind] * count)
        numbers.extend([turn] * count)

    plain = template == "plain"
    if not plain:
        add(Kind.PROMPT, SYSTEM, 0)
    for k, (images, question, answer) in enumerate(turns, 1):
        if plain:
            add(Kind.VISUAL, images * image_tokens, k)
        else:
            add(Kind.SPECIAL, ROLE, k)
            for _ in range(images):
                add(Kind.VISUAL, image_tokens, k)
                add(Kind.SPECIAL, 1, k)
            add(Kind.PROMPT, question, k)
            add(Kind.SPECIAL, ROLE, k)
        add(Kind.ANSWER, answer + 1, k)
    kind = torch.tensor([int(k) for k in kinds[:max_length]])
    ids = torch.zeros_like(kind)
    labels = torch.where(kind == Kind.ANSWER, ids, IGNORE)
    n_images = int((kind == Kind.VISUAL).sum()) // image_tokens
    return Example(name, ids, kind, torch.tensor(numbers[:max_length]), labels, n_images)
