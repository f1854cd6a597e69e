"""The packed network against plain transformers: same logits, same loss, same gradients, same generated tokens."""

from __future__ import annotations

import pytest
import torch
from tiny import labels_of, packed, rows_of, tiny_inputs, tiny_llava

from mmprune_train.benchmark.generation import cache_bytes
from mmprune_train.config.compose import load_pruner
from mmprune_train.errors import UserError
from mmprune_train.model.cache import PrunedCache
from mmprune_train.model.llava import PackedLlava
from mmprune_train.pruning import Pruner

SHAPES = [
    *[("clip", "llama"), ("dinov2", "llama"), ("siglip", "qwen2"), ("clip", "qwen3"), ("clip", "mistral")],
    *[("vit", "phi3"), ("clip", "gemma")],
]
BATCHES = {"ragged": [1, 1, 1], "several_and_none": [2, 0, 1], "text_only": [0, 0, 0]}
TEXT = [7, 9, 5]
HALF = {"method": "fixed_ratio", "ratio": 0.5}


@pytest.mark.parametrize("pad_left", [False, True])
@pytest.mark.parametrize("images", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize(("vision", "text"), SHAPES)
def test_without_pruning_logits_and_loss_equal_hugging_face(
    vision: str, text: str, images: list[int], pad_left: bool
) -> None:
    hf = tiny_llava(vision, text)
    inputs = tiny_inputs(images, TEXT, pad_left)
    labels = labels_of(inputs)
    with torch.no_grad():
        reference = hf(**inputs, labels=labels)
        ours = packed(hf)(**inputs, labels=labels)
    real = inputs["attention_mask"].bool()
    assert ours.logits.shape == reference.logits.shape
    torch.testing.assert_close(ours.logits[real], reference.logits[real], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.loss, reference.loss, rtol=1e-5, atol=1e-5)
    assert (ours.logits[~real] == 0).all()


@pytest.mark.parametrize(("vision", "text"), [("clip", "llama"), ("vit", "phi3"), ("clip", "gemma")])
def test_without_pruning_gradients_equal_hugging_face(vision: str, text: str) -> None:
    hf = tiny_llava(vision, text)
    model = packed(hf).train()
    inputs = tiny_inputs([1, 2, 0], TEXT)
    labels = labels_of(inputs)
    hf(**inputs, labels=labels).loss.backward()
    model(**inputs, labels=labels).loss.backward()
    ours = dict(model.hf.named_parameters())
    for name, parameter in hf.named_parameters():
        if parameter.grad is not None and parameter.grad.abs().max() > 0:
            near = 1e-6 * max(1.0, float(parameter.grad.abs().max()))  # rounding grows with the largest entry
            torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-4, atol=near, msg=name)


@pytest.mark.parametrize(("vision", "text"), SHAPES)
def test_without_pruning_generation_equals_hugging_face(vision: str, text: str) -> None:
    hf = tiny_llava(vision, text)
    model = packed(hf)
    inputs = tiny_inputs([1, 0, 2], TEXT, pad_left=True)
    for options in ({}, {"num_beams": 3}):
        expected = hf.generate(**inputs, max_new_tokens=8, do_sample=False, **options)
        assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False, **options), expected)
    torch.manual_seed(5)
    expected = hf.generate(**inputs, max_new_tokens=8, do_sample=True, temperature=2.0)
    torch.manual_seed(5)
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=True, temperature=2.0), expected)


@pytest.mark.parametrize("pruner", ["twostage", "encoder_only", "language_only", "fastv"])
@pytest.mark.parametrize(
    ("vision", "text"), [("clip", "llama"), ("dinov2", "llama"), ("clip", "qwen3"), ("vit", "phi3")]
)
def test_batched_and_ragged_generation_equals_one_by_one(vision: str, text: str, pruner: str) -> None:
    images = [1, 0, 2, 1]
    inputs = tiny_inputs(images, [7, 9, 5, 12], pad_left=True)
    model = packed(tiny_llava(vision, text), pruner)
    batched = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    trace = model.last_pruning
    assert trace.keep_ratio < 1
    start = 0
    for row, one in enumerate(rows_of(inputs, images)):
        alone = model.generate(**one, max_new_tokens=6, do_sample=False)
        assert torch.equal(alone[0, -6:], batched[row, -6:])
        assert torch.equal(model.last_pruning.language_kept[0], trace.language_kept[row])
        for index, kept in enumerate(model.last_pruning.vision_kept):
            assert torch.equal(kept, trace.vision_kept[start + index])
        start += images[row]


def test_generation_with_the_cache_equals_full_forward_passes() -> None:
    """What the cache holds is what a pruned pass over the longer sequence would have seen."""
    model = packed(tiny_llava(), "encoder_only")
    inputs = tiny_inputs([1], [6])
    written = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    for _ in range(5):
        with torch.no_grad():
            step = model(**inputs, logits_to_keep=1).logits[:, -1].argmax(-1)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], step[:, None]], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    assert torch.equal(inputs["input_ids"], written)


