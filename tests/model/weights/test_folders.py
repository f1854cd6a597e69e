"""A wrong folder is named, with the key and what to do, from its config and headers; nothing of it is loaded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from originals import write_original
from safetensors.torch import load_file, save_file
from tiny import TEXT, VISION, tiny_clip, tiny_llava
from transformers import AutoModel, LlamaForCausalLM, PreTrainedModel
from transformers.quantizers import quantizer_awq

from mmprune_train import load_model
from mmprune_train.config.schema import EncoderConfig, LlmConfig, TextTowerConfig
from mmprune_train.errors import UserError
from mmprune_train.model.tokenizer import load_tokenizer, tiny_tokenizer
from mmprune_train.model.weights.folders import check_folder
from mmprune_train.model.weights.places import base_folder

SHARD = "model-00001-of-00005.safetensors"
"""Of the LLM below."""
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 4000\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each kind."""
    root = tmp_path_factory.mktemp("folders")
    llava = tiny_llava()
    llava.save_pretrained(root / "llava")
    LlamaForCausalLM(TEXT["llama"]()).save_pretrained(root / "llm", max_shard_size="100KB")
    tiny_tokenizer().save_pretrained(root / "llm")
    llava.model.vision_tower.save_pretrained(root / "encoder")
    tiny_clip(llava).save_pretrained(root / "clip")
    write_original(root / "original", llava, tiny_tokenizer())
    (root / "adapters").mkdir()
    (root / "adapters/adapter_config.json").write_text("{}")
    (root / "gguf").mkdir()
    (root / "gguf/q4.gguf").write_bytes(b"GGUF")
    (root / "next").mkdir()
    (root / "next/config.json").write_text('{"model_type": "llava_next", "text_config": {}, "vision_config": {}}')
    (root / "code").mkdir()
    own = {"model_type": "newest", "auto_map": {"AutoModelForCausalLM": "modeling_newest.Newest"}}
    (root / "code/config.json").write_text(json.dumps(own))
    (root / "unknown").mkdir()
    (root / "unknown/config.json").write_text('{"model_type": "newest"}')
    return root


def given_as_llm(path: Path) -> None:
    base_folder(LlmConfig(name="x", path=str(path)))


def given_as_encoder(path: Path) -> None:
    base_folder(EncoderConfig(name="x", path=str(path)))


