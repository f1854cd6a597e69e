"""Stage 1 in the client and the LLM on a server answer as one model does here."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from serving.stand_in import Dead, Engine, serving
from transformers import LlavaForConditionalGeneration

from mmprune_train import load_model
from mmprune_train.config.compose import compose_config
from mmprune_train.errors import UserError
from mmprune_train.model.begin import begin
from mmprune_train.model.export.hf import save_hf
from mmprune_train.serving import Client, VisionSide

QUESTION = "What color is the shape?"
TOKENS = 6


def picture(seed: int) -> Image.Image:
    torch.manual_seed(seed)
    small = torch.randint(0, 255, (5 + seed, 5, 3), dtype=torch.uint8)
    return Image.fromarray(small.numpy()).resize((64, 64), Image.Resampling.NEAREST)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a dynamic stage 1, exported."""
    return saved(tmp_path_factory.mktemp("export"), "encoder_only")


def saved(out: Path, pruner: str, *more: str) -> Path:
    model, processor = begin(compose_config(["+experiment=smoke", f"pruner={pruner}", *more]))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.hf.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    save_hf(model, processor, out, torch.float32)
    return out


@pytest.fixture(scope="module")
def vision(folder: Path) -> VisionSide:
    return VisionSide.load(folder)


def vision_tokens(folder: Path) -> int:
    """Of an image, dense."""
    return int(LlavaForConditionalGeneration.from_pretrained(folder).config.image_seq_length)


def expected_of(folder: Path, images: list[Image.Image], **loaded: Any) -> tuple[str, list[int]]:
    model, processor = load_model(folder, **loaded)
    ask = [{"role": "user", "content": "<image>" * len(images) + QUESTION}]
    text = processor.apply_chat_template(ask, add_generation_prompt=True)
    inputs = processor(images=images, text=[text], return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(out, skip_special_tokens=True), [len(kept) for kept in model.last_pruning.vision_kept]


def test_the_vision_side_is_loaded_without_the_llm(vision: VisionSide, folder: Path) -> None:
    whole = LlavaForConditionalGeneration.from_pretrained(folder)
    own = sum(parameter.numel() for parameter in vision.model.hf.parameters())
    needed = sum(p.numel() for n, p in whole.named_parameters() if "vision" in n or "projector" in n)
    assert own < needed + 2000 and len(vision.model.hf.model.language_model.layers) == 0
    for name, value in vision.model.hf.model.vision_tower.state_dict().items():
        assert torch.equal(value, whole.model.vision_tower.state_dict()[name]), name


@pytest.mark.parametrize("images", [0, 1, 2])
def test_a_server_around_plain_transformers_answers_as_the_model_here(
    images: int, vision: VisionSide, folder: Path
) -> None:
    pictures = [picture(seed) for seed in range(images)]
    if images:
        text, kept = expected_of(folder, pictures)
    else:
        text, kept = None, []
    engine = Engine(folder)
    with serving(engine) as url:
        answer = Client(vision, url, "m").ask(QUESTION, pictures, max_tokens=TOKENS, temperature=0)
    assert answer.visual_tokens == kept
    if images:
        assert answer.text == text and len(set(kept)) == images, "each image is cut to its own length"
        assert max(kept) < vision.model.config.image_seq_length
    body, _ = Client(vision, "http://nowhere/v1", "m").request(
        [{"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": QUESTION}]}], pictures
    )
    ids, _ = engine.read(body)
    assert answer.prompt_tokens == len(ids)