def test_every_layer_of_the_cache_holds_only_what_it_kept() -> None:
    model = packed(tiny_llava(), {"name": "twostage", "language": {"layer": [1, 3], "knee": HALF}})
    inputs = tiny_inputs([1, 2], [9, 5])
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).cache
    trace = model.last_pruning
    assert len(trace.layers) == 4
    for index, lengths in enumerate(trace.layers):
        assert cache.mask(index, 1)[:, 0, 0, :-1].sum(1).tolist() == lengths.tolist()
        assert cache.layers[index].keys.shape[2] == lengths.max()
    assert trace.layers[0].sum() > trace.layers[1].sum() > trace.layers[3].sum()
    dense = packed(tiny_llava())
    with torch.no_grad():
        assert cache_bytes(cache) < cache_bytes(dense(**inputs, use_cache=True).cache)


def test_a_cache_goes_on_with_what_was_cropped_from_it_and_has_its_old_name(recwarn: pytest.WarningsRecorder) -> None:
    model = packed(tiny_llava(), {"name": "twostage", "language": {"layer": [1, 3], "knee": HALF}})
    inputs = tiny_inputs([1, 2], [9, 5], pad_left=True)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).cache
        step = model(input_ids=torch.tensor([[5], [6]]), past_key_values=cache).logits
        assert any("Use `cache` instead" in str(warning.message) for warning in recwarn)
        model(input_ids=torch.tensor([[7], [8]]), cache=cache)
        cache.crop(-2)
        assert torch.equal(model(input_ids=torch.tensor([[5], [6]]), cache=cache).logits, step)
    written = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    again = model.generate(**inputs, max_new_tokens=4, do_sample=False, past_key_values=PrunedCache())
    assert torch.equal(written, again)


def test_dropped_tokens_have_no_logits_and_the_rest_keep_their_place() -> None:
    hf = tiny_llava()
    model = packed(hf, "encoder_only")
    inputs = tiny_inputs([1], [6])
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    kept = model.last_pruning.vision_kept[0] + 2  # the image starts at the third token
    missing = logits.isnan().all(-1).nonzero().squeeze(1)
    assert sorted([*missing.tolist(), *kept.tolist()]) == list(range(2, 11))
    short = torch.cat([torch.arange(2), kept, torch.arange(11, logits.shape[0])])
    with torch.no_grad():  # the same tokens through plain transformers, from embeddings
        base = hf.model
        embeddings = base.get_input_embeddings()(inputs["input_ids"])
        features = base.get_image_features(inputs["pixel_values"]).pooler_output[0]
        embeddings[0, 2:11] = features
        reference = hf.lm_head(base.language_model(inputs_embeds=embeddings[:, short]).last_hidden_state)[0]
    torch.testing.assert_close(logits[short], reference, rtol=1e-5, atol=1e-5)


def test_wrapping_a_model_leaves_another_of_the_same_config_alone() -> None:
    hf = tiny_llava()
    other = type(hf)(hf.config)
    PackedLlava(hf, Pruner(load_pruner("none")))
    assert other.model.language_model.layers[0].self_attn.config._attn_implementation != "mmprune_packed"


def test_wrong_inputs_are_named() -> None:
    model = packed(tiny_llava())
    inputs = tiny_inputs([1], [6])
    inputs["input_ids"] = inputs["input_ids"][:, :-8]
    with pytest.raises(UserError, match="image tokens"):
        model(input_ids=inputs["input_ids"][:, :5], pixel_values=torch.zeros(2, 3, 24, 24))
    with pytest.raises(UserError, match="4 layers, 0..3"):
        packed(tiny_llava(), {"name": "twostage", "language": {"layer": 9}})
    with pytest.raises(UserError, match="pooled_cosine"):
        packed(tiny_llava("siglip"), "encoder_only")(**tiny_inputs([1], [6]))


def test_a_text_only_training_batch_still_reaches_the_projector() -> None:
    model = packed(tiny_llava(), "twostage").train()
    inputs = tiny_inputs([0, 0], [6, 4])
    out = model(**inputs, labels=labels_of(inputs))
    out.loss.backward()
    gradient = model.hf.model.multi_modal_projector.linear_1.weight.grad
    assert gradient is not None and (gradient == 0).all()
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs, labels=labels_of(inputs)).loss, out.loss.detach())


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_gradients_flow_through_kept_tokens_alone(layer: int) -> None:
    model = packed(tiny_llava(), {"name": "twostage", "language": {"layer": layer}}).train()
    inputs = tiny_inputs([1, 1], [8, 6])
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, -1], labels[1, 13] = 7, 9
    model(**inputs, labels=labels).loss.backward()
    assert model.hf.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0


def test_gradient_checkpointing_changes_no_gradient() -> None:
    inputs = tiny_inputs([1, 2], [8, 6])
    gradients = []
    for checkpointing in (False, True):
        model = packed(tiny_llava(), "twostage").train()
        if checkpointing:
            model.hf.activation_checkpointing_enable()
        model(**inputs, labels=labels_of(inputs)).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_an_image_asked_about_twice_is_encoded_once_and_answers_the_same() -> None:
    model = packed(tiny_llava(), "twostage")
    inputs = tiny_inputs([1, 1, 1], TEXT, pad_left=True)
    inputs["pixel_values"][1] = inputs["pixel_values"][0]
    encoded = []
    model.hf.model.vision_tower.embeddings.register_forward_hook(lambda _, args, out: encoded.append(len(out)))
    batched = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert encoded == [2] and len(model.last_pruning.vision_kept) == 3
    for row, one in enumerate(rows_of(inputs, [1, 1, 1])):
        assert torch.equal(model.generate(**one, max_new_tokens=4, do_sample=False)[0, -4:], batched[row, -4:])
