"""`task=export` of a run, of what it left, and of checkpoints of LLaVA's own code."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from originals import write_original
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tasks.conftest import Command as Shell
from training.synthetic import overrides, write_dataset
from transformers import AutoProcessor, CLIPImageProcessor, LlavaForConditionalGeneration

from mmprune_train import load_model
from mmprune_train.config.command import Command
from mmprune_train.config.compose import compose_config
from mmprune_train.errors import UserError
from mmprune_train.model.weights.base import hash_of, weight_files
from mmprune_train.model.weights.places import public_name
from mmprune_train.storage import secrets
from mmprune_train.storage.files import read_json, write_json
from mmprune_train.tasks import evaluate, export, train
from mmprune_train.tasks.card_facts import _bases, _evaluations
from mmprune_train.tasks.export_source import find_source, load_source

SHORT = ("stage.pretrain.max_steps=1", "stage.instruct.max_steps=2", "evaluate.after_train=false",
         "trainer.precision=fp32", "stage.instruct.lr=0.05")  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "squares", images=4)


@pytest.fixture(scope="module")
def run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose second stage has trained adapters."""
    runs = tmp_path_factory.mktemp("runs")
    batches = [f"stage.{name}.global_batch_size=4" for name in ("pretrain", "instruct")]
    train.run(compose_config([*overrides(root, runs), *SHORT, *batches]))
    ask = ["task=evaluate", f"ckpt={runs}/smoke/t", "evaluate.limit=1", "evaluate.max_new_tokens=2"]
    evaluate.run(compose_config(ask), Command.of(ask))
    return runs / "smoke" / "t"


def exported(out: Path, *typed: str) -> dict[str, Any]:
    typed = ("task=export", f"export.out={out}", *typed)
    return export.run(compose_config(list(typed)), Command.of(typed))


def front_of(folder: Path) -> tuple[dict[str, Any], str]:
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


@torch.no_grad()
def logits_of(model: Any, folder: Path) -> torch.Tensor:
    processor = AutoProcessor.from_pretrained(folder)
    image = Image.effect_noise((60, 40), 90).convert("RGB")
    torch.manual_seed(0)
    inputs = processor(images=[image], text=["<image>\nWhat colour is it?"], return_tensors="pt")
    inputs["pixel_values"] = torch.randn(inputs["pixel_values"].shape, generator=torch.Generator().manual_seed(0))
    return model.eval()(**inputs).logits


def test_a_run_is_exported_merged_and_equals_its_adapters_beside_their_base(run: Path, tmp_path: Path) -> None:
    result = exported(tmp_path / "hf", f"ckpt={run}", "export.license=apache-2.0")
    merged = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf")
    base = LlavaForConditionalGeneration.from_pretrained(run / "pretrain" / "model")
    before = logits_of(base, tmp_path / "hf")
    base.model.multi_modal_projector.load_state_dict(load_file(run / "instruct/adapters/projector.safetensors"))
    beside = logits_of(PeftModel.from_pretrained(base, run / "instruct/adapters"), tmp_path / "hf")
    found = logits_of(merged, tmp_path / "hf")
    torch.testing.assert_close(found, beside, atol=1e-4, rtol=1e-4)
    assert (beside - before).abs().max() > 1e-2, "the adapters do something"
    assert 0 <= result["parity"]["largest_difference"] < 1e-4
    own, its = load_model(run)[0].pruner.settings, load_model(tmp_path / "hf")[0].pruner.settings
    assert own == its and own.vision.enabled
    told = read_json(run / "export" / "result.json")
    assert told["format"] == "hf" and told["dtype"] == "fp32" and told["pruner"] == own.name
    front, text = front_of(tmp_path / "hf")
    assert front["license"] == "apache-2.0" and front["pipeline_tag"] == "image-text-to-text"
    for words in ("instruct.json, 6 samples", "lora, r=", "vision.score", "accuracy", "## Licences", "SHA-256"):
        assert words in text, words
    assert str(run.parent) not in text and str(tmp_path) not in text, "no path of this machine"


