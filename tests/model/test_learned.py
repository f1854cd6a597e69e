"""A stage-1 score with weights of its own, on whole models: what it trains, draws, saves and loads."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model.test_every_pruner import sample
from safetensors.torch import load_file, save_file
from tiny import PATCHES, packed, tiny_llava
from torch import Tensor
from training.synthetic import overrides, write_dataset
from transformers import LlavaForConditionalGeneration

from mmprune_train.config.compose import compose_config, load_pruner
from mmprune_train.config.schema import StageConfig
from mmprune_train.data.batch import collate
from mmprune_train.errors import UserError
from mmprune_train.model.begin import begin
from mmprune_train.model.build import load_model
from mmprune_train.model.export.hf import save_hf
from mmprune_train.model.flops import StepFlops
from mmprune_train.model.llava import PackedLlava
from mmprune_train.model.scorer import FILE
from mmprune_train.storage.conf import options
from mmprune_train.tasks.preflight import check_inputs
from mmprune_train.training.freezing import freeze

LEARNED = {"name": "learned", "vision": {"knee": {"ratio": 0.4}}}
QUESTION = {"name": "learned", "vision": {"knee": {"ratio": 0.4}, "score": "learned_with_question"}}
BATCH = collate([sample(0, [(1, 5, 3)]), sample(1, [(2, 4, 2), (0, 3, 1)]), sample(2, [(0, 3, 2)])])


def run(model: PackedLlava, seed: int = 0) -> tuple[Tensor, list[list[int]]]:
    """The loss, and what is kept of each image."""
    torch.manual_seed(seed)
    output = model.forward_packed(BATCH.sequence, BATCH.pixel_values)
    return output.loss_sum, [kept.tolist() for kept in output.trace.vision_kept]


def test_no_other_preset_has_weights() -> None:
    assert [name for name in options("pruner") if packed(tiny_llava(), name).scorer is not None] == ["learned"]


def test_what_is_trained_is_what_is_run() -> None:
    """The same loss to the bit with gates and without; the LLM's batch is as short as the budget says."""
    model = packed(tiny_llava(), LEARNED)
    gated, kept = run(model)
    with torch.no_grad():
        plain, again = run(model)
    assert gated.item() == plain.item() and kept == again and {len(one) for one in kept} == {round(0.4 * PATCHES)}
    gated.backward()
    assert all(bool(weight.grad.any()) for weight in model.scorer.parameters())


def test_noise_is_drawn_in_training_alone() -> None:
    model = packed(tiny_llava(), LEARNED).train()
    assert run(model, 1)[1] == run(model, 1)[1] != run(model, 2)[1]
    model.eval()
    assert run(model, 1)[1] == run(model, 2)[1]
    quiet = {**LEARNED, "vision": {**LEARNED["vision"], "noise": 0}}
    assert run(packed(tiny_llava(), quiet).train(), 1)[1] == run(packed(tiny_llava(), quiet).eval(), 2)[1]


def test_counts_of_its_own_are_pushed_to_a_mean() -> None:
    """By the penalty alone, from the count that random weights begin with; images differ in theirs."""
    own = {"knee": {"method": "above_zero"}, "target": 0.3, "target_weight": 2.0}
    model = packed(tiny_llava(), {"name": "learned", "vision": own}).train()
    optimizer = torch.optim.Adam(model.scorer.parameters(), lr=0.01)
    with torch.no_grad():
        assert model.forward_packed(BATCH.sequence, BATCH.pixel_values).penalty is None

    def shares() -> list[float]:
        model.eval()
        found = [len(kept) / PATCHES for kept in run(model)[1]]
        model.train()
        return found

    first = abs(sum(shares()) / 3 - 0.3)
    for _ in range(60):
        optimizer.zero_grad()
        model.forward_packed(BATCH.sequence, BATCH.pixel_values).penalty.backward()
        optimizer.step()
    assert abs(sum(shares()) / 3 - 0.3) < min(first, 0.12)


