"""Every source that training can start from is recognised, and gives the very weights that lie in it."""

from __future__ import annotations

import functools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from originals import projector_of, write_original
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from mmprune_train.config.compose import compose_config
from mmprune_train.config.schema import Config
from mmprune_train.errors import UserError
from mmprune_train.model.begin import begin, tower_of
from mmprune_train.model.peft import add_adapters, merge_adapters, save_adapters
from mmprune_train.model.weights.adapters import load_adapters
from mmprune_train.model.weights.start import Start, find_start
from mmprune_train.training.network import make_trainable
from mmprune_train.training.precision import Precision


@functools.cache
def config_of(*more: str) -> Config:
    return compose_config(["+experiment=smoke", "stages=[instruct]", *more])


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One trained-looking model in every format: `llava`, `run`, `adapters` (on base weights), `original`, ..."""
    root = tmp_path_factory.mktemp("sources")
    config = config_of()
    model, processor = begin(config)
    add_adapters(model, config.peft)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "multi_modal_projector" in name:
                parameter.normal_(0, 0.1)
    run = root / "run"
    for part in ("model", "adapters"):
        (run / "instruct" / part).mkdir(parents=True)
    save_adapters(model, run / "instruct/adapters", None)
    merge_adapters(model.hf)
    model.save(run / "instruct/model", processor)
    (run / "manifest.json").write_text(json.dumps({"stages": {"instruct": {"state": "done"}}}))
    tokenizer = AutoTokenizer.from_pretrained(run / "instruct/model")
    projector = root / "projector"
    projector.mkdir()
    torch.save(projector_of(model.hf), projector / "mm_projector.bin")
    torch.save(projector_of(model.hf, ""), root / "bare.bin")
    lora = root / "original_lora"
    shutil.copytree(run / "instruct/adapters", lora)
    (lora / "projector.safetensors").unlink()
    named = {f"base_model.model.{name}": value for name, value in projector_of(model.hf).items()}
    torch.save(named, lora / "non_lora_trainables.bin")
    weights = load_file(lora / "adapter_model.safetensors")
    (lora / "adapter_model.safetensors").unlink()
    plain = {name.replace("language_model.", ""): value for name, value in weights.items()}
    torch.save(plain, lora / "adapter_model.bin")
    told = json.loads((lora / "adapter_config.json").read_text())
    told["base_model_name_or_path"] = "lmsys/vicuna-7b-v1.5"
    (lora / "adapter_config.json").write_text(json.dumps(told))
    return {
        "run": run,
        "stage": run / "instruct",
        "llava": run / "instruct/model",
        "adapters": run / "instruct/adapters",
        "original_lora": lora,
        "original": write_original(root / "original", model.hf, tokenizer),
        "original_bins": write_original(root / "bins", model.hf, tokenizer, bins=True),
        "original_without_tower": write_original(root / "no_tower", model.hf, tokenizer, tower=False),
        "projector": projector,
        "projector_file": projector / "mm_projector.bin",
        "bare": root / "bare.bin",
    }


def started(config: Config, source: Path) -> tuple[Start, LlavaForConditionalGeneration]:
    start = find_start(config, "init_from", str(source), "instruct")
    return start, begin(config, start)[0].hf


WHOLE = ("run", "stage", "llava", "adapters", "original_lora", "original", "original_bins", "original_without_tower")


@pytest.mark.parametrize("name", WHOLE)
def test_a_source_gives_all_its_weights(name: str, sources: dict[str, Path]) -> None:
    expected = LlavaForConditionalGeneration.from_pretrained(sources["llava"]).state_dict()
    _, hf = started(
        config_of("init_adapters=merge" if "adapters" in name or "lora" in name else "seed=42"), sources[name]
    )
    found = hf.state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-6, rtol=1e-6, msg=key)


@pytest.mark.parametrize("name", ["projector", "projector_file", "bare"])
def test_a_projector_stands_beside_the_chosen_encoder_and_llm(name: str, sources: dict[str, Path]) -> None:
    trained = LlavaForConditionalGeneration.from_pretrained(sources["llava"]).model.multi_modal_projector.state_dict()
    start, hf = started(config_of(), sources[name])
    base = begin(config_of())[0].hf.state_dict()
    for key, value in hf.state_dict().items():
        own = trained[key.split("projector.")[1]] if "multi_modal_projector" in key else base[key]
        assert torch.equal(value, own), key
    assert start.needs == ("encoder", "llm") and not start.new_projector


def test_which_base_weights_a_source_needs(sources: dict[str, Path]) -> None:
    needs = {name: find_start(config_of(), "init_from", str(path), "instruct").needs for name, path in sources.items()}
    both = ("encoder", "llm")
    assert needs == {
        "run": (), "stage": (), "llava": (), "adapters": both, "original_lora": both, "original": (),
        "original_bins": (), "original_without_tower": ("encoder",), "projector": both, "projector_file": both,
        "bare": both,
    }  # fmt: skip


def test_base_weights_of_a_whole_model_are_not_looked_for(sources: dict[str, Path]) -> None:
    away = ["llm.path=owner/llm", "encoder.path=owner/clip"]
    for name in ("llava", "original"):
        started(config_of(*away), sources[name])
    with pytest.raises(UserError, match="owner/llm are missing|cannot get the weights owner/llm"):
        started(config_of(*away), sources["projector"])


@pytest.mark.parametrize("name", ["adapters", "original_lora"])
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_are_trained_further_where_the_stage_has_the_same(
    name: str, dora: bool, sources: dict[str, Path], tmp_path: Path
) -> None:
    config = config_of(*(["peft=dora", "peft.r=8", "peft.alpha=16", "peft.dropout=0"] if dora else []))
    source = sources[name]
    if dora:
        model, _ = begin(config)
        add_adapters(model, config.peft)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(0, 0.1)
        save_adapters(model, tmp_path, None)
        source = tmp_path
    start = find_start(config, "init_from", str(source), "instruct")
    assert start.goes_on and start.adapted is None
    model, _ = begin(config, start)
    make_trainable(model, config, "instruct", Precision(torch.float32, ""))
    load_adapters(model.hf, "init_from", source)
    assert all(p.requires_grad for key, p in model.named_parameters() if "lora_" in key)
    merge_adapters(model.hf)
    merged = started(config_of("init_adapters=merge"), source)[1].state_dict()
    for key, value in model.hf.state_dict().items():
        torch.testing.assert_close(value, merged[key], atol=1e-6, rtol=1e-6, msg=key)


def test_other_adapter_settings_merge_and_cannot_be_continued(sources: dict[str, Path]) -> None:
    start = find_start(config_of("peft.r=4"), "init_from", str(sources["adapters"]), "instruct")
    assert not start.goes_on and start.adapted == str(sources["adapters"].resolve())
    assert not find_start(config_of("peft=none"), "init_from", str(sources["adapters"]), "instruct").goes_on
    for override, words in (
        ("peft.r=4", r"peft.r=4 \(the folder: 8\)"),
        ("peft.target_modules=[q_proj]", r"peft.target_modules=\['q_proj'\] \(the folder: .*k_proj"),
        ("peft=none", "stage.instruct trains no adapters"),
    ):
        with pytest.raises(UserError, match=f"init_adapters=continue: .*{words}.*init_adapters=merge"):
            config = config_of(override, "init_adapters=continue")
            find_start(config, "init_from", str(sources["adapters"]), "instruct")


def test_adapters_on_a_part_of_the_llm_merge_where_the_stage_adapts_all_of_it(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    """Told by the names of what is adapted, before a run directory is made and the network is built."""
    for number, (absent, words) in enumerate(
        ((".layers.1.", "a part of the layers alone .*1.mlp.down_proj"), (".k_proj.", "target_modules=.*k_proj"))
    ):
        folder = shutil.copytree(sources["adapters"], tmp_path / f"{number}")
        weights = load_file(folder / "adapter_model.safetensors")
        kept = {name: value for name, value in weights.items() if absent not in name}
        save_file(kept, folder / "adapter_model.safetensors", {"format": "pt"})
        assert not find_start(config_of(), "init_from", str(folder), "instruct").goes_on
        with pytest.raises(UserError, match=f"init_adapters=continue: .*{words}"):
            find_start(config_of("init_adapters=continue"), "init_from", str(folder), "instruct")


def test_adapters_find_the_model_they_belong_to(sources: dict[str, Path], tmp_path: Path) -> None:
    """By the path in their config, beside them where the run was moved, and through other adapters."""
    shutil.copytree(sources["run"], tmp_path / "moved")
    folder = tmp_path / "moved/second/adapters"
    shutil.copytree(sources["adapters"], folder)
    told = json.loads((folder / "adapter_config.json").read_text())
    expected = LlavaForConditionalGeneration.from_pretrained(sources["llava"]).state_dict()
    for base in ("/gone/run/instruct/model", str(sources["llava"]), "/gone/run/instruct/adapters"):
        (folder / "adapter_config.json").write_text(json.dumps({**told, "base_model_name_or_path": base}))
        start, hf = started(config_of("init_adapters=merge"), folder)
        assert start.base is not None
        name = "model.language_model.layers.0.self_attn.q_proj.weight"
        plain = begin(config_of())[0].hf.state_dict()[name]
        twice = expected[name] + (expected[name] - plain)  # the same adapters on what they were merged into
        torch.testing.assert_close(hf.state_dict()[name], twice, atol=1e-5, rtol=1e-5)
    (folder / "adapter_config.json").write_text(json.dumps({**told, "base_model_name_or_path": "/gone/elsewhere"}))
    with pytest.raises(UserError, match=r"belong to /gone/elsewhere, which is not here.*base_model_name_or_path"):
        find_start(config_of(), "init_from", str(folder), "instruct")


@pytest.mark.parametrize("name", ["llava", "adapters", "original", "original_without_tower", "projector"])
def test_without_weights_it_is_the_same_network(name: str, sources: dict[str, Path]) -> None:
    start = find_start(config_of(), "init_from", str(sources[name]), "instruct")
    full, hollow = (begin(config_of(), start, empty=empty)[0].hf for empty in (False, True))
    assert all(parameter.is_meta for parameter in hollow.parameters())
    shapes = [{key: value.shape for key, value in hf.named_parameters()} for hf in (full, hollow)]
    assert shapes[0] == shapes[1]


def test_the_feature_cache_is_filled_with_the_sources_tower(sources: dict[str, Path]) -> None:
    expected = LlavaForConditionalGeneration.from_pretrained(sources["llava"]).model.vision_tower.state_dict()
    config = config_of("seed=7")  # whose own random tower is another
    for name in ("llava", "original"):
        start = find_start(config, "init_from", str(sources[name]), "instruct")
        for key, value in tower_of(config, start).state_dict().items():
            assert torch.equal(value, expected[key]), (name, key)


@pytest.mark.parametrize(
    ("source", "overrides", "words"),
    [
        ("llava", ["llm.arch.hidden_size=32"], "llm.arch.hidden_size=32, there 64"),
        ("llava", ["llm.arch.num_hidden_layers=6"], "llm.arch.num_hidden_layers=6, there 4"),
        ("llava", ["llm.arch.vocab_size=300"], "llm.arch.vocab_size=300, there 512"),
        ("llava", ["llm.arch.model_type=mistral"], "llm.arch.model_type=mistral, there llama"),
        ("llava", ["encoder.feature_layer=-1"], "encoder.feature_layer=-1, there -2"),
        ("llava", ["encoder.arch.image_size=64", "encoder.image_size=64"], "image_size=64, there 48"),
        ("llava", ["encoder.patch_size=16", "encoder.arch.patch_size=16"], "patch_size=16, there 8"),
        ("llava", ["encoder.image_mean=[0.5,0.5,0.5]"], r"encoder.image_mean=\[0.5, 0.5, 0.5\], there"),
        ("llava", ["projector=linear"], "projector.name=linear, there mlp2x_gelu"),
        ("original", ["llm.arch.hidden_size=32", "encoder.arch.hidden_size=48"], "=32, there 64; .*=48, there 32"),
        ("original_without_tower", ["encoder.path=openai/clip-vit-base-patch32"], "encoder.path=.*32, there .*-336"),
        ("original", ["encoder.feature_layer=-1"], "encoder.feature_layer=-1, there -2"),
        ("original", ["encoder.arch.image_size=64", "encoder.image_size=64"], "=64, there 36"),
        ("projector", ["llm.arch.hidden_size=32"], "llm.arch.hidden_size=32, there 64"),
        ("projector", ["encoder.arch.hidden_size=64"], "encoder.arch.hidden_size=64, there 32"),
        ("projector", ["projector=linear"], "projector.name=linear, there mlp2x_gelu"),
        ("adapters", ["llm.arch.num_hidden_layers=3"], "num_hidden_layers=3, there 4 or more"),
        ("adapters", ["llm.arch.hidden_size=32"], "llm.arch.hidden_size=32, there 64"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_with_both_values_before_anything_is_built(
    source: str, overrides: list[str], words: str, sources: dict[str, Path]
) -> None:
    with pytest.raises(UserError, match=f"^init_from: .*{words}.*; choose") as caught:
        find_start(config_of(*overrides), "init_from", str(sources[source]), "instruct")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end=true"),
        ({"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type=spatial_unpad"),
        ({"model_type": "llava_mpt"}, "of type 'llava_mpt' is not supported"),
        ({"mm_projector_type": "mlp2x_gelu", "quantization_config": {"quant_method": "awq"}}, "quantised by awq"),
    ],
)
def test_original_checkpoints_of_another_kind_are_named(
    field: dict[str, Any], words: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(sources["original"], tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **field}))
    with pytest.raises(UserError, match=words):
        find_start(config_of(), "init_from", str(folder), "instruct")


def test_a_linear_projector_is_taken_up(tmp_path: Path) -> None:
    config = config_of("projector=linear")
    weight, bias = torch.randn(64, 32), torch.randn(64)
    torch.save({"model.mm_projector.weight": weight, "model.mm_projector.bias": bias}, tmp_path / "mm_projector.bin")
    projector = started(config, tmp_path)[1].model.multi_modal_projector
    features = torch.randn(3, 32)
    torch.testing.assert_close(projector(features), features @ weight.T + bias)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda f: None, r"there is no .*give a llava-hf folder"),
        (lambda f: f.mkdir(), "holds no model .*, where .* is wanted"),
        (lambda f: torch.save({"a": torch.ones(2)}, f), "holds no projector that is known .*found a"),
        (lambda f: torch.save([1], f), "holds a list, not weights by name"),
        (lambda f: f.write_bytes(b"PK\x03\x04 half a file"), "is cut off or damaged"),
    ],
)
def test_what_nothing_can_start_from_is_named(make: Any, words: str, tmp_path: Path) -> None:
    path = tmp_path / "source.bin"
    make(path)
    with pytest.raises(UserError, match=f"^init_from: .*{words}"):
        find_start(config_of(), "init_from", str(path), "instruct")


def test_a_plain_llm_and_an_encoder_are_told_where_they_belong(sources: dict[str, Path], tmp_path: Path) -> None:
    hf = LlavaForConditionalGeneration.from_pretrained(sources["llava"])
    hf.model.vision_tower.save_pretrained(tmp_path / "encoder")
    config = {**hf.config.text_config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm/config.json").write_text(json.dumps(config))
    for name, key in (("llm", "llm.path"), ("encoder", "encoder.path")):
        with pytest.raises(UserError, match=f"init_from: .*/{name} holds a .*; give it as {re.escape(key)}"):
            find_start(config_of(), "init_from", str(tmp_path / name), "instruct")


def test_an_image_token_that_the_tokenizer_has_elsewhere_is_named(sources: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(sources["llava"], tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    names = [name for name in ("image_token_index", "image_token_id") if name in config]
    (folder / "config.json").write_text(json.dumps({**config, **dict.fromkeys(names, 9)}))
    with pytest.raises(UserError, match="<image>.*=3, there 9"):
        find_start(config_of(), "init_from", str(folder), "instruct")


def test_adapters_that_cannot_be_taken_up_are_named(sources: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(sources["adapters"], tmp_path / "other")
    told = json.loads((folder / "adapter_config.json").read_text())
    for field, words in (
        ({"peft_type": "IA3"}, "peft_type=IA3"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps({**told, **field}))
        with pytest.raises(UserError, match=f"{words}.*merge them into their model"):
            find_start(config_of(), "init_from", str(folder), "instruct")
    weights = load_file(folder / "adapter_model.safetensors")
    weights["base_model.model.model.vision_tower.layers.0.q_proj.lora_A.weight"] = torch.ones(2, 2)
    (folder / "adapter_config.json").write_text(json.dumps(told))
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="adapts .*vision_tower.*decoder layers"):
        find_start(config_of(), "init_from", str(folder), "instruct")