@pytest.mark.parametrize("source", ["run", "folder"])
def test_adapters_go_out_with_the_hash_of_their_base_and_come_back_merged(
    source: str, run: Path, tmp_path: Path
) -> None:
    given = run if source == "run" else run / "instruct" / "adapters"
    result = exported(tmp_path / "adapter", f"ckpt={given}", "export.format=adapter")
    record = json.loads((tmp_path / "adapter" / "base.json").read_text())
    known = hash_of(weight_files(run / "pretrain" / "model"))
    assert record["base"]["model"]["sha256"] == known == result["base"]["model"]["sha256"]
    front, _ = front_of(tmp_path / "adapter")
    assert front["library_name"] == "peft" and front["license"] == "unknown"
    (tmp_path / "model").symlink_to(run / "pretrain" / "model")
    again = exported(tmp_path / "merged", f"ckpt={tmp_path}/adapter")
    assert again["parity"]["largest_difference"] < 1e-4
    model = LlavaForConditionalGeneration.from_pretrained(run / "instruct/model")
    merged = LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged")
    expected = logits_of(model, run / "instruct/model")
    torch.testing.assert_close(logits_of(merged, tmp_path / "merged"), expected, atol=1e-4, rtol=1e-4)
    assert load_model(tmp_path / "merged")[0].pruner.settings == load_model(run)[0].pruner.settings


def test_another_base_is_refused_by_its_hash(run: Path, root: Path, tmp_path: Path) -> None:
    exported(tmp_path / "adapter", f"ckpt={run}", "export.format=adapter")
    other = shutil.copytree(run / "pretrain" / "model", tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["language_model.model.norm.weight"] += 1e-3
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(other)})
    )
    with pytest.raises(UserError, match=r"trained on model with SHA-256 .*other has .*give the weights that they"):
        exported(tmp_path / "merged", f"ckpt={tmp_path}/adapter")
    assert not (tmp_path / "merged").exists() and not list(tmp_path.glob(".merged*"))
    start = [*overrides(root, tmp_path / "runs"), *SHORT, f"init_from={tmp_path}/adapter", "stages=[instruct]"]
    with pytest.raises(UserError, match="trained on model with SHA-256"):
        train.run(compose_config(start))


def test_the_layout_of_llavas_own_code_goes_out_and_comes_back(run: Path, tmp_path: Path) -> None:
    model, _ = load_model(run)
    tower = tmp_path / "clip"
    model.hf.model.vision_tower.save_pretrained(tower)
    side = model.config.vision_config.image_size
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side).save_pretrained(tower)
    with pytest.raises(UserError, match="export.vision_tower=NAME"):
        exported(tmp_path / "llava", f"ckpt={run}", "export.format=llava")
    exported(tmp_path / "llava", f"ckpt={run}", "export.format=llava", f"export.vision_tower={tower}")
    assert (tmp_path / "llava" / "mm_projector.bin").is_file()
    exported(tmp_path / "back", f"ckpt={tmp_path}/llava")
    found = LlavaForConditionalGeneration.from_pretrained(tmp_path / "back").state_dict()
    for name, value in model.hf.state_dict().items():
        assert torch.equal(found[name][: len(value)], value), name
    assert load_model(tmp_path / "back")[0].pruner.settings == model.pruner.settings
    again = exported(tmp_path / "again", f"ckpt={tmp_path}/llava", "export.format=llava", "export.dtype=bf16")
    assert again["dtype"] == "bf16" and again["parity"] is None


def test_an_original_checkpoint_is_asked_with_parts_of_the_command_line(
    run: Path, root: Path, tmp_path: Path, mmprune: Shell
) -> None:
    model, processor = load_model(run)
    tower = tmp_path / "clip"
    model.hf.model.vision_tower.save_pretrained(tower)
    side = model.config.vision_config.image_size
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side).save_pretrained(tower)
    original = write_original(tmp_path / "original", model.hf, processor.tokenizer, tower=False)
    ask = ["task=generate", f"ckpt={original}", f"generate.images=[{root}/images/0.png]", "generate.max_new_tokens=2"]
    ask += [f"runs_dir={tmp_path}/runs", "trainer.precision=fp32"]
    code, _, err = mmprune(*ask)
    assert code == 2 and "openai/clip-vit-large-patch14-336" in err and "encoder.path" in err
    code, out, err = mmprune(*ask, f"encoder.path={tower}")
    assert code == 0, err
    assert re.search(r"^ +\d+ +\d+ +\d+$", out, re.MULTILINE), "tokens dense and after both stages"


def texts_of(folder: Path) -> dict[str, str]:
    kinds = (".json", ".md", ".jinja", ".txt", ".yaml")
    return {str(path): path.read_text() for path in folder.rglob("*") if path.suffix in kinds}


