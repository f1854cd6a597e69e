"""transformers' generation loops over a pruned cache: what they may be asked for, and where a further turn begins."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration
from transformers.utils.deprecation import deprecate_kwarg

from mmprune_train.errors import UserError, nearest
from mmprune_train.model.cache import PrunedCache
from mmprune_train.packed.host import fetch
from mmprune_train.pruning import Pruner

_OWN_LAYERS = "every layer has its own tokens here"
REFUSED_OPTIONS = {
    "penalty_alpha": "contrastive search is not built",
    "dola_layers": "DoLa is not built",
    "constraints": "constrained beam search is not built",
    "force_words_ids": "constrained beam search is not built",
    "assistant_early_exit": "the first layers see tokens that later ones have dropped; give an assistant_model",
    "use_mtp": "LLaVA has no heads for several tokens",
    "speculation_type": "the draft would read hidden states, which are of kept tokens alone; give an assistant_model",
    "prefill_chunk_size": "what is dropped is decided with the whole prompt at hand; leave it out",
    "output_attentions": f"no attention matrix is formed, and {_OWN_LAYERS}; plain transformers (model.hf) gives them",
    "output_hidden_states": f"{_OWN_LAYERS}, so states do not stack; plain transformers (model.hf) gives them",
    "inputs_embeds": "tokens are told from images by their ids; give input_ids",
}
"""Options of `generate` that cannot be met, with the reason."""


def refuse_arguments(given: Mapping[str, Any], known: list[str]) -> None:
    """Raise UserError for arguments of a forward pass beside the `known` ones that are read; those that are unset or
    off are let be."""
    theirs = [*inspect.signature(LlavaForConditionalGeneration.forward).parameters, *REFUSED_OPTIONS]
    for name, value in given.items():
        if name in theirs and (value is None or value is False):
            continue
        if name in REFUSED_OPTIONS:
            raise UserError(f"{name}: {REFUSED_OPTIONS[name]}")
        if name in theirs:
            raise UserError(f"{name}: cannot be set for one call of a pruned model; leave it out")
        raise UserError(f"{name}: there is no such argument{nearest(name, known)} (there are {', '.join(known)})")


def refuse_foreign(cache: object) -> None:
    """Raise UserError for a cache that cannot hold different tokens in every layer."""
    if cache is not None and not isinstance(cache, PrunedCache):
        raise UserError(
            f"cache={type(cache).__name__}: {_OWN_LAYERS}, which only mmprune_train.model.cache.PrunedCache can hold; "
            "leave cache out (one is made, and return_dict_in_generate=True gives it back)"
        )


if TYPE_CHECKING:
    from transformers import GenerationMixin as Loops
else:
    Loops = object  # transformers wants the model itself to inherit from it


class Generating(Loops):
    """What a PackedLlava puts before transformers' GenerationMixin; it owns the members below."""

    config: LlavaConfig
    pruner: Pruner

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' generation loops (greedy, sampling, beams, drafts) over a cache of what each layer kept.

        With the `cache` of an earlier turn and the whole conversation as `input_ids`, only what is new is read;
        `pixel_values` are then those of the new turn.

        Raises:
            UserError: an option that cannot be met, or a cache with which the answer would be another than without.
        """
        given: dict[str, Any] = inspect.signature(super().generate).bind(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        configs = (given.get("generation_config"), self.generation_config)

        def asked(name: str) -> Any:
            found = [value for config in configs if (value := getattr(config, name, None)) is not None]
            return given[name] if name in given else next(iter(found), None)

        for name, reason in REFUSED_OPTIONS.items():
            if asked(name) is not None and asked(name) is not False:
                raise UserError(f"{name}: {reason}")
        if (groups := asked("num_beam_groups") or 1) > 1:
            raise UserError(f"num_beam_groups={groups}: group beam search is not built; use num_beams")
        if (kind := asked("cache_implementation")) not in (None, "dynamic"):
            raise UserError(f"cache_implementation={kind}: {_OWN_LAYERS}; leave it out, or set dynamic")
        refuse_foreign(given.get("cache"))
        if asked("use_cache") is not False:
            if kind is not None:
                given["cache_implementation"] = None
            if given.get("cache") is None:
                given["cache"] = PrunedCache()
            cache = given["cache"]
            cache.drafting, drafts = False, asked("is_assistant")
            assisted = given.get("assistant_model") is not None or asked("prompt_lookup_num_tokens")
            if not cache.prompt_is_in if drafts else assisted:
                self._read_prompt(given)
        return super().generate(**given)

    @torch.no_grad()
    def _read_prompt(self, given: Mapping[str, Any]) -> None:
        """Fill the cache with all but the prompt's last token, for loops that would read drafts along with the prompt:
        what is dropped must not depend on them."""
        ids = given["inputs"] if given.get("inputs") is not None else given["input_ids"]
        if len(ids) > 1:
            raise UserError(
                f"assisted decoding takes one sample at a time, input_ids have {len(ids)}; call it for each"
            )
        names = ("cache", "attention_mask", "pixel_values")
        inputs = {name: given[name] for name in names if given.get(name) is not None}
        self(
            **self.prepare_inputs_for_generation(ids, is_first_iteration=True, use_cache=True, **inputs),
            logits_to_keep=1,
        )
        given["cache"].step_back()
        given["cache"].drafting = True

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        cache: PrunedCache | None = None,
        attention_mask: Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What the next forward pass reads; of a conversation that the cache holds in part, what is new."""
        if cache is not None and cache.prompt_is_in:
            kwargs["answering"] = cache.drafting or not is_first_iteration
            if is_first_iteration and self._shows_first(input_ids, cache):
                cache.reset()  # stage 2 wants all tokens of the sample at hand, and text alone is soon read again
                kwargs["answering"], next_sequence_length = False, None
            elif is_first_iteration:
                valid = torch.ones_like(input_ids) if attention_mask is None else attention_mask
                new, real = cache.resume(fetch(input_ids), fetch(valid.bool()))
                input_ids, attention_mask = (part.to(input_ids.device) for part in (new, real.long()))
                next_sequence_length = None
                if cache.drafting:  # the prompt was read with its images
                    kwargs.pop("pixel_values", None)
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            cache=cache,
            attention_mask=attention_mask,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    def _shows_first(self, input_ids: Tensor, cache: PrunedCache) -> bool:
        """Whether a conversation has its first images in what the cache does not hold yet, and stage 2 is on."""
        cache.settle()
        image = self.config.image_token_id
        held = any(bool((row == image).any()) for row in cache.rows)
        return self.pruner.settings.language.enabled and not held and bool((input_ids == image).any())

    def _expand_inputs_for_generation(  # type: ignore[override]
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """Beams and returned sequences repeat samples; a sample's images must be repeated as one block."""
        assert input_ids is not None
        pixels, cache = kwargs.pop("pixel_values", None), kwargs.get("cache")
        if expand_size > 1:
            visual = (input_ids == self.config.image_token_id).sum(1)  # [B]
            if cache is not None and cache.prompt_is_in:
                cache.settle()
                if len(cache.rows) == len(input_ids):
                    held = [int((row == self.config.image_token_id).sum()) for row in cache.rows]
                    visual = visual - torch.tensor(held, device=visual.device)
                    cache.batch_repeat_interleave(expand_size)
            if pixels is not None and len(pixels):
                images = (visual // self.features_of(pixels)).tolist()
                pixels = torch.cat([block.repeat(expand_size, 1, 1, 1) for block in pixels.split(images)])
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        if pixels is not None:
            kwargs["pixel_values"] = pixels
        return input_ids, kwargs
