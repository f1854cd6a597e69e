"""From the config to the table: both stages, evaluation, and what the same command does the second time."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from training.synthetic import overrides, write_dataset
from transformers import AutoConfig, AutoModel, LlamaForCausalLM, LlavaForConditionalGeneration

from mmprune_train.config.command import Command
from mmprune_train.config.compose import compose_config, load_pruner
from mmprune_train.config.schema import Config
from mmprune_train.errors import UserError
from mmprune_train.model.build import load_model
from mmprune_train.model.tokenizer import tiny_tokenizer
from mmprune_train.storage.files import read_json
from mmprune_train.tasks import checkpoint, evaluate, generate, inspect, preflight, prepare, train
from mmprune_train.tasks.checkpoint import Results, find_checkpoint
from mmprune_train.training.inputs import stage_image_processor


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "squares")


@pytest.fixture(scope="module")
def finished(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, dict, Path]:
    """One smoke run, its result and its directory; in fp32, because in bf16 frozen weights are kept and saved in it."""
    runs = tmp_path_factory.mktemp("runs")
    config = compose_config(
        [*overrides(root, runs), "stage.pretrain.max_steps=2", "stage.instruct.max_steps=3", "evaluate.limit=4",
         "stage.instruct.group_by_modality=false", "logger=[csv,tensorboard]", "trainer.precision=fp32"]
    )  # fmt: skip
    return config, train.run(config), runs / "smoke" / "t"


def test_the_run_directory_is_the_contracts(finished: tuple[Config, dict, Path]) -> None:
    _, result, folder = finished
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [(name, stage["state"]) for name, stage in manifest["stages"].items()] == [
        ("pretrain", "done"),
        ("instruct", "done"),
    ]
    assert "random" in manifest["base_weights"]["llm"]["source"]
    assert read_json(folder / "result.json") == json.loads(json.dumps(result))
    for stage, steps in (("pretrain", 2), ("instruct", 3)):
        assert len((folder / stage / "metrics.jsonl").read_text().splitlines()) == steps
        assert len((folder / stage / "metrics.csv").read_text().splitlines()) == steps + 1
        assert list((folder / stage / "tensorboard").glob("events*"))
        assert (folder / stage / "model" / "config.json").is_file()
    assert (folder / "config.yaml").is_file()


def test_pretraining_moves_the_projector_alone_and_instruction_tuning_goes_on_from_there(
    finished: tuple[Config, dict, Path],
) -> None:
    config, _, folder = finished
    from mmprune_train.model.begin import begin

    base = dict(begin(config)[0].hf.named_parameters())
    first = dict(load_model(folder / "pretrain" / "model")[0].hf.named_parameters())
    second = dict(load_model(folder / "instruct" / "model")[0].hf.named_parameters())
    assert base.keys() == first.keys() == second.keys()
    moved_first = {name for name in base if not torch.equal(base[name], first[name])}
    moved_second = {name for name in first if not torch.equal(first[name], second[name])}
    assert moved_first and all("multi_modal_projector" in name for name in moved_first)
    assert any("q_proj" in name for name in moved_second), "merged adapters"
    assert not any("vision_tower" in name or "embed_tokens" in name for name in moved_second)


def test_the_model_folder_is_hugging_faces_own(finished: tuple[Config, dict, Path]) -> None:
    config, _, folder = finished
    _, info = LlavaForConditionalGeneration.from_pretrained(folder / "instruct" / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    model, _ = load_model(folder)
    assert model.pruner.settings == config.pruner and model.template == "v1"


def test_the_result_has_the_tables_numbers(finished: tuple[Config, dict, Path]) -> None:
    _, result, folder = finished
    scores = result["evaluate"]
    for key in ("accuracy", "blind_majority", "accuracy_blank"):
        assert set(scores[key]) == {"open", "yes_no"}
    assert 0 < scores["keep_ratio"] < 1
    assert scores["tokens_dense"] > scores["tokens_stage1"] >= scores["tokens_stage2"]
    assert result["stages"]["instruct"]["step_seconds"] > 0
    rows = [json.loads(line) for line in (folder / "evaluate" / "predictions.jsonl").open()]
    assert len(rows) == 8
    keys = "id question prediction answer visual_tokens_dense visual_tokens_stage1 visual_tokens_stage2"
    assert list(rows[0]) == keys.split() and "<image>" not in rows[0]["question"]
    assert rows[0]["visual_tokens_dense"] >= rows[0]["visual_tokens_stage1"] >= rows[0]["visual_tokens_stage2"]


def test_a_finished_run_prints_its_table_again_and_trains_nothing(
    finished: tuple[Config, dict, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, result, _ = finished
    monkeypatch.setattr(train, "_train", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(preflight, "find_inputs", lambda *_: pytest.fail("looked for weights"))
    assert train.run(config) == json.loads(json.dumps(result))
    told = capsys.readouterr().out
    assert "blind majority" in told and "image blanked" in told and "seconds per step" in told
    assert "nothing is trained (" in told
    other = replace(config, logger=["csv"], trainer=replace(config.trainer, attention="flash_3", feature_cache=True))
    train.run(other)
    idle = "trainer.feature_cache=True, trainer.attention=flash_3, logger=['csv'] has no effect"
    assert f"nothing is trained, {idle} (" in capsys.readouterr().out
    without = replace(config, evaluate=replace(config.evaluate, after_train=False))
    assert train.run(without)["evaluate"] == result["evaluate"], "what was evaluated is kept"
    assert "nothing is trained (" in capsys.readouterr().out


def test_a_finished_run_is_not_shown_as_another_files(finished: tuple[Config, dict, Path], root: Path) -> None:
    config, result, _ = finished
    file = root / "instruct.json"
    before = file.read_text()
    told = result["stages"]["instruct"]["data"]
    assert (told["file"], told["samples"], told["used"]) == ("instruct.json", 18, 18) and "stamp" not in told
    file.write_text(json.dumps(json.loads(before)[1:]))
    with pytest.raises(
        UserError, match=r"instruct\.json has changed since .* trained on it \(18 samples then, 17 now\)"
    ):
        train.run(config)
    file.write_text(before)
    assert train.run(config) == json.loads(json.dumps(result))


def test_evaluate_again_gives_the_same_answers_and_another_pruner_keeps_other_tokens(
    finished: tuple[Config, dict, Path],
) -> None:
    config, result, folder = finished
    earlier = (folder / "evaluate/predictions.jsonl").read_text()
    again = evaluate.run(replace(config, task="evaluate", ckpt=str(folder)))
    assert (folder / "evaluate.old1/predictions.jsonl").read_text() == earlier
    same = ("accuracy", "accuracy_blank", "blind_majority", "keep_ratio", "tokens_stage2")
    assert {key: again[key] for key in same} == {key: result["evaluate"][key] for key in same}
    found = replace(find_checkpoint(replace(config, ckpt=str(folder))), pruner=load_pruner("none"))
    dense = evaluate.evaluate_checkpoint(found, evaluate.question_set(config), Results(folder / "dense"))
    assert dense["keep_ratio"] == 1.0 and dense["tokens_stage1"] == dense["tokens_dense"]


def test_generate_answers_about_an_image(
    finished: tuple[Config, dict, Path], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, _, folder = finished
    asked = replace(config.generate, images=[str(root / "images" / "0.png")], max_new_tokens=4)
    result = generate.run(replace(config, ckpt=str(folder), generate=asked))
    assert result["tokens"]["dense"] >= result["tokens"]["stage1"] > result["tokens"]["stage2"] > 0
    assert result["prediction"] in capsys.readouterr().out
    with pytest.raises(UserError, match="no file absent.png"):
        generate.run(replace(config, ckpt=str(folder), generate=replace(asked, images=["absent.png"])))


@pytest.mark.parametrize("task", [generate, inspect])
def test_a_picture_that_cannot_be_read_is_named_before_a_model_is_loaded(task: Any, tmp_path: Path) -> None:
    config = compose_config(["+experiment=smoke", f"ckpt={tmp_path}/no_model"])
    (tmp_path / "x.png").write_bytes(b"no picture")
    for path, why in ((tmp_path / "x.png", "no image of a format"), (tmp_path, "a folder, not a file")):
        asked = replace(config.generate, images=[str(path)])
        with pytest.raises(UserError, match=f"^generate.images: image {path} cannot be read .{why}"):
            task.run(replace(config, generate=asked))


def test_orientation_is_the_command_lines_else_the_models_else_the_configs(
    finished: tuple[Config, dict, Path],
) -> None:
    config, _, folder = finished
    turned = replace(config, data=replace(config.data, exif_orientation=False))
    trained = load_model(folder)[1].image_processor
    assert trained.exif_orientation and not stage_image_processor(turned, "instruct").exif_orientation
    checkpoint.choose_orientation(trained, False, named=False)
    assert trained.exif_orientation, "as it was trained"
    asked = Command.of(["data.root=x", "++data.exif_orientation=false"])
    found = checkpoint.find_checkpoint(replace(turned, ckpt=str(folder)), asked)
    _, processor, _ = checkpoint.load(found)
    assert not processor.image_processor.exif_orientation, "as it is asked for"
    of_others = SimpleNamespace()
    checkpoint.choose_orientation(of_others, False, named=False)
    assert not of_others.exif_orientation, "where the folder does not say"


def test_an_encoder_of_other_patches_is_named_before_a_run_directory_is_made(root: Path, tmp_path: Path) -> None:
    arch = {**compose_config(["+experiment=smoke"]).encoder.arch, "patch_size": 16}
    AutoModel.from_config(AutoConfig.for_model(**arch)).save_pretrained(tmp_path / "clip")
    config = compose_config([*overrides(root, tmp_path / "runs"), f"encoder.path={tmp_path}/clip"])
    with pytest.raises(UserError, match=r"encoder.image_size=48, encoder.patch_size=8 are 36 .*patch_size=16, makes 9"):
        train.run(config)
    assert not (tmp_path / "runs").exists()


def test_a_mistake_in_the_second_stages_data_is_told_before_the_first_is_trained(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "squares")
    (data / "instruct.json").write_text('[{"id": "x", "conversations": []}]')
    with pytest.raises(UserError, match="instruct.json"):
        train.run(compose_config(overrides(data, tmp_path / "runs")))
    assert not (tmp_path / "runs").exists()


def test_each_stage_has_a_wandb_run_of_its_own(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "squares")
    short = ["stage.pretrain.max_steps=1", "stage.instruct.max_steps=1", "evaluate.after_train=false"]
    train.run(compose_config([*overrides(data, tmp_path / "runs"), "logger=wandb", *short]))
    for stage in ("pretrain", "instruct"):
        (found,) = (tmp_path / "runs/smoke/t" / stage).glob("wandb/offline-run-*/*.wandb")
        assert stage in found.name


def test_a_loaded_processor_pads_on_the_left(finished: tuple[Config, dict, Path], root: Path) -> None:
    """Answers then begin at one place: after the input."""
    model, processor = load_model(finished[2])
    image = Image.open(root / "images/0.png").convert("RGB")
    texts = ["<image>\nWhat is it?", "<image>\nWhat colour is the square, please?"]
    both = processor(images=[image, image], text=texts, padding=True, return_tensors="pt")
    assert both["attention_mask"][:, -1].tolist() == [1, 1]
    start = both["input_ids"].shape[1]
    answers = model.generate(**both, max_new_tokens=4)[:, start:]
    alone = processor(images=[image], text=texts[:1], return_tensors="pt")
    first = model.generate(**alone, max_new_tokens=4)[0, alone["input_ids"].shape[1] :]
    assert answers[0, : len(first)].tolist() == first.tolist()


@pytest.mark.parametrize("task", [train, prepare])
def test_all_that_is_missing_is_told_in_one_list(
    task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    runs, data = tmp_path / "runs", tmp_path / "data"
    with pytest.raises(UserError) as caught:
        task.run(compose_config(["+experiment=llava7b_twostage", f"runs_dir={runs}", f"data.root={data}"]))
    head, *lines = str(caught.value).splitlines()
    assert head.startswith("5 things")
    for line, words in zip(
        lines,
        [
            r"data.pretrain.annotations: .* is missing; data.pretrain.images: .* is missing; .*LLaVA-Pretrain",
            r"data.instruct.annotations: .* is missing; .*data.root=FOLDER",
            *([r"trainer.accelerator=cuda: no CUDA device"] if task is train else []),
            r"encoder.path: .*openai/clip-vit-large-patch14-336.*hf download",
            r"llm.path: .*lmsys/vicuna-7b-v1.5.*hf download",
            *([] if task is train else [r"trainer.accelerator=cuda: no CUDA device"]),
        ],
        strict=True,
    ):
        assert re.search(words, line), line
    assert not runs.exists(), "a run that cannot start leaves nothing behind"


def test_one_thing_that_is_missing_is_one_line(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^llm\.path: there is no folder \./absent") as caught:
        train.run(compose_config([*overrides(root, tmp_path / "runs"), "llm.path=./absent"]))
    assert "\n" not in str(caught.value) and not (tmp_path / "runs").exists()


def test_weights_that_lack_a_tensor_leave_no_run_directory(root: Path, tmp_path: Path) -> None:
    """Their headers are in order: it shows when they are loaded, after the run directory was made."""
    folder, runs = tmp_path / "llm", tmp_path / "runs"
    config = compose_config(overrides(root, runs))
    LlamaForCausalLM(AutoConfig.for_model(**config.llm.arch)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="missing keys: model.norm.weight"):
        train.run(replace(config, llm=replace(config.llm, path=str(folder))))
    assert not (runs / "smoke/t").exists()


def test_prepare_says_where_everything_lies(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = prepare.run(compose_config(overrides(root, tmp_path)))
    assert result["data.instruct"] == str(root / "instruct.json") and result["llm"] is None
    assert "random initialisation" in capsys.readouterr().out


def test_an_unknown_stage_is_named(root: Path, tmp_path: Path) -> None:
    config = compose_config(overrides(root, tmp_path))
    with pytest.raises(UserError, match="stages=instrcut: .*did you mean instruct"):
        train.run(replace(config, stages=["instrcut"]))
