"""The trained network: Hugging Face's LLaVA modules, walked over one packed sequence with the pruner in the loop."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel, ProcessorMixin
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg

from mmprune_train.config.pruner_schema import PrunerConfig
from mmprune_train.errors import UserError
from mmprune_train.model import attention
from mmprune_train.model.cache import READ_ANEW, PrunedCache
from mmprune_train.model.content_words import Spell
from mmprune_train.model.execution import Execution
from mmprune_train.model.further_turns import check_turn, deciding, whole_trace
from mmprune_train.model.generation import Generating, refuse_arguments, refuse_foreign
from mmprune_train.model.images import swapped
from mmprune_train.model.inputs import Annotate, first_of_equal, pack
from mmprune_train.model.language import check_language_model
from mmprune_train.model.packed_pass import PackedOutput, PackedPass
from mmprune_train.model.question import FOLDER, QuestionEncoder, Words
from mmprune_train.model.scorer import new_scorer, refuse_other_scorer, save_scorer
from mmprune_train.model.vision import deepest_feature, family_of, scored_block
from mmprune_train.packed.host import fetch, take, upload
from mmprune_train.pruning import PackedSequence, Pruner, PruningTrace


class PackedLlava(Generating, PackedPass, PreTrainedModel, GenerationMixin):
    """A `LlavaForConditionalGeneration` whose samples run packed, pruned and without padding.

    The Hugging Face model is a member (`hf`), so its checkpoints load and save with its own keys; beside it stands at
    most a frozen text tower. `forward` and `generate` take the llava-hf processor's inputs; training calls
    `forward_packed`.

    Args:
        hf: the model to walk. Its LLM gets the packed attention function; its config is copied first, so another model
            built from the same config object is left alone.
        pruner: which tokens to drop.
        annotate: tells question text from role markers in a prompt's ids; needed where stage 2 is on, or stage 1 reads
            the question, and `forward` or `generate` is used.
        template: name of the conversation template the model was trained with, saved beside the pruner's settings.
        question: CLIP's text tower; needed where stage 1 reads the question, and dropped elsewhere.
        words: what the LLM's ids say; needed where stage 1 reads the question.
        execution: how to compute.
        spell: the LLM's ids of a text; needed where it reads the question word by word.
    """

    config_class = LlavaConfig
    base_model_prefix = "hf"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = None

    def __init__(
        self,
        hf: LlavaForConditionalGeneration,
        pruner: Pruner,
        annotate: Annotate | None = None,
        template: str = "v1",
        question: QuestionEncoder | None = None,
        words: Words | None = None,
        execution: Execution | None = None,
        spell: Spell | None = None,
    ) -> None:
        super().__init__(hf.config)
        self.hf = hf
        self.pruner = pruner
        self.annotate = annotate
        self.template = template
        self.question = question if pruner.reads_tower else None
        self.scorer, self.scored_by = new_scorer(pruner, hf, self.question), pruner.weighted
        self.words = words
        self.spell = spell
        self.execution = execution or Execution()
        self.last_pruning: PruningTrace | None = None
        self.generation_config = hf.generation_config
        language = hf.model.language_model
        check_language_model(language.config)
        tower: Any = hf.model.vision_tower
        blocks = len(family_of(tower.config.model_type).layers(tower))
        pruner.layers(len(language.layers))  # refuses those that this LLM does not have
        if pruner.settings.vision.enabled:
            for layer, _ in pruner.vision_passes:
                scored_block(layer, deepest_feature(hf.config.vision_feature_layer, blocks), blocks)
        if pruner.reads_tower:
            if question is None:
                raise UserError("stage 1 reads the question: pass `question` and `words` (load_model does)")
            if question.width != (width := tower.config.hidden_size):
                raise UserError(
                    f"encoder.text: its CLIP has patches of width {question.width}, the encoder of width {width}; "
                    "give the CLIP checkpoint that the encoder comes from"
                )
        own = copy.deepcopy(language.config)
        shared = language.config
        for module in language.modules():
            if getattr(module, "config", None) is shared:
                module.config = own
        own._attn_implementation = attention.NAME

    def pruned_by(self, settings: PrunerConfig) -> AbstractContextManager[None]:
        """The same network with another pruner, as long as the context lasts; with the text tower where that reads.

        Raises UserError where it scores by weights that are not here.
        """
        pruner = Pruner(settings)
        refuse_other_scorer(pruner, None if self.scorer is None else self.scored_by)
        scorer = None if pruner.weighted is None else self.scorer
        return swapped(self, pruner=pruner, question=self.question if pruner.reads_tower else None, scorer=scorer)

    def executed(self, **changes: Any) -> AbstractContextManager[None]:
        """The same network computed in another way, as long as the context lasts; the fields of `Execution`."""
        return swapped(self, execution=replace(self.execution, **changes))

    def shortened(self, layers: int) -> AbstractContextManager[None]:
        """The same network with its first decoder layers alone, as long as the context lasts."""
        language = self.hf.model.language_model
        return swapped(language, layers=language.layers[:layers])

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")  # transformers' own decorator, as on its models
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        cache: PrunedCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = True,
        answering: bool | None = None,
        **other: Any,
    ) -> LlavaCausalLMOutputWithPast | tuple[Any, ...]:
        """Logits and loss as `LlavaForConditionalGeneration` returns them, from the same inputs.

        Args:
            input_ids: [B, L], every image as its full number of image tokens; padded on either side.
            attention_mask: [B, L], 0 at padding; None: no padding. With a filled cache also [B, held + L].
            pixel_values: [I, 3, H, W], images in the order of their tokens.
            labels: [B, L] ids to predict, -100 elsewhere (not shifted).
            cache: filled by the prompt, then read and grown: by a further turn, or by tokens of the answer.
            logits_to_keep: 0: logits [B, L, V]; those of dropped tokens are NaN, of padding 0. With 1 those of each
                sample's last token, [B, 1, V]. Another number: of the last columns; a tensor: of these columns.
            answering: with a filled cache, whether the tokens are of the answer, without padding or images; None: they
                are where there is one of each sample.
        Raises:
            UserError: image tokens and images do not match; an argument that nothing reads; a further turn after which
                reading anew would keep other tokens than the cache holds.
        """
        if other:
            refuse_arguments(other, list(signature(PackedLlava.forward).parameters)[1:-1])
        refuse_foreign(cache)
        if input_ids is None:
            raise UserError("input_ids are missing; the processor makes them from text and images")
        held = cache if cache is not None and cache.prompt_is_in else None
        if held is not None and held.settings != self.pruner.settings:
            raise UserError(
                f"the cache was filled under other pruner settings (pruner={held.settings and held.settings.name}) "
                f"than pruner={self.pruner.settings.name} now; {READ_ANEW}"
            )
        if held is not None and labels is not None:
            raise UserError(f"labels go with a whole conversation; {READ_ANEW}")
        answering = input_ids.shape[1] == 1 if answering is None else answering
        if held is not None and pixel_values is None and answering:
            output = self._decode(input_ids, held, logits_to_keep)
        else:
            output = self._read(input_ids, attention_mask, pixel_values, labels, cache, use_cache, logits_to_keep)
        return output.to_tuple() if return_dict is False else output

    def _decode(self, ids: Tensor, cache: PrunedCache, logits_to_keep: int | Tensor) -> LlavaCausalLMOutputWithPast:
        """Further tokens of each sample's answer [B, n]."""
        hidden = self._run_cached(self.hf.model.language_model.embed_tokens(ids), cache)
        cache.advance(ids)
        some = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return LlavaCausalLMOutputWithPast(logits=self.hf.lm_head(hidden[:, some]), cache=cache)

    def _read(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        pixel_values: Tensor | None,
        labels: Tensor | None,
        cache: PrunedCache | None,
        use_cache: bool | None,
        logits_to_keep: int | Tensor,
    ) -> LlavaCausalLMOutputWithPast:
        """A prompt, or with a filled cache a further turn; arguments as in `forward`."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        input_ids, valid = fetch(input_ids), fetch(attention_mask.bool())
        labels = None if labels is None else fetch(labels)
        goes_on = cache is not None and cache.prompt_is_in
        if cache is not None and goes_on:
            valid = cache.mask_of_turn(valid, *input_ids.shape)
        if not bool(valid.any(1).all()):
            raise UserError(f"attention_mask leaves sample {int(valid.any(1).int().argmin())} without a token")
        asks = self.pruner.settings.language.enabled or self.pruner.reads_text
        if asks and self.annotate is None:
            raise UserError("this pruner must know question text from role markers: pass `annotate` (load_model does)")
        if pixel_values is not None and not len(pixel_values):
            pixel_values = None
        images = 0 if pixel_values is None else len(pixel_values)
        if goes_on and images and not bool((input_ids == self.config.image_token_id).any()):
            raise UserError("pixel_values: the new turn has no image; with a cache, give the new turn's images alone")
        annotate = self.annotate if asks and not goes_on else None
        features = self.config.image_seq_length if pixel_values is None else self.features_of(pixel_values)
        token = self.config.image_token_id
        sequence = pack(input_ids, valid, images, token, labels, annotate, features=features)
        if cache is not None and goes_on and asks:
            sequence = self._after(sequence, cache)
        if cache is None and use_cache:
            cache = PrunedCache()
        if cache is not None and not goes_on:
            cache.begin(sequence, input_ids.shape[1], self.pruner.settings)
            cache.settled = deciding(cache.read, self.pruner)
        entered_at = valid.flatten().nonzero().squeeze(1)  # [T] flat place of each dense token
        dense = sequence
        if pixel_values is not None:
            pixel_values, row_of = first_of_equal(pixel_values)
            sequence = replace(sequence, image=torch.where(sequence.visual, row_of[sequence.image], -1))
        packed = self.forward_packed(sequence, pixel_values, cache)
        if pixel_values is not None:
            trace, rows = packed.trace, packed.row[sequence.visual & (sequence.patch == 0)]
            trace.vision_kept = [trace.vision_kept[row] for row in rows.tolist()]
            trace.vision_order = [trace.vision_order[row] for row in rows.tolist()]
            trace.vision_scores = None if trace.vision_scores is None else take(trace.vision_scores, rows)
        self.last_pruning = packed.trace
        if cache is not None:
            shown = zip(packed.trace.vision_kept, packed.trace.vision_order, strict=True)
            for sample, image in zip(dense.segment[dense.patch == 0].tolist(), shown, strict=True):
                cache.images[sample].append(image)
            if goes_on:
                layers = self.pruner.layers(len(cache))
                self.last_pruning = whole_trace(cache, self.config.image_token_id, layers, packed.trace.encoded)
        if isinstance(logits_to_keep, int) and logits_to_keep == 1:
            last = packed.sequence.cu_seqlens[1:].long() - 1
            logits = self.hf.lm_head(take(packed.hidden, last))[:, None]
        else:
            logits = self._placed(packed, entered_at, valid, logits_to_keep)
        loss = None if labels is None else packed.loss_sum / packed.supervised
        return LlavaCausalLMOutputWithPast(loss=loss, logits=logits, cache=cache)

    def _after(self, sequence: PackedSequence, cache: PrunedCache) -> PackedSequence:
        """A further turn's tokens with their kinds and turns, which what came before decides; UserError where what was
        dropped of it would change."""
        assert self.annotate is not None
        cache.settle()
        rows = [torch.cat(pair) for pair in zip(cache.rows, sequence.ids.split(sequence.lengths.tolist()), strict=True)]
        whole = [(ids, *self.annotate(ids)) for ids in rows]
        check_turn(cache, whole, self.pruner)
        new = [slice(len(row), None) for row in cache.rows]
        kind, turn = (torch.cat([part[at][own] for part, own in zip(whole, new, strict=True)]) for at in (1, 2))
        return replace(sequence, kind=kind, turn=turn)

    def _placed(self, packed: PackedOutput, entered_at: Tensor, valid: Tensor, logits_to_keep: int | Tensor) -> Tensor:
        """Logits [B, columns, V] of some columns of the inputs.

        Args:
            entered_at: [T] flat place of each dense token.
            valid: [B, L] bool. All on the host.
        """
        size = valid.shape[1]
        columns = torch.arange(size)
        columns = columns[-logits_to_keep:] if isinstance(logits_to_keep, int) else columns[fetch(logits_to_keep)]
        place = entered_at[packed.sequence.slot]
        wanted = torch.isin(place % size, columns).nonzero().squeeze(1)
        some = self.hf.lm_head(take(packed.hidden, wanted))
        logits = some.new_full((valid.numel(), some.shape[-1]), torch.nan)
        logits = logits.masked_fill(upload(~valid.flatten(), some.device)[:, None], 0)
        logits = logits.index_copy(0, upload(place[wanted], some.device), some).view(*valid.shape, -1)
        return logits if len(columns) == size else logits[:, upload(columns, some.device)]

    def save(self, folder: str | Path, processor: ProcessorMixin) -> None:
        """Write a Hugging Face folder that plain transformers loads, the pruner's settings in its config."""
        self.hf.config.mmprune = {"pruner": asdict(self.pruner.settings), "template": self.template}
        self.hf.save_pretrained(folder)
        processor.save_pretrained(folder)
        if self.question is not None:
            self.question.save(Path(folder) / FOLDER)
        if self.scorer is not None:
            save_scorer(self.scorer, Path(folder))
