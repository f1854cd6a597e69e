"""What is exported, read back here, in plain transformers, and as LLaVA's own code names it."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import pytest
import torch
from originals import projector_of, write_original
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny import tiny_inputs, tiny_llava
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    CLIPImageProcessor,
    GenerationConfig,
    LlavaForConditionalGeneration,
)

from mmprune_train import load_model
from mmprune_train.config.compose import compose_config, load_pruner
from mmprune_train.errors import UserError
from mmprune_train.model.begin import begin
from mmprune_train.model.export import shards
from mmprune_train.model.export.hf import save_hf
from mmprune_train.model.export.llava import save_llava
from mmprune_train.model.export.shards import write_shards
from mmprune_train.model.llava import PackedLlava
from mmprune_train.model.tokenizer import tiny_tokenizer
from mmprune_train.pruning import Pruner
from mmprune_train.storage.atomic import new_folder

PROMPT = "USER: <image>\nWhat color is the shape? ASSISTANT:"


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as a run of the smoke experiment leaves it."""
    model, processor = begin(compose_config(["+experiment=smoke"]))
    folder = tmp_path_factory.mktemp("saved") / "folder"
    model.save(folder, processor)
    return folder


def inputs_of(processor: Any) -> dict[str, torch.Tensor]:
    image = Image.effect_noise((60, 40), 90).convert("RGB")
    return dict(processor(images=[image], text=[PROMPT], return_tensors="pt"))


@torch.no_grad()
def logits_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.eval()(**inputs).logits


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("shard_bytes", [5 << 30, 60_000])
def test_a_llava_hf_folder_comes_out_as_it_went_in(smoke: Path, shard_bytes: int, tmp_path: Path) -> None:
    model, processor = load_model(smoke)
    size = save_hf(model, processor, tmp_path, torch.float32, shard_bytes)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert (tmp_path / "model.safetensors.index.json").is_file() == (len(files) > 1) == (shard_bytes < size)
    again, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before = LlavaForConditionalGeneration.from_pretrained(smoke)
    for name, value in before.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    inputs = inputs_of(AutoProcessor.from_pretrained(tmp_path))
    assert torch.equal(logits_of(again, inputs), logits_of(before, inputs))
    dense, _ = load_model(tmp_path, pruner="none")
    torch.testing.assert_close(logits_of(dense, inputs), logits_of(before, inputs), atol=1e-5, rtol=1e-5)
    pruned, _ = load_model(tmp_path)
    assert asdict(pruned.pruner.settings) == asdict(model.pruner.settings) and pruned.template == model.template
    pruned.generate(**inputs, max_new_tokens=2)
    model.generate(**inputs, max_new_tokens=2)
    assert torch.equal(pruned.last_pruning.vision_kept[0], model.last_pruning.vision_kept[0])


@pytest.mark.parametrize(
    ("vision", "text"),
    [("clip", "llama"), ("siglip", "qwen2"), ("dinov2", "gemma"), ("vit", "phi3"), ("clip", "mistral")],
)
def test_weights_of_every_family_carry_published_names(vision: str, text: str, tmp_path: Path) -> None:
    hf = tiny_llava(vision, text)
    model = PackedLlava(copy.deepcopy(hf), load_pruner_of("none"))
    save_hf(model, FakeProcessor(), tmp_path, torch.float32)
    names = set(weights_in(tmp_path))
    parts = {name.split(".")[0] for name in names}
    assert parts == {"language_model", "vision_tower", "multi_modal_projector"}
    if vision in ("clip", "siglip"):  # vLLM's tower, and transformers' before 5.6
        assert all(name.startswith("vision_tower.vision_model.") for name in names if "vision_tower" in name)
    assert ("language_model.lm_head.weight" in names) == (not hf.config.tie_word_embeddings)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    for name, value in hf.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    inputs = tiny_inputs([1], [6]) if vision != "dinov2" else tiny_inputs([0], [6])
    torch.testing.assert_close(logits_of(again, inputs), logits_of(hf, inputs), atol=1e-6, rtol=1e-6)


class FakeProcessor:
    """Of models without a tokenizer."""

    def save_pretrained(self, folder: Path) -> None:
        pass


def load_pruner_of(name: str) -> Any:
    return Pruner(load_pruner(name))


