"""A folder's processor against its model: what is left out is filled in, what contradicts is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import VISION, packed, tiny_inputs, tiny_llava
from transformers import AutoConfig, AutoModel, Dinov2WithRegistersConfig, LlavaForConditionalGeneration

from mmprune_train import load_model
from mmprune_train.config.compose import compose_config
from mmprune_train.config.schema import EncoderConfig
from mmprune_train.errors import UserError
from mmprune_train.model.assemble import vision_tower
from mmprune_train.model.begin import begin
from mmprune_train.model.build import build_on_meta
from mmprune_train.model.inputs import pack
from mmprune_train.model.vision import check_patches, features_of

PROMPT = "USER: <image>\nWhat color is the shape? ASSISTANT:"
PATCHES = 36
PROCESSOR, CONFIG, TOKENIZER = "processor_config.json", "config.json", "tokenizer.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke experiment's model as a plain llava-hf folder: CLIP, 48 pixels, patches of 8."""
    model, processor = begin(compose_config(["+experiment=smoke"]))
    folder = tmp_path_factory.mktemp("saved")
    model.hf.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "llava"))


def change(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def split_layout(folder: Path) -> None:
    """As transformers before 5 saved it: the image processor in a file of its own."""
    content = json.loads((folder / PROCESSOR).read_text())
    images = {**content.pop("image_processor"), "processor_class": "LlavaProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / PROCESSOR).write_text(json.dumps(content))


def tokens_of(folder: Path) -> int:
    """Image tokens of one image; the model must run on them, and on what is saved again in plain transformers."""
    model, processor = load_model(folder)
    inputs = processor(images=[Image.new("RGB", (60, 40), "red")], text=[PROMPT], return_tensors="pt")
    with torch.no_grad():
        dense = model(**inputs).logits
        plain = LlavaForConditionalGeneration.from_pretrained(folder)(**inputs).logits
    torch.testing.assert_close(dense, plain, rtol=1e-5, atol=1e-5)
    return int((inputs["input_ids"] == model.config.image_token_id).sum())


@pytest.mark.parametrize("layout", ["one file", "two files", "no processor_config.json"])
@pytest.mark.parametrize(
    "missing",
    [
        ["patch_size"],
        ["num_additional_image_tokens"],
        ["vision_feature_select_strategy"],
        ["patch_size", "num_additional_image_tokens", "vision_feature_select_strategy"],
    ],
)
def test_what_a_processor_leaves_out_comes_from_the_model(missing: list[str], layout: str, folder: Path) -> None:
    change(folder / PROCESSOR, lambda content: [content.pop(key) for key in missing])
    if layout != "one file":
        split_layout(folder)
    if layout == "no processor_config.json":
        (folder / PROCESSOR).unlink()
    assert tokens_of(folder) == PATCHES


def test_keys_that_are_null_and_sizes_that_are_numbers_are_old_ways_to_write_them(folder: Path) -> None:
    change(folder / PROCESSOR, lambda content: content.update(patch_size=None, vision_feature_select_strategy=None))
    split_layout(folder)
    change(folder / "preprocessor_config.json", lambda content: content.update(crop_size=48, size=48))
    assert tokens_of(folder) == PATCHES


def test_the_filled_in_keys_are_saved(folder: Path, tmp_path: Path) -> None:
    change(folder / PROCESSOR, lambda content: content.pop("num_additional_image_tokens"))
    change(folder / CONFIG, lambda content: content.pop("image_seq_length"))
    model, processor = load_model(folder)
    model.save(tmp_path / "again", processor)
    content = json.loads((tmp_path / "again" / PROCESSOR).read_text())
    assert content["num_additional_image_tokens"] == 1 and content["patch_size"] == 8
    assert json.loads((tmp_path / "again" / CONFIG).read_text())["image_seq_length"] == PATCHES


def test_other_keys_with_the_right_count_are_taken(folder: Path) -> None:
    keys = {"num_additional_image_tokens": 0, "vision_feature_select_strategy": "full"}
    change(folder / PROCESSOR, lambda content: content.update(keys))
    assert tokens_of(folder) == PATCHES


def test_a_config_that_feeds_the_cls_token_counts_it(folder: Path) -> None:
    change(folder / CONFIG, lambda content: content.update(vision_feature_select_strategy="full"))
    change(folder / CONFIG, lambda content: content.pop("image_seq_length"))
    change(folder / PROCESSOR, lambda content: content.pop("vision_feature_select_strategy"))
    assert tokens_of(folder) == PATCHES + 1


@pytest.mark.parametrize(
    ("file", "edit", "words"),
    [
        (PROCESSOR, {"num_additional_image_tokens": 0}, "num_additional_image_tokens=0 .* is 1.* 35 image.* 36 feat"),
        (PROCESSOR, {"patch_size": 16}, r"processor_config.json: patch_size=16 \(the model's is 8\).* 9 image.* 36 "),
        (PROCESSOR, {"patch_size": 0}, "patch_size=0 .*ZeroDivisionError.* 36 features"),
        (PROCESSOR, {"vision_feature_select_strategy": "full"}, "strategy=full .*default.* 37 image.* 36 features"),
        (CONFIG, {"image_seq_length": 35}, "config.json: image_seq_length=35.* 36 features"),
        (CONFIG, {"vision_feature_layer": -9}, r"vision_feature_layer=-9: the encoder has hidden states -4\.\.3"),
        (CONFIG, {"image_token_index": 7}, "config.json: image_token_id is 7, but <image> is 3"),
    ],
)
def test_contradictions_are_named_with_file_and_both_numbers(
    file: str, edit: dict[str, Any], words: str, folder: Path
) -> None:
    change(folder / file, lambda content: content.update(edit))
    with pytest.raises(UserError, match=words):
        load_model(folder)
    with pytest.raises(UserError, match=words):
        load_model(folder, empty=True)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ({"crop_size": {"height": 56, "width": 56}}, "crop_size .*56 x 56 pixels, image_size .*is 48"),
        ({"crop_size": {"height": 48, "width": 40}}, "crop_size .*40 x 48 pixels, image_size .*is 48"),
        ({"do_center_crop": False}, r"gives pixels \[1, 3, 48, 64\] and \[1, 3, 64, 48\].*do_center_crop"),
        ({"image_mean": [0.5, 0.5]}, "image processor .*does not work"),
    ],
)
@pytest.mark.parametrize("layout", ["one file", "two files"])
def test_an_image_processor_for_another_size_is_refused(
    layout: str, edit: dict[str, Any], words: str, folder: Path
) -> None:
    change(folder / PROCESSOR, lambda content: content["image_processor"].update(edit))
    if layout == "two files":
        split_layout(folder)
    with pytest.raises(UserError, match=words):
        load_model(folder)