def test_images_of_different_lengths_end_the_engine_unless_they_come_in_pieces(
    vision: VisionSide, folder: Path
) -> None:
    engine = Engine(folder)

    def requests(piece: int | None) -> list[Any]:
        client = Client(vision, "http://nowhere/v1", "m", piece=piece)
        ask = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
        return [engine.read(client.request(ask, [picture(seed)])[0]) for seed in range(2)]

    whole, pieces = requests(None), requests(1)
    assert [ids for ids, _ in whole] == [ids for ids, _ in pieces], "the same prompt either way"
    for one, other in zip(engine.step(whole[:1]), engine.step(pieces[:1]), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(Dead, match="inconsistent shapes"):
        engine.step(whole)
    assert len(engine.step(pieces)) == 2
    with pytest.raises(UserError, match="piece=1000: stage 1 kept"):
        requests(1000)


def test_pieces_of_several_turns_stay_with_their_images(vision: VisionSide, folder: Path) -> None:
    engine = Engine(folder)
    image = {"type": "image"}
    messages = [
        {"role": "user", "content": [image, image, {"type": "text", "text": "Which?"}]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": [{"type": "text", "text": "And this?"}, image]},
    ]
    pictures = [picture(seed) for seed in range(3)]
    whole, pieces = (
        engine.read(Client(vision, "http://nowhere/v1", "m", piece=piece).request(messages, pictures)[0])
        for piece in (None, 1)
    )
    assert whole[0] == pieces[0] and torch.equal(torch.cat(whole[1]), torch.cat(pieces[1]))
    text = engine.processor.apply_chat_template(messages, add_generation_prompt=True)
    ids = engine.processor(images=pictures, text=[text])["input_ids"][0]
    assert [one for one in ids if one != engine.token] == [one for one in pieces[0] if one != engine.token]


def test_embeddings_are_those_of_the_whole_model(vision: VisionSide, folder: Path) -> None:
    model, processor = load_model(folder)
    images = [picture(seed) for seed in range(3)]
    found = vision.embed(images)
    pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        patches = model.select_patches(pixels)
        expected = model.hf.model.multi_modal_projector(patches.chosen)
    torch.testing.assert_close(torch.cat(found), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["visionzip", "downsample", "scope", "holov"])
def test_tokens_enter_as_the_pruner_makes_and_orders_them(name: str, folder: Path) -> None:
    image = picture(2)
    pruner = {"name": name, "vision": {"knee": {"method": "fixed_count", "count": 16}}}
    text, kept = expected_of(folder, [image], pruner=pruner)
    with serving(Engine(folder)) as url:
        answer = Client(VisionSide.load(folder, pruner), url, "m").ask(QUESTION, [image], max_tokens=TOKENS)
    assert (answer.text, answer.visual_tokens) == (text, kept) and kept[0] < vision_tokens(folder)


def test_a_stage_1_that_reads_the_question_is_shown_it(tmp_path: Path) -> None:
    out = saved(tmp_path, "cdpruner", "pruner.vision.knee.count=7")
    images, counts = [picture(seed) for seed in range(3)], set()
    vision = VisionSide.load(out)
    model, processor = load_model(out)
    for question in (
        "What color?",
        "Is the round one on the left?\nAnswer the question using a single word or phrase.",
    ):
        ask = [{"role": "user", "content": f"<image>\n{question}"}]
        text = processor.apply_chat_template(ask, add_generation_prompt=True)
        model(**processor(images=images, text=[text] * 3, padding=True, return_tensors="pt"))
        found = vision.embed(images, [question] * 3)
        with torch.no_grad():
            states, _ = model.encode_images(
                processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
            )
            projected = model.hf.model.multi_modal_projector(states)
        for one, all_of, order in zip(found, projected, model.last_pruning.vision_order, strict=True):
            torch.testing.assert_close(one, all_of[order], atol=1e-6, rtol=1e-6)
        counts.add(tuple(map(tuple, (order.tolist() for order in model.last_pruning.vision_order))))
    assert len(counts) == 2, "another question keeps other tokens"


def test_what_cannot_be_served_is_told(vision: VisionSide, folder: Path) -> None:
    with pytest.raises(UserError, match="1 images are given, .* for 2 of them"):
        parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "x"}]
        Client(vision, "http://nowhere/v1", "m").chat([{"role": "user", "content": parts}], [picture(0)])
    with pytest.raises(UserError, match="part of type 'video'"):
        Client(vision, "http://nowhere/v1", "m").chat([{"role": "user", "content": [{"type": "video"}]}])
    with pytest.raises(UserError, match=r"pruner.vision.positions=original: engines number"):
        VisionSide.load(folder, {"name": "encoder_only", "vision": {"positions": "original"}})
    with pytest.raises(UserError, match="mmtok reads the question by the LLM's own embeddings"):
        VisionSide.load(folder, "mmtok")
    with serving(Engine(folder, takes_embeds=False)) as url, pytest.raises(UserError, match="enable-mm-embeds"):
        Client(vision, url, "m").ask(QUESTION, [picture(0)], max_tokens=1)
    with pytest.raises(UserError, match="127.0.0.1:9/v1 does not answer"):
        Client(vision, "http://127.0.0.1:9/v1", "m").ask(QUESTION, max_tokens=1)


@pytest.mark.parametrize("reply", [b"<html>It works!</html>", b"[]", b'{"error": "no such model"}', b'{"choices": []}'])
def test_an_answer_that_is_no_chat_completion_is_told(
    reply: bytes, vision: VisionSide, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: io.BytesIO(reply))
    with pytest.raises(UserError, match=rf"http://there/v1 answers with .*{re.escape(reply.decode())}.*up to and with"):
        Client(vision, "http://there/v1", "m").ask(QUESTION, max_tokens=1)


def test_weights_of_a_trained_score_go_along(tmp_path: Path) -> None:
    model, processor = begin(compose_config(["+experiment=smoke", "pruner=learned"]))
    with torch.no_grad():
        for parameter in model.scorer.parameters():
            parameter.normal_(0, 1)
    save_hf(model, processor, tmp_path, torch.float32)
    again, _ = load_model(tmp_path)
    assert all(torch.equal(value, again.scorer.state_dict()[name]) for name, value in model.scorer.state_dict().items())
    images = [picture(seed) for seed in range(2)]
    pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = again.visual_tokens(again.select_patches(pixels))
    found = torch.cat(VisionSide.load(tmp_path).embed(images))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