def test_no_file_says_where_anything_lay_or_a_secret(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = load_model(run)
    side = model.config.vision_config.image_size
    model.hf.model.vision_tower.save_pretrained(tmp_path / "clip")
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side).save_pretrained(tmp_path / "clip")
    write_original(tmp_path / "original", model.hf, processor.tokenizer, tower=False)
    given = (f"ckpt={tmp_path}/original", f"encoder.path={tmp_path}/clip")
    exported(tmp_path / "out" / "hf", *given)
    exported(tmp_path / "out" / "llava", *given, "export.format=llava", f"export.vision_tower={tmp_path}/clip")
    monkeypatch.setitem(secrets._values, model.pruner.settings.name, "***")
    exported(tmp_path / "out" / "adapter", f"ckpt={run}", "export.format=adapter")
    found = texts_of(tmp_path / "out")
    assert len(found) > 15
    for name, text in found.items():
        assert not [word for word in (str(tmp_path), str(run.parent), '_name_or_path": "/') if word in text], name
    assert json.loads(found[f"{tmp_path}/out/adapter/base.json"])["mmprune"]["pruner"]["name"] == "***"
    assert json.loads(found[f"{tmp_path}/out/llava/config.json"])["mm_vision_tower"] == "clip"
    assert json.loads(found[f"{tmp_path}/out/adapter/adapter_config.json"])["base_model_name_or_path"] == "model"


def test_bases_are_called_as_others_call_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "clip").mkdir(parents=True)
    snapshot = "/cache/hub/models--openai--clip-vit-large-patch14-336/snapshots/0a1b2c"
    names = {
        "models/clip": "clip",
        "/models/clip/": "clip",
        "owner/name": "owner/name",
        snapshot: "openai/clip-vit-large-patch14-336",
    }
    assert {named: public_name(named) for named in names} == names
    for path, source, told in (
        ("models/clip", "clip", "c: clip"),
        ("moved/clip", "clip", "c: clip"),
        ("o/n", "0a1b", "o/n"),
    ):
        config = compose_config([f"encoder.path={path}"])
        source_of = SimpleNamespace(run=tmp_path, found=None, config=config)
        assert _bases(source_of, {"base_weights": {"encoder": {"name": "c", "source": source}}}) == {"encoder": told}


def test_the_card_has_all_evaluations_of_its_own_training_stage(run: Path, tmp_path: Path) -> None:
    own = read_json(run / "evaluate" / "result.json")
    assert own is not None
    other = {"asked": {**own["asked"], "ckpt": "/gone/t/pretrain/model"}}
    compared = {"ckpt": "/gone/t/instruct/model", "comparison": own["comparison"]}
    results = {"": own, "-pretrain": own | other, "-benchmarks": compared, "-pruners.old-1": compared}
    results |= {"-pruners": compared, "-pretrain-pruners": compared | {"ckpt": "/gone/t/pretrain/model"}}
    for name, result in results.items():
        (tmp_path / f"evaluate{name}").mkdir()
        write_json(tmp_path / f"evaluate{name}" / "result.json", result, checked=True)
    told = list(_evaluations(tmp_path, "instruct"))
    assert [text.split()[0] for text in told] == ["evaluate", "evaluate-benchmarks", "evaluate-pruners"]
    assert "accuracy" in told[0] and "Scores [95 % interval]" in told[1], told


