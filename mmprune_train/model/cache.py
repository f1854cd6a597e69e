"""The generation cache: every layer holds only the tokens that entered it."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from mmprune_train.pruning.host import upload
from mmprune_train.pruning.packed import PackedSequence


class PrunedCache(DynamicCache):
    """Keys and values per layer, as [B, Hkv, S_l, d], samples right-aligned, where S_l is that layer's longest sample.

    While the prompt runs through the model packed (`start_layer` names the tokens that enter the next layer), `update`
    files each sample's keys and values in its row and hands the packed ones back. Later updates append one column per
    generated token, as in transformers' dynamic cache, and `mask(layer)` tells which columns are real.
    """

    def __init__(self) -> None:
        super().__init__()
        self._masks: list[Tensor] = []  # per layer [B, S_l] bool at the end of the prompt
        self._next: list[Tensor] = []  # per layer [B] position id of each sample's next token at the end of the prompt
        self._filing: tuple[Tensor, Tensor, Tensor, Tensor] | None = None  # segment, column, mask, next position
        self._decoded: int | None = None  # tokens since the prompt

    def start_layers(self, sequence: PackedSequence, device: torch.device) -> None:
        """The tokens of `sequence` enter every layer from here on (until the next call); states are on `device`."""
        lengths = sequence.lengths
        width = int(lengths.max())
        column = sequence.within() + (width - lengths)[sequence.segment]
        mask = torch.arange(width) >= (width - lengths)[:, None]
        following = sequence.position[sequence.cu_seqlens[1:].long() - 1] + 1
        segment, column, mask, following = (upload(t, device) for t in (sequence.segment, column, mask, following))
        self._filing = (segment, column, mask, following)

    def end_prompt(self) -> None:
        """The prompt is through."""
        self._filing, self._decoded = None, 0

    @property
    def prompt_is_in(self) -> bool:
        """Whether a prompt has been filed, so that further tokens are decoded one by one."""
        return self._decoded is not None

    def position(self, layer_idx: int, new: int) -> Tensor:
        """Position ids [B, new] of the next tokens in a layer. Where stage 2 renumbers what it keeps, they are smaller
        behind it, as in training."""
        assert self._decoded is not None, "decode before the prompt"
        steps = torch.arange(self._decoded, self._decoded + new, device=self._next[layer_idx].device)
        return self._next[layer_idx][:, None] + steps

    def advance(self, new: int) -> None:
        """That many tokens of each sample have gone through all layers."""
        assert self._decoded is not None, "decode before the prompt"
        self._decoded += new

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -`tokens_to_remove` decoded tokens of each sample, as transformers' caches do."""
        super().crop(tokens_to_remove)
        if self._decoded is not None:
            self._decoded += tokens_to_remove

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):  # type: ignore[no-untyped-def]
        if self._filing is None:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        segment, column, mask, following = self._filing

        def file(packed: Tensor) -> Tensor:
            table = packed.new_zeros((mask.shape[0], mask.shape[1], packed.shape[1], packed.shape[3]))
            table[segment, column] = packed[0].transpose(0, 1)
            return table.transpose(1, 2)

        super().update(file(key_states), file(value_states), layer_idx)
        self._masks.append(mask)
        self._next.append(following)
        return key_states, value_states

    def mask(self, layer_idx: int, new: int) -> Tensor:
        """bool [B, 1, new, S + new] of the columns that `new` further tokens of each sample may see in a layer."""
        prompt = self._masks[layer_idx]
        grown = self.get_seq_length(layer_idx) + new - prompt.shape[1]
        seen = torch.nn.functional.pad(prompt, (0, grown), value=True)[:, None, None]
        causal = torch.ones((new, seen.shape[-1]), dtype=torch.bool, device=prompt.device)
        return seen & causal.tril(seen.shape[-1] - new)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._masks = [mask[beam_idx] for mask in self._masks]
        self._next = [following[beam_idx] for following in self._next]