def test_a_folder_without_an_image_processor_or_with_a_broken_one_is_refused(folder: Path) -> None:
    change(folder / PROCESSOR, lambda content: content.pop("image_processor"))
    with pytest.raises(UserError, match=r"llava: its processor .*does not load: .*image processor"):
        load_model(folder)
    (folder / PROCESSOR).write_text("{")
    with pytest.raises(UserError, match=rf"{PROCESSOR} is damaged or cut off"):
        load_model(folder)


def test_a_tokenizer_without_the_image_token_is_refused(folder: Path) -> None:
    text = (folder / TOKENIZER).read_text().replace("<image>", "<other>")
    (folder / TOKENIZER).write_text(text)
    with pytest.raises(UserError, match=r"does not know <image> as one token, which config.json gives the id 3"):
        load_model(folder)


# -- the tower of a new model ----------------------------------------------------------------------------------------


def encoder_of(kind: str, **keys: Any) -> EncoderConfig:
    arch = VISION[kind]().to_dict()
    settings = {"image_size": 24, "patch_size": 8, "has_cls": kind != "siglip", "name": kind, "arch": arch, **keys}
    return EncoderConfig(**settings)


@pytest.mark.parametrize("kind", sorted(VISION))
def test_a_tower_gives_the_patches_that_its_keys_say(kind: str) -> None:
    vision_tower(encoder_of(kind), None, torch.float32)
    hf = tiny_llava(kind)
    hf.config.vision_feature_select_strategy = "full" if kind == "siglip" else "default"
    assert features_of(hf.config, 24, 24) == encoder_of(kind).patches
    with torch.device("meta"):
        check_patches(AutoModel.from_config(AutoConfig.for_model(**encoder_of(kind).arch)), encoder_of(kind))