def tower_folder(folder: Path, hf: LlavaForConditionalGeneration) -> Path:
    """The model's vision tower as a CLIP folder of its own, with its image preparation."""
    hf.model.vision_tower.save_pretrained(folder)
    side = hf.config.vision_config.image_size
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("bins", [False, True])
def test_an_original_checkpoint_is_read_and_comes_out_as_a_whole_llava(
    inside: bool, bins: bool, tmp_path: Path
) -> None:
    hf = tiny_llava()
    tower = tower_folder(tmp_path / "clip", hf)
    tokenizer = tiny_tokenizer()
    hf.resize_token_embeddings(len(tokenizer) - 8, mean_resizing=False)  # as LLaVA-1.5's LLM has no row for `<image>`
    more = {"mm_vision_tower": str(tower), "mmprune": {"template": "v1"}}
    original = write_original(tmp_path / "original", hf, tokenizer, tower=inside, bins=bins, **more)
    model, processor = load_model(original)
    save_hf(model, processor, tmp_path / "out", torch.float32)
    plain = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    inputs = inputs_of(AutoProcessor.from_pretrained(tmp_path / "out"))
    vocabulary = hf.config.text_config.vocab_size
    assert int(inputs["input_ids"].max()) < vocabulary < plain.config.text_config.vocab_size
    hf.config.image_token_id = plain.config.image_token_id
    expected, found = logits_of(hf, inputs), logits_of(plain, inputs)
    torch.testing.assert_close(found[..., :vocabulary], expected, atol=1e-6, rtol=1e-6)
    assert bool((found[..., vocabulary:].amax(-1) < expected.amax(-1)).all()), "nobody trained these rows"
    assert processor.image_processor.do_pad, "image_aspect_ratio=pad"


def test_what_the_original_layout_lost_is_named(tmp_path: Path) -> None:
    hf = tiny_llava()
    tower = tower_folder(tmp_path / "clip", hf)
    tokenizer = tiny_tokenizer()
    hf.resize_token_embeddings(len(tokenizer))

    def damaged(name: str, harm: Any) -> Path:
        folder = write_original(tmp_path / name, hf, tokenizer, mm_vision_tower=str(tower))
        weights = load_file(folder / "model.safetensors")
        harm(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder

    cases = {
        "projector": (lambda w: w.pop("model.mm_projector.2.bias"), "no projector that is known.*model.mm_projector"),
        "layer": (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), "missing keys: model.layers.1.mlp.up_proj"),
        "more": (lambda w: w.update({"model.resampler.query": torch.ones(2)}), "unexpected keys: model.resampler"),
        "tower": (
            lambda w: w.pop("model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias"),
            "missing keys: .*encoder.layers.0.mlp.fc1.bias",
        ),
        "width": (
            lambda w: w.update({"model.mm_projector.0.weight": torch.ones(48, 7)}),
            r"model.mm_projector.0.weight of shape \[48, 7\]",
        ),
    }
    for name, (harm, words) in cases.items():
        with pytest.raises(UserError, match=words):
            load_model(damaged(name, harm))
    away = write_original(tmp_path / "away", hf, tokenizer, mm_vision_tower="openai/clip-vit-large-patch14-336")
    with pytest.raises(UserError, match="encoder.path: .*openai/clip-vit-large-patch14-336 .*hf download"):
        load_model(away)
    load_model(away, encoder=tower)


@pytest.mark.parametrize("how", ["file", "folder", "beside the LLM"])
def test_a_projector_finds_its_language_model(how: str, tmp_path: Path) -> None:
    hf = tiny_llava()
    tower = tower_folder(tmp_path / "clip", hf)
    tokenizer = tiny_tokenizer()
    hf.resize_token_embeddings(len(tokenizer))
    text = hf.config.text_config
    language = AutoModelForCausalLM.from_config(text)
    language.model.load_state_dict(hf.model.language_model.state_dict())
    language.lm_head.load_state_dict(hf.lm_head.state_dict())
    language.save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    place = tmp_path / ("llm" if how == "beside the LLM" else "projector")
    place.mkdir(exist_ok=True)
    torch.save(projector_of(hf), place / "mm_projector.bin")
    if how == "folder":  # as the first stage of LLaVA's training leaves it
        own = {"model_type": "llava_llama", "_name_or_path": str(tmp_path / "llm"), "mm_vision_tower": str(tower)}
        (place / "config.json").write_text(json.dumps(own))
    given = place / "mm_projector.bin" if how == "file" else place
    parts = {"file": {"encoder": tower, "llm": tmp_path / "llm"}, "folder": {}, "beside the LLM": {"encoder": tower}}
    if how != "folder":
        with pytest.raises(UserError, match="encoder.path=FOLDER"):
            load_model(given)
    model, processor = load_model(given, pruner="none", **parts[how])
    inputs = inputs_of(processor)
    hf.config.image_token_id = model.config.image_token_id
    hf.resize_token_embeddings(model.config.text_config.vocab_size)
    expected, found = logits_of(hf, inputs), logits_of(model, inputs)
    torch.testing.assert_close(found[..., : text.vocab_size], expected[..., : text.vocab_size], atol=1e-5, rtol=1e-5)