def test_a_penalty_is_the_weighed_square_of_the_mean_excess() -> None:
    own = {"knee": {"method": "above_zero"}, "target": 0.3, "target_weight": 2.0}
    model = packed(tiny_llava(), {"name": "learned", "vision": own}, vision_chunk=2)
    output = model.forward_packed(BATCH.sequence, BATCH.pixel_values)
    share = float((output.trace.vision_scores > 0).float().mean())
    assert output.penalty.item() == pytest.approx(2 * (share - 0.3) ** 2, rel=1e-5)
    text = collate([sample(0, [(0, 5, 3)])])
    assert model.forward_packed(text.sequence, text.pixel_values).penalty is None


@pytest.mark.parametrize(
    ("vision", "words"),
    [
        ({"target": 0.2}, "target=0.2 goes with a budget .*method=above_zero"),
        ({"target": 0.2, "score": "cls_attention"}, "target=0.2 is for a score that is trained, .*learned"),
        (
            {"score": "cls_attention", "knee": {"method": "above_zero"}},
            "above 0, .*vision.score=cls_attention is not: set pruner.vision.score=learned or .*, or another",
        ),
        (
            {"recover": {"enabled": True, "knee": {"method": "above_zero"}}},
            "recover.score=.* is not: set another pruner.vision.recover.knee.method",
        ),
        ({"recover": {"enabled": True, "score": "learned"}}, "the first pass alone trains"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(vision: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_pruner({"name": "learned", "vision": {"score": "learned", **vision}})


def test_a_batch_without_images_has_a_gradient_of_zero() -> None:
    model = packed(tiny_llava(), LEARNED).train()
    text = collate([sample(0, [(0, 5, 3)])])
    model.forward_packed(text.sequence, text.pixel_values).loss_sum.backward()
    assert all(weight.grad is not None and not weight.grad.any() for weight in model.scorer.parameters())


def test_frozen_it_draws_nothing_and_has_no_gradient() -> None:
    model = packed(tiny_llava(), LEARNED)
    parts = freeze(model, StageConfig(train_scorer=False), adapters=False)
    assert {part.name: part.lr is None for part in parts}["scorer"] and not model.scorer.training
    loss, kept = run(model, 1)
    loss.backward()
    assert kept == run(model, 2)[1] and all(weight.grad is None for weight in model.scorer.parameters())


def test_it_has_a_learning_rate_of_its_own() -> None:
    parts = freeze(packed(tiny_llava(), LEARNED), StageConfig(lr=1e-5, scorer_lr=3e-3), adapters=False)
    assert {part.name: part.lr for part in parts}["scorer"] == 3e-3
    assert "scorer" not in {part.name for part in freeze(packed(tiny_llava()), StageConfig(), adapters=False)}


def test_an_image_is_scored_by_its_question() -> None:
    model = packed(tiny_llava(), QUESTION)
    scorer = model.scorer
    patches = torch.randn(2, PATCHES, 32)
    asked = torch.randn(2, scorer.question.in_features)
    one, other = scorer(patches, asked), scorer(patches, asked.flip(0))
    assert not torch.allclose(one, other)
    torch.testing.assert_close(scorer(patches, torch.zeros_like(asked)), scorer(patches))
    run(model)[0].backward()
    assert scorer.question.weight.grad.any()


def test_a_score_that_reads_no_question_has_no_weights_for_one() -> None:
    """Though the second pass reads it."""
    recover = {"enabled": True, "score": "text_similarity", "knee": {"method": "fixed_ratio", "ratio": 0.2}}
    model = packed(tiny_llava(), {"name": "learned", "vision": {**LEARNED["vision"], "recover": recover}})
    run(model)[0].backward()
    assert model.question is not None and all(weight.grad is not None for weight in model.scorer.parameters())


def test_another_pruner_must_score_by_the_weights_that_are_here() -> None:
    model = packed(tiny_llava(), LEARNED)
    with model.pruned_by(load_pruner({**LEARNED, "vision": {"knee": {"ratio": 0.2}}})):
        assert {len(kept) for kept in run(model)[1]} == {round(0.2 * PATCHES)}
    wide = load_pruner({**LEARNED, "vision": {"score_args": {"hidden": 8}}})
    with pytest.raises(UserError, match=r"learned\(hidden=8\) has .* with those of learned\(hidden=64\): take"):
        model.pruned_by(wide)
    with pytest.raises(UserError, match=r"learned_with_question\(hidden=64\) has .* those of learned\(hidden=64\)"):
        model.pruned_by(load_pruner(QUESTION))
    with model.pruned_by(load_pruner("none")), pytest.raises(UserError, match="network was made without"):
        model.pruned_by(load_pruner(LEARNED))


def test_flops_count_the_scorer() -> None:
    counts = {}
    for name, pruner in (("learned", LEARNED), ("plain", {"name": "x", "vision": {"score": "feature_norm"}})):
        model = packed(tiny_llava(), pruner)
        freeze(model, StageConfig(train_projector=True), adapters=False)
        counts[name] = StepFlops(model)
    more = counts["learned"].vision.forward - counts["plain"].vision.forward
    assert more == 2 * PATCHES * 64 * 64
    assert counts["learned"].vision.backward - counts["plain"].vision.backward == 2 * more


# ---------------------------------------------------------------------- folders

SMOKE = ("+experiment=smoke", "pruner=learned")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[PackedLlava, Path]:
    model, processor = begin(compose_config([*SMOKE]))
    folder = tmp_path_factory.mktemp("saved")
    with torch.no_grad():
        for weight in model.scorer.parameters():
            weight.add_(torch.randn_like(weight))
    model.save(folder, processor)
    return model, folder


@pytest.mark.parametrize("exported", [False, True])
def test_a_saved_model_has_its_scorer(exported: bool, saved: tuple[PackedLlava, Path], tmp_path: Path) -> None:
    model, folder = saved
    if exported:
        save_hf(*load_model(folder), tmp_path, torch.float32)
        folder = tmp_path
    loaded, _ = load_model(folder)
    assert loaded.scorer.state_dict().keys() == model.scorer.state_dict().keys()
    for name, weight in loaded.scorer.state_dict().items():
        assert torch.equal(weight, model.scorer.state_dict()[name]), name
    assert not loaded.scorer.training
    assert load_model(folder, pruner="none")[0].scorer is None
    plain, report = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(plain.lm_head.weight, model.hf.lm_head.weight)


def test_new_weights_that_no_stage_trains_are_refused(saved: tuple[PackedLlava, Path], tmp_path: Path) -> None:
    frozen = [f"stage.{name}.train_scorer=false" for name in ("pretrain", "instruct")]
    given = [*overrides(write_dataset(tmp_path / "squares"), tmp_path / "runs"), "pruner=learned"]
    with pytest.raises(UserError, match=r"stage.pretrain.train_scorer=false: .*=learned begins with random weights"):
        check_inputs(compose_config([*given, *frozen]), ["pretrain", "instruct"], False)
    check_inputs(compose_config([*given, frozen[0]]), ["pretrain", "instruct"], False)
    check_inputs(compose_config([*given, *frozen, f"init_from={saved[1]}"]), ["pretrain", "instruct"], False)


def test_training_goes_on_from_it(saved: tuple[PackedLlava, Path]) -> None:
    from mmprune_train.model.weights.start import locate

    model, folder = saved
    config = compose_config([*SMOKE])
    taken, _ = begin(config, locate("init_from", str(folder)))
    assert torch.equal(taken.scorer.inner.weight, model.scorer.inner.weight)
    other, _ = begin(replace(config, pruner=load_pruner("none")), locate("init_from", str(folder)))
    assert other.scorer is None


def test_a_model_without_one_is_trained_but_not_asked(tmp_path: Path) -> None:
    from mmprune_train.model.weights.start import locate

    model, processor = begin(compose_config(["+experiment=smoke", "pruner=none"]))
    model.save(tmp_path, processor)
    with pytest.raises(UserError, match=rf"pruner.vision.score=learned has weights .* no {FILE} in {tmp_path}"):
        load_model(tmp_path, pruner="learned")
    assert begin(compose_config([*SMOKE]), locate("init_from", str(tmp_path)))[0].scorer is not None


def test_weights_of_another_shape_are_refused(saved: tuple[PackedLlava, Path], tmp_path: Path) -> None:
    _, folder = saved
    narrow = load_pruner({"name": "learned", "vision": {"score_args": {"hidden": 8}}})
    with pytest.raises(UserError, match=r"scorer/weights.safetensors does not fit pruner.vision.score=learned \(outer"):
        load_model(folder, pruner=narrow)
    weights = load_file(folder / FILE)
    weights.pop("outer")
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    save_file(weights, broken / FILE)
    with pytest.raises(UserError, match=r"does not fit .* \(outer"):
        load_model(broken)
