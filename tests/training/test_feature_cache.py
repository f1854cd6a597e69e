"""Training with the feature cache is training, without the encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import packed, tiny_llava
from training.killed import killed_after
from training.short import sample
from training.synthetic import overrides, write_dataset

from mmprune_train.config.compose import compose_config
from mmprune_train.config.schema import Config
from mmprune_train.data.batch import Sample, collate
from mmprune_train.data.encode import Example
from mmprune_train.errors import UserError
from mmprune_train.model.images import ImageSide
from mmprune_train.packed.patches import Patches
from mmprune_train.pruning import Kind
from mmprune_train.tasks import prepare, train
from mmprune_train.training.run import run_stage
from mmprune_train.training.rundir import open_run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "squares")


DIFFERENT = 12
"""Images of other content than the ones before them: four colours on three widths."""


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of all chunks that an encoder reads."""
    sizes: list[int] = []
    encode = ImageSide.encode_images

    def counting(self: ImageSide, pixels: torch.Tensor) -> Any:
        sizes.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(ImageSide, "encode_images", counting)
    return sizes


def config_of(root: Path, runs: Path, *more: str) -> Config:
    short = ["stage.pretrain.max_steps=2", "stage.instruct.max_steps=6", "evaluate.after_train=false"]
    batches = ["stage.instruct.batch_size=2", "stage.instruct.global_batch_size=4", "trainer.precision=fp32"]
    alike = ["stage.pretrain.image_aspect_ratio=pad", "stage.instruct.group_by_modality=true"]
    return compose_config([*overrides(root, runs), *short, *batches, *alike, *more])


def cached(root: Path, tmp_path: Path, *more: str, runs: str = "cached") -> Config:
    cache = ["trainer.feature_cache=true", f"trainer.feature_cache_dir={tmp_path / 'features'}"]
    return config_of(root, tmp_path / runs, *cache, *more)


def rows_of(config: Config, stage: str) -> list[dict[str, Any]]:
    folder = Path(config.runs_dir) / "smoke" / "t" / stage
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