def test_the_original_layout_is_that_of_llavas_own_code(smoke: Path, tmp_path: Path) -> None:
    model, processor = load_model(smoke)
    tower = tower_folder(tmp_path / "clip", model.hf)
    reference = write_original(tmp_path / "reference", model.hf, processor.tokenizer)
    save_llava(model, processor, tmp_path / "inside", torch.float32, str(tower), tower_inside=True)
    save_llava(model, processor, tmp_path / "named", torch.float32, str(tower), tower_inside=False)
    expected = load_file(reference / "model.safetensors")
    found = weights_in(tmp_path / "inside")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert not any("vision_tower" in name for name in weights_in(tmp_path / "named"))
    projector = torch.load(tmp_path / "named" / "mm_projector.bin", weights_only=True)
    assert projector.keys() == projector_of(model.hf).keys()
    config = json.loads((tmp_path / "named" / "config.json").read_text())
    assert config["architectures"] == ["LlavaLlamaForCausalLM"] and config["model_type"] == "llava_llama"
    assert config["mm_vision_tower"] == str(tower) and not config["unfreeze_mm_vision_tower"]
    assert config["rope_theta"] == model.config.text_config.rope_parameters["rope_theta"]
    for folder in ("inside", "named"):
        again, its = load_model(tmp_path / folder)
        assert asdict(again.pruner.settings) == asdict(model.pruner.settings) and again.template == model.template
        inputs = inputs_of(its)
        with model.pruned_by(load_pruner("none")), again.pruned_by(load_pruner("none")):
            torch.testing.assert_close(logits_of(again, inputs), logits_of(model, inputs), atol=1e-5, rtol=1e-5)


def test_the_original_layout_refuses_what_llavas_code_cannot_run(tmp_path: Path) -> None:
    model = PackedLlava(tiny_llava("siglip", "gemma"), load_pruner_of("none"))
    with pytest.raises(UserError, match="gemma .*nor a vision tower of type siglip_vision_model.*export.format=hf"):
        save_llava(model, FakeProcessor(), tmp_path, torch.float32, "x/y", tower_inside=True)


def test_engines_find_what_they_look_for(smoke: Path, tmp_path: Path) -> None:
    model, processor = load_model(smoke)
    save_hf(model, processor, tmp_path, torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["text_config"]["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == config["torch_dtype"] == config["text_config"]["torch_dtype"] == "bfloat16"
    assert config["text_config"]["rope_theta"] == 10_000.0 and "image_token_index" in config
    assert {value.dtype for value in weights_in(tmp_path).values()} == {torch.bfloat16}
    generation = GenerationConfig.from_pretrained(tmp_path)
    assert generation.eos_token_id == model.generation_config.eos_token_id
    template = (tmp_path / "chat_template.jinja").read_text()
    assert loops_over_parts(template), (
        "vLLM takes a template for one that reads lists of parts where it finds this loop"
    )
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What color?"}]}]
    words = [{"role": "user", "content": "<image>\nWhat color?"}]
    again = AutoProcessor.from_pretrained(tmp_path)
    rendered = [again.apply_chat_template(ask, add_generation_prompt=True) for ask in (parts, words)]
    alone = again.tokenizer.apply_chat_template(parts, add_generation_prompt=True, tokenize=False)
    assert rendered[0] == rendered[1] == alone and rendered[0].count("<image>") == 1


def loops_over_parts(template: str) -> bool:
    """Whether a loop runs over `message['content']`, and nothing else, of a message of `messages`."""
    tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    loops = list(tree.find_all(jinja2.nodes.For))
    named = [loop.target.name for loop in loops if getattr(loop.iter, "name", None) == "messages"]
    return any(
        isinstance(loop.iter, jinja2.nodes.Getitem)
        and loop.iter.arg.value == "content"
        and loop.iter.node.name in named
        for loop in loops
    )


def test_values_that_half_precision_does_not_hold_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fp16: w has values"):
        write_shards({"w": torch.tensor([1.0, 1e6])}, tmp_path, torch.float16, 1 << 30)


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"export.out: the disk has 0.0 GB free, 0.1 GB are needed"):
        write_shards({"w": torch.ones(8)}, tmp_path, torch.float32, 1 << 30)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_half_way_is_told_and_nothing_is_left(tmp_path: Path, monkeypatch: Any) -> None:
    def full(*_: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(UserError, match="export.out: the disk is full"), new_folder(tmp_path / "out", "x") as part:
        write_shards({"w": torch.ones(8)}, part, torch.float32, 1 << 30)
    assert not list(tmp_path.iterdir())


def test_a_new_folder_never_takes_the_place_of_something(tmp_path: Path) -> None:
    taken, out = tmp_path / "taken", tmp_path / "out"
    taken.mkdir()
    (taken / "mine").write_text("kept")
    for place in (taken, taken / "mine"):
        with pytest.raises(UserError, match="export.out: .*holds something else"), new_folder(place, "export.out"):
            raise AssertionError("nothing is computed")
    with pytest.raises(RuntimeError, match="half"), new_folder(out, "export.out") as part:
        (part / "file").write_text("half")
        raise RuntimeError("half")
    assert not out.exists() and [path.name for path in tmp_path.iterdir()] == ["taken"]
    with pytest.raises(UserError, match="holds something else"), new_folder(out, "export.out") as part:
        (part / "file").write_text("whole")
        out.mkdir()
        (out / "another").write_text("was faster")
    assert (out / "another").read_text() == "was faster" and not (out / "file").exists()
    with new_folder(tmp_path / "deep" / "er", "export.out") as part:
        (part / "file").write_text("whole")
    assert (tmp_path / "deep" / "er" / "file").read_text() == "whole"