def test_a_tower_from_elsewhere_goes_out_as_it_is(run: Path, tmp_path: Path) -> None:
    model, processor = load_model(run)
    side, tower = model.config.vision_config.image_size, model.hf.model.vision_tower
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side).save_pretrained(tmp_path / "clip")
    tower.save_pretrained(tmp_path / "clip")
    expected = {name: value.clone() for name, value in tower.state_dict().items()}
    assert any(not torch.equal(value, value.bfloat16().float()) for value in expected.values())
    write_original(tmp_path / "original", model.hf.bfloat16(), processor.tokenizer, tower=False)
    given = (f"ckpt={tmp_path}/original", f"encoder.path={tmp_path}/clip")
    assert exported(tmp_path / "hf", *given)["dtype"] == "fp32"
    assert exported(tmp_path / "llava", *given, "export.format=llava")["dtype"] == "fp32"
    exported(tmp_path / "back", f"ckpt={tmp_path}/llava", f"encoder.path={tmp_path}/clip")
    for folder in ("hf", "back"):
        found = LlavaForConditionalGeneration.from_pretrained(tmp_path / folder).model.vision_tower.state_dict()
        assert all(torch.equal(found[name], value) for name, value in expected.items()), folder
    inside = load_file(tmp_path / "llava" / "model.safetensors")
    assert any("vision_tower" in name for name in inside), "the tower that was used is not the one of that name"
    config = json.loads((tmp_path / "original" / "config.json").read_text())
    (tmp_path / "original" / "config.json").write_text(json.dumps({**config, "mm_vision_tower": f"{tmp_path}/clip"}))
    assert exported(tmp_path / "by_name", given[0], "export.format=llava")["dtype"] == "bf16"
    assert not any("vision_tower" in name for name in load_file(tmp_path / "by_name" / "model.safetensors"))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_another_dtype_and_small_files_with_an_index(dtype: str, run: Path, tmp_path: Path) -> None:
    result = exported(tmp_path / "out", f"ckpt={run}", f"export.dtype={dtype}", "export.shard_gb=0.0001")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted({*index["weight_map"].values()})
    assert len(files) > 1 and all((tmp_path / "out" / name).stat().st_size for name in files)
    assert result["weights_gb"] == pytest.approx(index["metadata"]["total_size"] / 1e9)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", dtype="auto")
    assert again.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    before = load_model(run, dtype=again.dtype)[0].hf.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in again.state_dict().items())


def test_what_cannot_be_exported_is_told(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs export.out=FOLDER"):
        export.run(compose_config(["task=export", f"ckpt={run}"]))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="export.out: .*taken holds something else"):
        exported(tmp_path / "taken", f"ckpt={run}")
    with pytest.raises(UserError, match=r"export.format=adapter: .*pretrain/model has no adapters"):
        exported(tmp_path / "out", f"ckpt={run}", "stages=[pretrain]", "export.format=adapter")
    with pytest.raises(UserError, match=r"export.format: .*'gguf'|export.format=gguf|did you mean"):
        exported(tmp_path / "out", f"ckpt={run}", "export.format=gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]


def test_the_command_decides_over_the_config_of_the_run_that_adapters_lie_in(run: Path, tmp_path: Path) -> None:
    theirs = shutil.copytree(run, tmp_path / "theirs")
    config = (theirs / "config.yaml").read_text().splitlines()
    changed = [line.replace("trust_components: false", "trust_components: true") for line in config]
    (theirs / "config.yaml").write_text("\n".join(line for line in changed if not line.startswith("# checksum")))
    adapters, out = theirs / "instruct" / "adapters", f"export.out={tmp_path}/out"
    typed = ("task=export", f"ckpt={adapters}", out, "pruner=fastv", f"llm.path={tmp_path}", "encoder.path=owner/name")
    found = find_source(compose_config(list(typed)), Command.of(typed)).config
    assert changed != config and not found.trust_components
    assert (found.llm.path, found.encoder.path, found.pruner.name) == (str(tmp_path), "owner/name", "fastv")
    assert found.stage["instruct"].max_steps == 2, "all else is the run's"
    exported(tmp_path / "out", f"ckpt={adapters}", "pruner=fastv")
    assert load_model(tmp_path / "out")[0].pruner.settings.name == "fastv"


@pytest.mark.parametrize("source", ["", "instruct/adapters"])
def test_adapters_do_not_go_out_with_another_pruner(source: str, run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"export.format=adapter: .*leave pruner= and knee="):
        exported(tmp_path / "out", f"ckpt={run / source}", "export.format=adapter", "pruner=fastv")


def test_merged_weights_that_answer_otherwise_are_refused(run: Path, tmp_path: Path) -> None:
    typed = ("task=export", f"ckpt={run}", f"export.out={tmp_path}/out")
    source = find_source(compose_config(list(typed)), Command.of(typed))
    harmed = shutil.copytree(run / "instruct" / "adapters", tmp_path / "harmed")
    weights = load_file(harmed / "adapter_model.safetensors")
    save_file({name: value + 0.1 for name, value in weights.items()}, harmed / "adapter_model.safetensors")
    with pytest.raises(UserError, match="the merged weights answer otherwise than the adapters"):
        load_source(replace(source, adapters=harmed), Command.of(typed))