@pytest.mark.parametrize(
    "more",
    [
        pytest.param([], id="plain"),
        pytest.param(["projector.init=matched", "trainer.num_workers=2"], id="workers", marks=pytest.mark.slow),
    ],
)
def test_losses_and_weights_are_those_without_it(
    more: list[str], root: Path, tmp_path: Path, encoded: list[int]
) -> None:
    """Text-only and two-image samples, in batches of one modality, are among them."""
    plain, kept = config_of(root, tmp_path / "plain", *more), cached(root, tmp_path, *more)
    train.run(plain)
    encoded.clear()
    train.run(kept)
    assert sum(encoded) == DIFFERENT, "each image once, for both stages"
    for stage, steps in (("pretrain", 2), ("instruct", 6)):
        rows, expected = rows_of(kept, stage), rows_of(plain, stage)
        assert len(rows) == steps
        for row, other in zip(rows, expected, strict=True):
            assert row["loss"] == pytest.approx(other["loss"], abs=1e-6, rel=1e-6)
            assert 0 < row["tflops"] * row["step_seconds"] <= other["tflops"] * other["step_seconds"]
            for key in ("tokens_dense", "tokens_stage1", "tokens_stage2", "supervised_tokens"):
                assert row[key] == other[key]
    weights, others = (load_file(Path(c.runs_dir) / "smoke/t/instruct/model/model.safetensors") for c in (kept, plain))
    assert weights.keys() == others.keys() and any("vision_tower" in name for name in weights)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_filled_cache_trains_without_encoder_under_other_settings_of_stage_2(
    root: Path, tmp_path: Path, encoded: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    result = prepare.run(cached(root, tmp_path))
    (report,) = result["features"].values()
    assert sum(encoded) == report["encoded"] == report["images"] == DIFFERENT
    assert report["dense_bytes"] / report["bytes"] == report["ratio"] and report["images_per_second"] > 0
    assert report["bytes"] == sum(file.stat().st_size for file in Path(report["folder"]).glob("*.safetensors"))
    assert json.loads((tmp_path / "cached/smoke/t/prepare/result.json").read_text()) == result
    assert "features of pretrain and instruct" in capsys.readouterr().out
    encoded.clear()
    losses = []
    for layer in (1, 2):
        config = cached(root, tmp_path, f"pruner.language.layer={layer}", runs=f"layer{layer}")
        train.run(config)
        losses.append([row["loss"] for row in rows_of(config, "instruct")])
    assert encoded == [] and losses[0] != losses[1]
    assert f"{DIFFERENT} images" in capsys.readouterr().out
    train.run(cached(root, tmp_path, "pruner.vision.score=cls_cosine", runs="cosine"))
    assert sum(encoded) == DIFFERENT, "another stage 1"


def test_a_bad_image_is_named_before_training(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "squares")
    (data / "images" / "9.png").write_bytes(b"no image")
    config = cached(data, tmp_path)
    with pytest.raises(UserError, match=r"pretrain.json\[9\] \(id p9\): image .*9\.png cannot be read"):
        train.run(config)
    assert not (tmp_path / "cached/smoke/t/pretrain/metrics.jsonl").exists()


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(root: Path, tmp_path: Path) -> None:
    def run(runs: str) -> list[float]:
        config = cached(root, tmp_path, "trainer.checkpoint_every_steps=2", "peft.dropout=0.3", runs=runs)
        run_stage(config, "instruct", open_run(config), None)
        return [row["loss"] for row in rows_of(config, "instruct")]

    whole = run("whole")
    with killed_after(3):
        run("killed")
    assert run("killed") == whole and len(set(whole)) == 6


def test_samples_that_share_an_image_share_its_features() -> None:
    model = packed(tiny_llava(), "twostage")
    one, two, three = sample(1), sample(2), sample(3)
    one, two = (Sample(s.example, three.images, three.pixels) for s in (one, two))
    pixels = [one, two, three, sample(4)]
    rows = {s.images[0]: model.select_patches(s.pixels[0][None]) for s in pixels}
    features = [Sample(s.example, s.images, [], rows[s.images[0]]) for s in pixels]
    read, held = collate(pixels), collate(features)
    assert held.pixel_values is None and held.patches is not None and held.images == read.images
    assert len(held.patches.kept) == len(rows) == 2
    plain = model.forward_packed(read.sequence, read.pixel_values)
    output = model.forward_packed(held.sequence, None, patches=held.patches)
    torch.testing.assert_close(output.loss_sum, plain.loss_sum, rtol=1e-6, atol=1e-6)
    assert plain.trace.encoded == 2 and output.trace.encoded == 0
    assert [x.tolist() for x in output.trace.vision_kept] == [x.tolist() for x in plain.trace.vision_kept]


def text_alone(whole: Sample, patches: Patches | None) -> Sample:
    """A sample without its image."""
    text = whole.example.kind != Kind.VISUAL
    fields = {name: getattr(whole.example, name)[text] for name in ("ids", "kind", "turn", "labels")}
    return Sample(Example("text", **fields, n_images=0), [], [], patches)


def test_text_alone_runs_the_projector_and_not_the_encoder(encoded: list[int]) -> None:
    """On another rank the projector has work to do; data parallelism waits for a gradient of every parameter."""
    model = packed(tiny_llava(), "twostage").train()
    whole = sample(1)
    rows = model.select_patches(whole.pixels[0][None])
    encoded.clear()
    batch = collate([text_alone(whole, rows.take([]))])
    output = model.forward_packed(batch.sequence, batch.pixel_values, patches=batch.patches)
    output.loss_sum.backward()
    assert encoded == []
    for parameter in model.hf.model.multi_modal_projector.parameters():
        assert parameter.grad is not None and not parameter.grad.any()


@pytest.mark.parametrize("cached", [False, True])
def test_text_alone_runs_the_modules_that_images_run_in_their_order(cached: bool) -> None:
    """ZeRO-3 stops where ranks differ, even in a module that has no weights."""
    model = packed(tiny_llava(), "twostage").train()
    whole = sample(1)
    rows = model.select_patches(whole.pixels[0][None]) if cached else None
    image = Sample(whole.example, whole.images, whole.pixels, rows)
    text = text_alone(whole, rows and rows.take([]))
    order: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda _, __, name=name: order.append(name))
    ran = []
    for batch in (collate([image]), collate([text])):
        order.clear()
        model.forward_packed(batch.sequence, batch.pixel_values, patches=batch.patches)
        ran.append(list(order))
    assert ran[0] == ran[1] and any("vision_tower" in name for name in ran[0]) != cached
