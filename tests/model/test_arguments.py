"""Arguments of `generate` and of a pass: refused by name where they cannot be heeded, heeded elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model.test_chat import FIRST, PRUNERS, answers, chatting, prompts, same
from tiny import packed, tiny_llava
from transformers import DynamicCache, StaticCache

from mmprune_train.errors import UserError
from mmprune_train.model.cache import PrunedCache


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ({"cache": DynamicCache()}, "cache=DynamicCache: .*leave cache out"),
        ({"cache_implementation": "static"}, "cache_implementation=static"),
        ({"cache_implementation": "offloaded"}, "cache_implementation=offloaded"),
        ({"cache_implementation": "quantized"}, "cache_implementation=quantized"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha: contrastive search"),
        ({"num_beams": 4, "num_beam_groups": 2}, "num_beam_groups=2"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size"),
        ({"output_attentions": True}, "output_attentions"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"assistant_early_exit": 2}, "assistant_early_exit"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_generation_cannot_do_is_named(option: dict[str, Any], told: str) -> None:
    model = packed(tiny_llava(), "twostage")
    _, inputs = prompts([[(1, 4, 0)]])
    with pytest.raises(UserError, match=told):
        model.generate(**inputs, max_new_tokens=2, **option)
    if "cache" not in option:
        config = type(model.generation_config)(max_new_tokens=2, eos_token_id=2, pad_token_id=0)
        for name, value in option.items():
            setattr(config, name, value)
        with pytest.raises(UserError, match=told):
            model.generate(**inputs, generation_config=config)


@pytest.mark.parametrize("name", ["none", "twostage"])
def test_generation_without_a_cache_or_with_a_named_dynamic_one_is_the_same(name: str) -> None:
    model = chatting(PRUNERS[name])
    _, inputs = prompts(FIRST)
    expected = answers(model, inputs)
    for option in ({"use_cache": False}, {"cache_implementation": "dynamic"}, {"cache": PrunedCache()}):
        same(answers(model, inputs, **option), expected)


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ({"typo": 1}, "typo: there is no such argument"),
        ({"pixel_value": 1}, "did you mean pixel_values"),
        ({"output_attentions": True}, "output_attentions: no attention matrix"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"position_ids": torch.arange(4)}, "position_ids"),
        ({"inputs_embeds": torch.zeros(1)}, "inputs_embeds"),
        ({"vision_feature_layer": -1}, "vision_feature_layer"),
        ({"cache": DynamicCache()}, "cache=DynamicCache"),
        ({"cache": StaticCache(tiny_llava().config.text_config, max_cache_len=9)}, "cache=StaticCache"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_pass_refuses_what_it_would_not_read(argument: dict[str, Any], told: str) -> None:
    model = packed(tiny_llava(), "twostage")
    _, inputs = prompts([[(1, 4, 0)]])
    with pytest.raises(UserError, match=told):
        model(**inputs, **argument)


def test_a_pass_lets_unset_options_be_and_gives_a_tuple_where_asked() -> None:
    model = packed(tiny_llava(), "twostage")
    _, inputs = prompts([[(1, 4, 0)]])
    with torch.no_grad():
        logits = model(**inputs, output_attentions=False, position_ids=None).logits
        assert torch.equal(model(**inputs, return_dict=False)[0].nan_to_num(), logits.nan_to_num())
    with pytest.raises(UserError, match="leaves sample 0 without a token"):
        model(inputs["input_ids"], attention_mask=torch.zeros_like(inputs["input_ids"]))