def given_as_text(path: Path) -> None:
    base_folder(TextTowerConfig(path=str(path)))


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for outlines, whose weights are on the meta device."""
    load = PreTrainedModel.from_pretrained.__func__

    def outline(cls: type, path: object, **settings: Any) -> Any:
        assert path is None and settings["device_map"] == "meta", "it was loaded"
        return load(cls, path, **settings)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(outline))


@pytest.mark.parametrize(
    ("give", "kind", "words"),
    [
        (given_as_llm, "llava", "llm.path: .*llava holds a whole LLaVA .*init_from=.*llava, or give the LLM alone"),
        (given_as_llm, "original", "llm.path: .*original LLaVA format.*init_from="),
        (given_as_llm, "encoder", "llm.path: .*holds a vision encoder, .*give this folder as encoder.path"),
        (given_as_llm, "clip", "with its text tower, .*give this folder as encoder.path"),
        (given_as_llm, "adapters", "llm.path: .*adapters without the model they belong to.*init_from="),
        (given_as_llm, "gguf", "llm.path: .*GGUF weights.*unquantised checkpoint"),
        (given_as_llm, "next", "model of type 'llava_next'"),
        (given_as_llm, "code", "needs code of its own .auto_map. that is never run"),
        (given_as_llm, "unknown", "'newest', which transformers .* does not know"),
        (given_as_encoder, "llm", "encoder.path: .*a plain language model, .*give this folder as llm.path"),
        (given_as_encoder, "llava", "encoder.path: .*init_from=.*, or give the encoder alone"),
        (given_as_text, "encoder", "encoder.text.path: .*a vision encoder, where the whole CLIP"),
        (load_model, "llm", "llm holds a plain language model, where a run directory, an exported folder"),
        (load_model, "adapters", "adapters without the model.*init_from="),
        (load_model, "encoder", "holds a vision encoder"),
        (load_model, "next", "'llava_next', where"),
        (load_model, "gguf", "GGUF weights"),
    ],
)  # fmt: skip
def test_a_folder_of_another_kind_is_told_where_it_belongs(
    give: Callable[[Path], Any], kind: str, words: str, whole: Path, nothing_is_loaded: None
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        give(whole / kind)
    assert "\n" not in str(caught.value) and str(whole / kind) in str(caught.value)


def test_folders_of_the_right_kind_are_taken(whole: Path) -> None:
    given_as_llm(whole / "llm")
    given_as_encoder(whole / "encoder")
    given_as_encoder(whole / "clip")
    for vision in ("dinov2", "siglip", "vit"):
        AutoModel.from_config(VISION[vision]()).save_pretrained(whole / vision)
        given_as_encoder(whole / vision)
    given_as_text(whole / "clip")
    tensors = check_folder("ckpt", whole / "llava", "llava")
    assert sum(name.endswith("q_proj.weight") for name in tensors) == 7


def pointer(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(POINTER) and None


def cut(name: str) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) - 9])

    return harm


def in_config(**fields: Any) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **fields}))

    return harm


def index_of_another(folder: Path) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    first = next(iter(index["weight_map"].values()))
    index["weight_map"]["model.absent.weight"] = first
    file.write_text(json.dumps(index))


def in_index(file: Any) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        index["weight_map"]["model.norm.weight"] = file
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return harm


def in_header(**fields: Any) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        data = (folder / SHARD).read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        next(entry for name, entry in header.items() if name != "__metadata__").update(fields)
        written = json.dumps(header).encode()
        (folder / SHARD).write_bytes(len(written).to_bytes(8, "little") + written + data[8 + length :])

    return harm


def marked(name: str) -> Callable[[Path], None]:
    """With the byte order mark that some editors write."""
    return lambda folder: (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes()) and None


def link(name: str, target: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink() or (folder / name).symlink_to(target)


def pipe(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink(missing_ok=True) or os.mkfifo(folder / name)


def whole_numbers(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        save_file({name: value.to(torch.int8) for name, value in load_file(file).items()}, file)


def one_dtype(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    weights = load_file(file)
    save_file({name: value.to(torch.float8_e4m3fn) for name, value in weights.items()}, file)


def packed(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    weights = load_file(file)
    save_file({**weights, "model.layers.0.mlp.up_proj.qweight": torch.ones(2, dtype=torch.int32)}, file)
    (folder / "model.safetensors.index.json").unlink()
    file.rename(folder / "model.safetensors")


def other_files(*names: str) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        for file in folder.glob("model*"):
            file.unlink()
        for name in names:
            (folder / name).write_bytes(b"weights")

    return harm


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (pointer("config.json"), "config.json is a git-lfs pointer.*git lfs pull"),
        (pointer("tokenizer.json"), "tokenizer.json is a git-lfs pointer.*git lfs pull"),
        (pointer(SHARD), "safetensors is a git-lfs pointer.*git lfs pull"),
        (pointer("model.safetensors.index.json"), "index.json is a git-lfs pointer"),
        (cut("config.json"), "config.json is damaged or cut off"),
        (cut("tokenizer.json"), "tokenizer.json is damaged or cut off"),
        (cut(SHARD), "safetensors is damaged or cut off .*not fully covered"),
        (lambda f: (f / SHARD).write_bytes(b"\x09"), "safetensors is damaged or cut off .*header too small"),
        (lambda f: (f / SHARD).write_bytes(b""), "safetensors is empty"),
        (lambda f: (f / SHARD).write_bytes(bytes(4000)), "safetensors is damaged or cut off .*header"),
        (lambda f: (f / SHARD).unlink(), "lacks model-00001.* of the "),
        (lambda f: (f / "model.safetensors.index.json").unlink(), "but no model.safetensors.index.json; copy"),
        (index_of_another, "says that .* holds model.absent.weight, which it does not"),
        (other_files(), "holds no weights"),
        (other_files("consolidated.00.pth"), "only consolidated.00.pth, which transformers does not read"),
        (other_files("flax_model.msgpack", "training_args.bin"), "only flax_model.msgpack, which"),
        (other_files("pytorch_model.bin"), "pytorch_model.bin is cut off or damaged"),
        (in_config(quantization_config={"quant_method": "awq", "bits": 4}), "by awq, and such weights"),
        (in_config(quantization_config={"quant_method": "gptq"}), "quantised by gptq"),
        (in_config(quantization_config={"quant_method": "compressed-tensors"}), "by compressed-tensors"),
        (in_config(quantization_config={"load_in_4bit": True}), "quantised by bitsandbytes.*peft=qlora"),
        (one_dtype, "quantised by fp8"),
        (packed, "quantised by awq or gptq"),
        (in_config(model_type="gpt2"), "'gpt2' is not supported; supported: .*llama"),
        (in_config(num_attention_heads="many"), "config.json is no config that transformers takes"),
        (in_config(model_type=["llama"]), "holds a model of type .'llama'., which transformers .* does not know"),
        (in_config(hidden_act="nope"), "config.json describes no model that transformers can make .KeyError: 'nope'"),
        (in_config(quantization_config={}), "config.json describes no model"),
        (in_config(num_hidden_layers=5), r"missing keys: model.layers.4.* and \d+ more"),
        (in_config(num_hidden_layers=3), r"unexpected keys: model.layers.3.* and \d+ more"),
        (in_config(vocab_size=130), r"lm_head.weight \[128, 48\] where config.json makes it \[130, 48\]"),
        (marked("config.json"), "config.json begins with a byte order mark"),
        (marked("tokenizer.json"), "tokenizer.json begins with a byte order mark"),
        (marked("generation_config.json"), "generation_config.json begins with a byte order mark"),
        (link(SHARD, "../blobs/12"), "is a link to ../blobs/12, which is not there; copy what it leads to"),
        (link(SHARD, SHARD), "is a link to .*, which is not there"),
        (link("config.json", "nowhere"), "config.json is a link to nowhere"),
        (link("tokenizer.json", "/dev/zero"), "tokenizer.json cannot be read .a device, not a file"),
        (pipe("tokenizer_config.json"), "tokenizer_config.json cannot be read .a pipe, not a file"),
        (pipe("vocab.txt"), "vocab.txt cannot be read .a pipe, not a file"),
        (lambda f: (f / "config.json").write_text("[" * 10**5), "config.json is damaged .*nested too deeply"),
        (lambda f: (f / "tokenizer.json").write_text('{"a":' * 10**5), "tokenizer.json is damaged .*nested too deeply"),
        (lambda f: (f / "generation_config.json").write_text("9" * 5000), "generation_config.json is damaged .*4300"),
        (in_index("../other.safetensors"), "names '../other.safetensors', which is no file beside it"),
        (in_index(3), "names 3, which is no file beside it"),
        (in_header(shape=["a"]), "safetensors is damaged or cut off .*invalid type"),
        (in_header(dtype="ZZ"), "safetensors is damaged or cut off .*unknown variant"),
        (in_header(data_offsets=[0]), "safetensors is damaged or cut off .*header"),
        (whole_numbers, "quantised by I8, and such weights cannot be trained"),
        (
            lambda f: (f / "tokenizer_config.json").write_text(
                '{"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", null]}}'
            ),
            "tokenizer of .* needs code of its own .OwnTokenizer",
        ),
    ],
)  # fmt: skip
def test_what_is_missing_or_damaged_is_named(
    harm: Callable[[Path], Any], words: str, whole: Path, tmp_path: Path, nothing_is_loaded: None
) -> None:
    folder = shutil.copytree(whole / "llm", tmp_path / "llm")
    harm(folder)
    with pytest.raises(UserError, match=f"^llm.path: .*{words}") as caught:
        given_as_llm(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_bins_are_looked_into(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "llm"
    folder.mkdir()
    shutil.copy(whole / "llm/config.json", folder)
    file = folder / "pytorch_model.bin"
    weights = LlamaForCausalLM(TEXT["llama"]()).state_dict()
    for new in (True, False):
        torch.save(weights, file, _use_new_zipfile_serialization=new)
        assert check_folder("llm.path", folder, "llm")["lm_head.weight"].shape == (128, 48)
    torch.save(weights, file)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match="pytorch_model.bin is cut off or damaged"):
        check_folder("llm.path", folder, "llm")
    torch.save({"model": torch.nn.Linear(2, 2)}, file)
    with pytest.raises(UserError, match="not a file of weights alone"):
        check_folder("llm.path", folder, "llm")


def test_quantised_weights_may_be_evaluated_where_their_library_is(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(whole / "llava", tmp_path / "llava")
    in_config(quantization_config={"quant_method": "awq"})(folder)
    with pytest.raises(UserError, match="awq, and transformers cannot read them here .*requires gptqmodel"):
        check_folder("ckpt", folder, "llava", trains=False)
    for library in ("gptqmodel", "accelerate"):
        monkeypatch.setattr(quantizer_awq, f"is_{library}_available", lambda: True)
    check_folder("ckpt", folder, "llava", trains=False)
    with pytest.raises(UserError, match="cannot be trained"):
        check_folder("init_from", folder, "llava")


@pytest.mark.parametrize("harm", ["no weight of a layer", "another width"])
def test_a_whole_llava_is_compared_with_its_config(
    harm: str, whole: Path, tmp_path: Path, nothing_is_loaded: None
) -> None:
    folder = shutil.copytree(whole / "llava", tmp_path / "llava")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.1.mlp.up_proj.weight"))
    if harm == "another width":
        weights[name] = weights[name][:, 1:].contiguous()
    else:
        del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="^init_from: .*(missing|mismatched) keys: .*layers.1.mlp.up_proj.weight"):
        check_folder("init_from", folder, "llava")


@pytest.mark.parametrize(
    ("name", "text"), [("tokenizer.json", "{}"), ("tokenizer.json", "[]"), ("special_tokens_map.json", "[1]")]
)
def test_tokenizer_files_that_cannot_be_read_are_told_whatever_is_wrong(
    name: str, text: str, whole: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(whole / "llm", tmp_path / "llm")
    (folder / name).write_text(text)
    with pytest.raises(UserError, match="^llm.path: .* has no tokenizer that loads .*; copy its tokenizer files"):
        load_tokenizer(folder)


def test_files_that_may_not_be_read_are_named(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    for method in ("open", "iterdir"):
        with monkeypatch.context() as patched:
            patched.setattr(Path, method, refuse)
            with pytest.raises(UserError, match="^llm.path: .* cannot be read .Permission denied."):
                given_as_llm(whole / "llm")
