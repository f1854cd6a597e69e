"""The question word by word, as the LLM embeds it, where stage 1 compares words with patches."""

from __future__ import annotations

import pytest
import torch
from model.test_question import run, sample
from tiny import PATCHES, packed, tiny_inputs, tiny_llava, words

from mmprune_train import load_model
from mmprune_train.config.compose import compose_config
from mmprune_train.data.batch import collate
from mmprune_train.model.begin import begin
from mmprune_train.model.content_words import content_words
from mmprune_train.model.flops import StepFlops
from mmprune_train.model.question import ImageQuestions
from mmprune_train.pruning import Kind

MMTOK = {"name": "mmtok", "vision": {"knee": {"count": 4}}}


@pytest.mark.parametrize(
    ("question", "left"),
    [
        ("What color is the man's t-shirt?", "color man s t shirt"),
        ("IS it There, or THERE?", "There THERE"),
        ("What is it?", "What is it?"),
        ("Où est l'œuf?", "Où est l œuf"),
        ("", ""),
    ],
)
def test_words_that_no_patch_shows_are_left_out(question: str, left: str) -> None:
    assert content_words(question) == left


def test_each_image_is_given_the_embeddings_of_its_own_question() -> None:
    model = packed(tiny_llava(), MMTOK)
    assert model.question is None, "no text tower"
    questions = [[10, 11, 12], [], [8 + 26 * 3], [40, 105, 41]]  # 105 is "be"
    texts = [words(torch.tensor(ids, dtype=torch.long)) for ids in questions]
    asked = model.ask(ImageQuestions([0, 0, 1, 2], texts, torch.empty(0)))
    assert asked.known.tolist() == [True, False, True, True] and asked.words.shape == (4, 3, 48)
    table = model.hf.model.language_model.embed_tokens.weight
    for found, ids in zip(asked.words, ([10, 11, 12], [], [86], [40, 41]), strict=True):
        assert torch.equal(found[: len(ids)], table[ids]) and not found[len(ids) :].any()
    assert not asked.words.requires_grad


@pytest.mark.parametrize("chunk", [1, 64])
def test_an_image_is_cut_for_each_question(chunk: int) -> None:
    model = packed(tiny_llava(), MMTOK, vision_chunk=chunk)
    samples = [sample("a", [5], [10, 11]), sample("b", [6, 5], [40]), sample("c", [5], [55, 60, 7])]
    together, loss = run(model, collate(samples))
    alone = [run(model, collate([one])) for one in samples]
    assert together == [alone[0][0][0], alone[1][0][1], alone[2][0][0], alone[1][0][0]]  # by image, then by sample
    assert len({tuple(kept) for kept in together[:3]}) > 1, "the questions made no difference"
    torch.testing.assert_close(loss, sum(found for _, found in alone), rtol=1e-5, atol=1e-5)


def test_without_a_question_patches_alone_are_covered() -> None:
    hf = tiny_llava()
    silent = collate([sample("a", [5], [10, 11], Kind.SPECIAL), sample("b", [6], [], Kind.SPECIAL)])
    kept, _ = run(packed(hf, MMTOK), silent)
    plain = packed(hf, MMTOK)
    plain.pruner.reads_words = False
    assert kept == run(plain, silent)[0]


def test_flops_count_the_projector_on_all_patches() -> None:
    hf = tiny_llava()
    more = StepFlops(packed(hf, MMTOK)).vision.total - StepFlops(packed(hf, "fastervlm")).vision.total
    projector = hf.model.multi_modal_projector
    assert more == 2 * PATCHES * sum(part.weight.numel() for part in (projector.linear_1, projector.linear_2))


def test_a_run_asks_in_the_words_of_its_own_tokenizer(tmp_path: object) -> None:
    model, processor = begin(compose_config(["+experiment=smoke", "pruner=mmtok", "encoder.text=null"]))
    spelt = model.spell("color shape")
    assert processor.tokenizer.decode(spelt).split() == ["color", "shape"] and model.words(torch.tensor(spelt))
    model.save(tmp_path, processor)
    loaded, _ = load_model(tmp_path)
    assert loaded.pruner.reads_words and loaded.question is None and loaded.spell("color shape") == spelt


def test_generation_reads_the_question_once() -> None:
    model = packed(tiny_llava(), MMTOK)
    asked: list[int] = []
    embed = model._embed_words
    model._embed_words = lambda questions: asked.append(len(questions)) or embed(questions)
    model.generate(**tiny_inputs([1, 1], [7, 9], pad_left=True), num_beams=3, max_new_tokens=3, do_sample=False)
    assert asked == [2]
