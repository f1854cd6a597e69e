"""Putting networks together, saving them, and loading them back, here and in plain transformers."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import VISION, packed, tiny_inputs, tiny_llava
from transformers import AutoProcessor, LlavaForConditionalGeneration, ViTForImageClassification

from mmprune_train import load_model
from mmprune_train.config.compose import compose_config, load_pruner
from mmprune_train.config.schema import EncoderConfig, PeftConfig
from mmprune_train.errors import UserError
from mmprune_train.model.assemble import vision_tower
from mmprune_train.model.begin import begin
from mmprune_train.model.build import build_on_meta
from mmprune_train.model.llava import PackedLlava
from mmprune_train.model.peft import add_adapters, merge_adapters
from mmprune_train.model.projector import match_features
from mmprune_train.pruning import Pruner
from mmprune_train.training.network import match_projector

PROMPT = "USER: <image>\nWhat color is the shape? ASSISTANT:"


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[PackedLlava, Path]:
    """A tiny model as the smoke experiment builds it, and the folder it was saved to."""
    model, processor = begin(compose_config(["+experiment=smoke"]))
    folder = tmp_path_factory.mktemp("model")
    model.save(folder, processor)
    return model.eval(), folder


def test_plain_transformers_loads_what_is_saved(smoke: tuple[PackedLlava, Path]) -> None:
    model, folder = smoke
    hf, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in model.hf.state_dict().items():
        assert torch.equal(hf.state_dict()[name], tensor), name
    processor = AutoProcessor.from_pretrained(folder)
    image = Image.new("RGB", (60, 40), "red")
    inputs = processor(images=[image], text=[PROMPT], return_tensors="pt")
    dense, _ = load_model(folder, pruner="none")
    with torch.no_grad():
        torch.testing.assert_close(dense(**inputs).logits, hf(**inputs).logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(
            dense.generate(**inputs, max_new_tokens=5, do_sample=False),
            hf.generate(**inputs, max_new_tokens=5, do_sample=False),
        )


def test_a_folder_brings_its_pruner_and_another_can_be_asked_for(smoke: tuple[PackedLlava, Path]) -> None:
    model, folder = smoke
    own, processor = load_model(folder)
    assert own.pruner.settings == model.pruner.settings
    assert own.template == "v1"
    asked, _ = load_model(folder, pruner={"name": "twostage", "language": {"layer": 1}})
    assert list(asked.pruner.layers(4)) == [1]
    with pytest.raises(UserError, match="twostage"):
        load_model(folder, pruner="twostag")
    image = Image.new("RGB", (48, 48), "blue")
    inputs = processor(
        images=[image, image],
        text=[PROMPT, PROMPT + " blue</s>USER: Sure? ASSISTANT:"],
        padding=True,
        return_tensors="pt",
    )
    own.generate(**inputs, max_new_tokens=2)
    first, second = own.last_pruning.vision_kept
    assert first.dtype == torch.int64 and torch.equal(first, second) and len(first) < 36
    assert len(own.last_pruning.language_kept) == 2


def test_a_plain_llava_folder_loads_dense(tmp_path: Path, smoke: tuple[PackedLlava, Path]) -> None:
    _, folder = smoke
    hf = LlavaForConditionalGeneration.from_pretrained(folder)
    del hf.config.mmprune
    hf.save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path)
    model, _ = load_model(tmp_path)
    assert model.pruner.settings.name == "none" and model.pruner.layers(4) == {}


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape"])
def test_no_key_may_be_missing_unexpected_or_of_another_shape(
    fault: str, tmp_path: Path, smoke: tuple[PackedLlava, Path]
) -> None:
    _, folder = smoke
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(key for key in tensors if "lm_head" in key)
    if fault == "missing":
        del tensors[name]
    elif fault == "unexpected":
        tensors["model.language_model.extra.weight"] = torch.zeros(2)
    else:
        tensors[name] = torch.zeros(3, 3)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lm_head|extra"):
        load_model(tmp_path)


def test_a_vit_classifiers_folder_gives_its_tower(tmp_path: Path) -> None:
    classifier = ViTForImageClassification(VISION["vit"]())
    classifier.save_pretrained(tmp_path)
    tower = vision_tower(
        EncoderConfig(arch=VISION["vit"]().to_dict(), image_size=24, patch_size=8), tmp_path, torch.float32
    )
    kept = {name: tensor for name, tensor in tower.state_dict().items() if "pooler" not in name}
    saved = classifier.vit.state_dict()
    assert kept.keys() == saved.keys() and all(torch.equal(kept[name], saved[name]) for name in saved)


def test_paths_that_hold_no_model_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_model(tmp_path / "absent")
    with pytest.raises(UserError, match="no model .*no config.json.* where a run directory"):
        load_model(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"stages": {"pretrain": {"state": "running"}}}))
    with pytest.raises(UserError, match="no stage of this run has finished"):
        load_model(tmp_path)


def test_a_linear_projector_is_one_linear_layer_and_still_loads(tmp_path: Path) -> None:
    model, processor = begin(compose_config(["+experiment=smoke", "projector=linear"]))
    projector = model.hf.model.multi_modal_projector
    assert not projector.linear_2.weight.requires_grad
    features = torch.randn(5, 32)
    expected = torch.nn.functional.linear(features, projector.linear_1.weight, projector.linear_1.bias)
    torch.testing.assert_close(projector(features), expected)
    model.save(tmp_path, processor)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path).model.multi_modal_projector
    torch.testing.assert_close(again(features), expected)


@pytest.mark.parametrize(
    ("experiment", "billions"),
    [
        ("llava7b_dense", 7.06),
        ("llava7b_twostage", 7.06),
        ("llava7b_twostage_lora", 7.06),
        ("llava13b_twostage", 13.35),
    ],
)
def test_full_size_experiments_build_on_the_meta_device(experiment: str, billions: float) -> None:
    model = build_on_meta(compose_config([f"+experiment={experiment}"]))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model.config.image_seq_length == 576 and model.config.vision_feature_layer == -2


@pytest.mark.parametrize(
    ("kind", "text", "targets"),
    [("lora", "llama", ["q_proj", "down_proj"]), ("dora", "llama", ["q_proj", "down_proj"]), ("lora", "phi3", [])],
)
def test_adapters_train_alone_and_merge_to_the_same_logits(
    kind: str, text: str, targets: list[str], tmp_path: Path
) -> None:
    hf = tiny_llava("clip", text)
    keys = set(hf.state_dict())
    model = PackedLlava(copy.deepcopy(hf), Pruner(load_pruner("none"))).eval()
    add_adapters(model, PeftConfig(name=kind, r=4, alpha=8, dropout=0.0, target_modules=targets))
    assert any(isinstance(part, BaseTunerLayer) for part in model.hf.modules())
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name and "language_model.layers" in name for name in trained)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    inputs = tiny_inputs([1, 2], [6, 8])
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        adapted = model(**inputs).logits[real]
        merge_adapters(model.hf)
        merged = model(**inputs).logits[real]
        base = hf(**inputs).logits[real]
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)
    assert (merged - base).abs().max() > 1e-2
    assert not any(isinstance(part, BaseTunerLayer) for part in model.hf.modules())
    assert set(model.hf.state_dict()) == keys
    model.hf.save_pretrained(tmp_path)
    _, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_every_linear_of_a_fused_llm_is_adapted_and_the_score_hears_it() -> None:
    hf = tiny_llava("clip", "phi3")
    model = packed(hf, {"name": "language_only", "language": {"layer": 2}})
    inputs = tiny_inputs([1], [9])
    with torch.no_grad():
        model(**inputs)
    before = model.last_pruning.language_scores
    add_adapters(model, PeftConfig(name="lora", r=4, alpha=8, dropout=0.5))
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name, p in model.named_parameters() if "lora_" in name}
    assert adapted == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers.2.self_attn.qkv_proj.lora_B" in name:
                parameter.normal_(0, 0.1)
        scores = []
        for _ in range(2):  # dropout in training does not reach the score
            model.train()(**inputs)
            scores.append(model.last_pruning.language_scores)
    candidates = ~before.isnan()
    assert torch.equal(scores[0][candidates], scores[1][candidates])
    assert not torch.allclose(scores[0][candidates], before[candidates], rtol=1e-3)


def test_an_adapter_target_that_does_not_exist_is_named() -> None:
    model = PackedLlava(tiny_llava(), Pruner(load_pruner("none")))
    with pytest.raises(UserError, match="no w_proj; it has down_proj"):
        add_adapters(model, PeftConfig(name="lora", target_modules=["w_proj"]))


def test_a_new_projector_can_start_at_unit_variance() -> None:
    model, _ = begin(compose_config(["+experiment=smoke", "projector.init=unit_variance"]))
    first = model.hf.model.multi_modal_projector.linear_1
    assert (
        float(first.weight.detach().std()) == pytest.approx(first.in_features**-0.5, rel=0.1) and not first.bias.any()
    )


@pytest.mark.parametrize("name", ["linear", "mlp2x_gelu"])
def test_a_matched_projector_speaks_at_the_scale_of_text_whatever_the_features(name: str) -> None:
    model, _ = begin(compose_config(["+experiment=smoke", "projector.init=matched", f"projector={name}"]))
    projector = model.hf.model.multi_modal_projector
    width = projector.linear_1.in_features
    scale = torch.logspace(-2, 3, width)  # one dimension dwarfs the others, none is centred
    features = torch.randn(500, width) * scale + 5 * scale
    match_features(projector, features, text_rms=0.2)
    with torch.no_grad():
        out = projector(features)
        quiet = projector(features - torch.nn.functional.one_hot(torch.tensor(0), width) * scale)
    assert float(out.square().mean().sqrt()) == pytest.approx(0.2, rel=1e-4)
    # the smallest dimension, moved by its own spread, is heard as loudly as any: 1 / width of the variance
    change = float((out - quiet).square().mean()) / float(out.var(0).mean())
    assert 0.2 / width < change < 5 / width
    if name == "linear":
        torch.testing.assert_close(projector.linear_2.weight, torch.eye(len(projector.linear_2.weight)))


def test_matching_without_images_says_what_it_needs() -> None:
    model, _ = begin(compose_config(["+experiment=smoke"]))
    with pytest.raises(UserError, match="projector.init=matched needs images"):
        match_features(model.hf.model.multi_modal_projector, torch.empty(0, 32), 0.1)


def test_a_matched_projector_speaks_at_the_scale_of_gemmas_scaled_embeddings() -> None:
    model = packed(tiny_llava("clip", "gemma"))
    images = list(torch.randn(8, 3, 24, 24))
    match_projector(model, images)
    with torch.no_grad():
        spoken = model.hf.model.multi_modal_projector(model.kept_features(torch.stack(images)))
        text = model.hf.model.language_model.embed_tokens(torch.arange(128))
    assert float(spoken.square().mean().sqrt()) == pytest.approx(float(text.square().mean().sqrt()), rel=1e-4)
