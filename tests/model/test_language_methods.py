"""Published stage-2 methods against slow re-derivations from plain transformers, and what every method must do."""

from __future__ import annotations

import pytest
import torch
from loaded import LANGUAGE_SELECTIONS
from model.rederived_language import COUNTS, SLOW
from plain import Walked, eager_copy, walk
from tiny import PATCHES, labels_of, packed, rows_of, tiny_inputs, tiny_llava
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from mmprune_train.config.schema import PeftConfig, StageConfig
from mmprune_train.errors import UserError
from mmprune_train.model.flops import StepFlops
from mmprune_train.model.llava import PackedLlava
from mmprune_train.model.peft import add_adapters
from mmprune_train.storage.conf import options
from mmprune_train.training.freezing import freeze

SMALL: dict[str, dict] = {
    "fastv": {},
    "pyramiddrop": {},
    "sparsevlm": {"layer": [1, 2, 3], "per_layer_budgets": COUNTS, "merge_args": {"share": 0.6, "size": 3}},
    "dart": {"knee": {"count": 6}, "selection_args": {"pivots": 2, "text_pivots": 1}},
    "pool": {},
}
"""The presets with budgets that bite on a few patches and four layers."""
BATCHES = [([2], [9]), ([1, 0, 2, 3, 1], [8, 7, 6, 11, 5])]


def method(hf: LlavaForConditionalGeneration, name: str, **language: object) -> PackedLlava:
    return packed(hf, {"name": name, "language": {**SMALL[name], **language}})


def slow(hf: LlavaForConditionalGeneration, name: str, one: dict[str, Tensor], end: int | None = None) -> Walked:
    ids = one["input_ids"][0]
    rule = SLOW[name](ids, end or len(ids))
    return walk(eager_copy(hf), ids, one.get("pixel_values"), rule, rule.renumber)


@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize(("images", "texts"), BATCHES)
def test_a_method_is_its_slow_rederivation(name: str, images: list[int], texts: list[int]) -> None:
    """Kept tokens, positions and states (merged ones among them) at every layer, and the logits."""
    hf = tiny_llava()
    inputs = tiny_inputs(images, texts, pad_left=True)
    model = method(hf, name)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for index, layer in enumerate(model.hf.model.language_model.layers):
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, index=index: found.update({index: (args[0][0], kwargs["position_ids"][0])}),
            with_kwargs=True,
        )
    with torch.no_grad():
        logits = model(**inputs).logits
    trace = model.last_pruning
    pruned = set(model.pruner.layers(4))
    assert set(trace.language_entered) == pruned
    lengths = [layer.tolist() for layer in trace.layers]
    for row, one in enumerate(rows_of(inputs, images)):
        expected = slow(hf, name, one)
        for index in range(4):
            states, positions = (part.split(lengths[index])[row] for part in found[index])
            assert positions.tolist() == expected.position[index]
            torch.testing.assert_close(states, expected.hidden[index], rtol=1e-4, atol=1e-4)
            if index in pruned:
                assert trace.language_entered[index][row].tolist() == expected.entered[index]
        assert trace.language_kept[row].tolist() == expected.entered[3]
        torch.testing.assert_close(logits[row, -1], expected.logits[-1], rtol=1e-4, atol=1e-4)
    assert sum(lengths[3]) < sum(lengths[0])


