"""The conversation format of a model: what its prompts are, how it reads them, and where its answers end."""

from __future__ import annotations

import re
from typing import Any

from transformers import GenerationConfig, LlavaForConditionalGeneration

from mmprune_train.data.annotate import Annotator
from mmprune_train.data.templates import ChatTemplate, get_template, template_name
from mmprune_train.data.tokens import add_no_eos
from mmprune_train.errors import UserError


def converse(hf: LlavaForConditionalGeneration, processor: Any, template: str, before: str = "plain") -> Annotator:
    """Let a model and its processor (in place) hold conversations in the format that `template` names.

    The processor gets the chat template that writes this format, the generation config the token that ends an answer;
    what reads such conversations is returned, for the model.

    Args:
        before: how they conversed so far, and go on to where `template` is `plain`, which asks nothing; where that is
            `plain`, too, the processor's chat template says it.
    """
    tokenizer = processor.tokenizer
    add_no_eos(tokenizer)
    names = (template, before, template_name(processor.chat_template))
    spoken = get_template(next(name for name in names if name != "plain"), tokenizer)
    assert isinstance(spoken, ChatTemplate)
    processor.chat_template = spoken.chat_template
    _tidy(hf.generation_config)
    end, known = int(tokenizer.convert_tokens_to_ids(spoken.end)), hf.generation_config.eos_token_id
    stops = known if isinstance(known, list) else [known]
    if end not in stops:
        hf.generation_config.eos_token_id = end if known is None else [*stops, end]
    return Annotator(spoken, tokenizer, hf.config.image_token_id)


def _tidy(config: GenerationConfig) -> None:
    """Take back (in place) what has no effect and what changes no answer: transformers refuses to save the one
    (Vicuna's `temperature` without `do_sample`), a pruned cache cannot meet the other (Gemma 2's `hybrid` cache)."""
    for name in ("cache_implementation", "prefill_chunk_size", "output_attentions", "output_hidden_states"):
        setattr(config, name, None)
    try:
        config.validate(strict=True)
    except ValueError as error:
        idle = re.findall(r"^- `(\w+)`: ", str(error), re.MULTILINE)
        if not idle:
            raise UserError(f"generation_config.json of the model: {error}; correct it") from None
        for name in idle:
            setattr(config, name, None)
