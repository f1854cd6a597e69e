"""What transformers says against an `arch` is told with its key."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mmprune_train.config.compose import compose_config
from mmprune_train.errors import UserError
from mmprune_train.model.arch import arch_config, described


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "lama"}, "llm.arch.model_type=lama: .*did you mean llama"),
        ({"hiden_size": 3}, "llm.arch.hiden_size: a llama has no such field; did you mean hidden_size"),
        ({"hidden_size": "x"}, "Field 'hidden_size' expected int"),
        ({"tie_word_embeddings": "x"}, "Field 'tie_word_embeddings' expected bool"),
        ({"hidden_size": 63}, "hidden size .63. is not a multiple"),
        ({"num_attention_heads": 0}, "llm.arch describes no network .integer division"),
        ({"hidden_act": "foo"}, "llm.arch.hidden_act='foo': transformers has no such"),
        ({"rope_parameters": {"rope_type": "foo", "rope_theta": 1e4}}, "llm.arch.rope_parameters.rope_type='foo'"),
        ({"hidden_size": -4}, "negative dimension"),
    ],
)
def test_an_arch_of_no_network_is_told_in_a_line(fields: dict[str, Any], words: str) -> None:
    arch = {**compose_config(["+experiment=smoke"]).llm.arch, **fields}
    with pytest.raises(UserError, match=words) as caught, torch.device("meta"), described("llm.arch", arch):
        AutoModelForCausalLM.from_config(arch_config("llm.arch", arch))
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 400


def test_fields_by_other_names_are_known() -> None:
    config = arch_config("llm.arch", {"model_type": "gpt2", "hidden_size": 32, "n_head": 2})
    assert config.n_embd == 32