@pytest.mark.parametrize("kind", sorted(VISION))
def test_keys_of_another_tower_are_named(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"encoder.has_cls={'true: .* no' if kind == 'siglip' else 'false: .* a'} CLS"):
        vision_tower(encoder_of(kind, has_cls=kind == "siglip"), None, torch.float32)
    AutoModel.from_config(VISION[kind]()).save_pretrained(tmp_path)  # the weights' own config counts, not `arch`
    with pytest.raises(UserError, match=r"encoder.image_size=24, encoder.patch_size=4 .*patch_size=8"):
        vision_tower(encoder_of(kind, patch_size=4), tmp_path, torch.float32)
    if kind != "dinov2":
        with pytest.raises(UserError, match=r"encoder.image_size=32, encoder.patch_size=8.* image_size=24"):
            vision_tower(encoder_of(kind, image_size=32), tmp_path, torch.float32)


def test_registers_are_not_taken_for_patches() -> None:
    config = Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, image_size=24, patch_size=8, num_register_tokens=4
    )
    encoder = EncoderConfig(name="r", image_size=24, patch_size=8, arch=config.to_dict())
    with pytest.raises(UserError, match="dinov2_with_registers.* is not supported"):
        vision_tower(encoder, None, torch.float32)


def test_the_keys_are_held_to_the_tower_without_weights_too() -> None:
    with pytest.raises(UserError, match="encoder.patch_size=12"):
        build_on_meta(compose_config(["+experiment=smoke", "encoder.patch_size=12", "encoder.arch.patch_size=8"]))


# -- calls -----------------------------------------------------------------------------------------------------------


def test_image_tokens_must_be_the_encoders_features() -> None:
    model = packed(tiny_llava())
    inputs = tiny_inputs([1, 2], [6, 8])
    with pytest.raises(UserError, match="27 image tokens, but there are no pixel_values"):
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    for images in (2, 4):
        with pytest.raises(UserError, match=f"27 image tokens .* {9 * images} image features, 9 of each of {images}"):
            model(**{**inputs, "pixel_values": torch.zeros(images, 3, 24, 24)})
    for row in range(2):  # fewer tokens for every image than it has patches, in whole numbers
        inputs["input_ids"][row, 3 : 3 + (1, 2)[row]] = 5
    with pytest.raises(UserError, match="24 image tokens .* 27 image features"):
        model(**inputs)


def test_a_sample_with_a_part_of_an_image_is_named() -> None:
    model = packed(tiny_llava())
    inputs = tiny_inputs([1, 1], [8, 8])
    ids = inputs["input_ids"]
    ids[0, 3], ids[1, 12] = 5, 3  # 8 and 10 tokens for two images of 9
    with pytest.raises(UserError, match="sample 0 of input_ids holds only a part of an image's 9 image tokens"):
        model(**inputs)


def test_a_training_batch_that_writes_another_number_of_tokens_is_refused() -> None:
    model = packed(tiny_llava())
    inputs = tiny_inputs([1], [6])
    valid = inputs["attention_mask"].bool()
    sequence = pack(inputs["input_ids"], valid, 1, 3, features=9)
    with pytest.raises(UserError, match="8 image tokens are written for an image of 9 image features"):
        model.forward_packed(sequence.keep(sequence.patch != 8), inputs["pixel_values"])