@pytest.mark.parametrize("name", SLOW)
def test_decoding_goes_on_where_each_layer_left_off(name: str) -> None:
    """Generated tokens see what each layer kept, at positions that follow it, as the reference with them appended."""
    hf = tiny_llava()
    images = [2, 1]
    inputs = tiny_inputs(images, [7, 9], pad_left=True)
    model = method(hf, name)
    model.generation_config.eos_token_id = None
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    start = inputs["input_ids"].shape[1]
    for row, one in enumerate(rows_of(inputs, images)):
        end = one["input_ids"].shape[1]
        one["input_ids"] = torch.cat([one["input_ids"], out.sequences[row : row + 1, start:]], 1)
        expected = slow(hf, name, one, end).logits[-5:-1]
        torch.testing.assert_close(torch.stack([step[row] for step in out.logits]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SLOW)
def test_the_rest_of_the_batch_never_changes_a_sample(name: str) -> None:
    images, texts = BATCHES[1]
    inputs = tiny_inputs(images, texts, pad_left=True, seed=1)
    model = method(tiny_llava(), name)
    with torch.no_grad():
        together = model(**inputs).logits[:, -1]
        entered = model.last_pruning.language_entered
        for row, one in enumerate(rows_of(inputs, images)):
            alone = model(**one).logits[0, -1]
            torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-4)
            for index, kept in model.last_pruning.language_entered.items():
                assert torch.equal(kept[0], entered[index][row])


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", SLOW)
def test_training_reaches_projector_and_adapters(name: str, half: bool) -> None:
    model = method(tiny_llava(), name)
    add_adapters(model, PeftConfig(name="lora", r=4, alpha=8, dropout=0.5))
    freeze(model, StageConfig(train_projector=True, train_llm=True, use_peft=True), adapters=True)
    model.train()
    inputs = tiny_inputs([2, 1], [9, 11])
    labels = labels_of(inputs)
    labels[:, :-5] = -100
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert any("lora" in n for n in trained) and any("projector" in n for n in trained)
    optimizer = torch.optim.SGD(trained.values(), lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            output = model(**inputs, labels=labels)
        output.loss.backward()
        assert output.loss.isfinite()
        for parameter in trained.values():
            assert parameter.grad is not None and parameter.grad.isfinite().all()
        optimizer.step()
    still = [n for n, p in trained.items() if not p.grad.abs().sum() > 0]
    assert not still
    assert torch.stack(model.last_pruning.layers)[-1].sum() < model.last_pruning.stage1.sum()


def test_gradients_flow_through_every_member_of_a_cluster() -> None:
    """With one token kept and one cluster of all others, every patch still reaches the loss behind the drop."""
    model = method(tiny_llava(), "sparsevlm", layer=[3], per_layer_budgets=[1], merge_args={"share": 1.0, "size": 100})
    states: list[Tensor] = []
    layers = model.hf.model.language_model.layers
    layers[2].register_forward_hook(lambda _, __, out: states.append(out) or out.retain_grad())
    layers[3].register_forward_pre_hook(lambda _, args: (args[0].detach() * 0 + args[0],))
    model(**tiny_inputs([1], [9])).logits[0, -1].nan_to_num().sum().backward()
    visual = states[0].grad[0, 2:11]
    assert (visual.abs().sum(1) > 0).all()
    assert len(model.last_pruning.language_kept[0]) == 9 + 2


def entering(model: PackedLlava, layer: int, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """[T, D] what enters a layer."""
    seen: list[Tensor] = []
    model.hf.model.language_model.layers[layer].register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    with torch.no_grad():
        model(**inputs, labels=labels)
    return seen[0]


def test_supervised_and_protected_tokens_are_never_touched() -> None:
    """Neither dropped nor changed by a merge, however greedy the budget."""
    for name in SLOW:
        few: dict[str, dict] = {
            "sparsevlm": {"per_layer_budgets": [1, 1, 1], "merge_args": {"share": 1.0}},
            "dart": {"knee": {"count": 1}},
        }
        greedy = few.get(name, {"knee": {"ratio": 0.01}})
        model = method(tiny_llava(), name, **greedy)
        inputs = tiny_inputs([2, 1], [9, 7])
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)  # patches supervised, too
        labels[:, :8] = -100
        supervised = int((labels[:, 1:] != -100).sum())
        layer = 1 if name in ("pyramiddrop", "sparsevlm") else 2
        dense, pruned = (entering(one, layer, inputs, labels) for one in (packed(tiny_llava()), model))
        trace = model.last_pruning
        starts = [0, int(trace.stage1[0])]
        kept = torch.cat([kept + at for kept, at in zip(trace.language_entered[layer], starts, strict=True)])
        targets = torch.cat([row[valid.bool()] for row, valid in zip(labels, inputs["attention_mask"], strict=True)])
        trained = [t for t in range(len(targets) - 1) if targets[t + 1] != -100 and t + 1 not in starts]
        assert len(trained) == supervised
        for t in trained:
            assert t in kept
            torch.testing.assert_close(pruned[kept.tolist().index(t)], dense[t])


def test_layers_as_shares_of_the_depth_fit_any_llm() -> None:
    hf = tiny_llava()
    pyramid, sparse = packed(hf, "pyramiddrop").pruner, packed(hf, "sparsevlm").pruner
    assert list(pyramid.layers(32)) == [8, 16, 24] and list(sparse.layers(32)) == [3, 7, 16]
    assert list(pyramid.layers(40)) == [10, 20, 30]
    assert list(pyramid.layers(30)) == [7, 15, 22]
    assert pyramid.layers(2) == {0: 0, 1: 2} and sparse.layers(4) == {1: 1, 2: 2}  # shares meet: the last one's budget


def test_layers_that_an_llm_has_not_are_refused() -> None:
    hf = tiny_llava()
    with pytest.raises(UserError, match=r"pruner.language.layer=16: this LLM has 4 layers, 0..3; shares"):
        packed(hf, {"name": "fastv", "language": {"layer": 16}})
    with pytest.raises(UserError, match="must rise, and in 4 layers they are"):
        packed(hf, {"name": "pyramiddrop", "language": {"layer": [3, 0.25]}})
    with pytest.raises(UserError, match="score_layer=previous: no layer comes before"):
        packed(hf, {"name": "fastv", "language": {"layer": 0}})


@pytest.mark.parametrize(
    ("knee", "budgets", "left"), [("fixed_ratio", [0.7, 0.5], [6, 3]), ("fixed_count", [8, 5], [8, 5])]
)
def test_each_layer_has_its_own_amount(knee: str, budgets: list[float], left: list[int]) -> None:
    language = {"layer": [1, 0.75], "knee": {"method": knee}, "per_layer_budgets": budgets, "candidates": "visual"}
    model = packed(tiny_llava(), {"name": "language_only", "language": language})
    with torch.no_grad():
        model(**tiny_inputs([1, 1], [7, 9]))
    visual = torch.stack(model.last_pruning.layers_visual)
    assert visual[:, 0].tolist() == visual[:, 1].tolist() == [9, left[0], left[0], left[1]]


def test_made_tokens_are_counted_where_they_run() -> None:
    hf, inputs = tiny_llava(), tiny_inputs([1], [9])
    cost = {}
    for merge in ("recycle", "none"):
        given = SMALL["sparsevlm"]["merge_args"] if merge != "none" else {}
        model = method(hf, "sparsevlm", merge=merge, merge_args=given)
        with torch.no_grad():
            model(**inputs)
        cost[merge] = StepFlops(model)(model.last_pruning, 1, 1)
        visual = torch.stack(model.last_pruning.layers_visual)[:, 0].tolist()
        assert visual == ([9, 8, 6, 4] if merge == "recycle" else [9, *COUNTS])
    assert cost["recycle"] > cost["none"]


@pytest.mark.parametrize("score", ["last_token_attention", "text_cosine"])
def test_flops_count_the_keys_that_a_score_computes(score: str) -> None:
    """A budget that keeps everything costs the dense model and the keys of each pruning layer, read or not."""
    hf, inputs = tiny_llava(), tiny_inputs([1, 2], [9, 7])
    costs = []
    for name, language in (("none", {}), ("pyramiddrop", {"score": score, "knee": {"ratio": 1.0}})):
        model = packed(hf, {"name": name, "language": language})
        with torch.no_grad():
            model(**inputs)
        costs.append(StepFlops(model)(model.last_pruning, 3, 2))
    keys = 0 if score == "text_cosine" else 3 * 2 * int(inputs["attention_mask"].sum()) * 48 * 24
    assert costs[1] - costs[0] == keys


def test_every_preset_of_stage_two_alone_is_tested() -> None:
    assert set(SLOW) == set(SMALL) <= set(options("pruner"))


@pytest.mark.parametrize("name", LANGUAGE_SELECTIONS)
def test_a_selection_meets_its_counts_and_the_floor_of_every_image(name: str) -> None:
    language = {"selection": name, "score": "key_l1", "layer": [1, 3], "candidates": "visual"}
    for least, budgets, left in ((0, [7, 4], [7, 4]), (2, [7, 1], [7, 4])):
        knee = {"knee": {"method": "fixed_count"}, "per_layer_budgets": budgets, "min_per_image": least}
        model = packed(tiny_llava(), {"name": "language_only", "language": {**language, **knee}})
        with torch.no_grad():
            model(**tiny_inputs([2], [9]))
        seen = torch.stack(model.last_pruning.layers_visual)[:, 0].tolist()
        assert seen[0] == 18 and seen[1] == seen[2] and seen[1] >= left[0] and seen[3] >= left[1]
        assert least or seen[1:] == [7, 7, 4]
        kept = model.last_pruning.language_kept[0] - 2
        assert all(int(((kept >= first) & (kept < first + PATCHES)).sum()) >= least for first in (0, PATCHES))
