"""The generation cache: every layer holds only the tokens that entered it, and knows which these are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from mmprune_train.config.pruner_schema import PrunerConfig
from mmprune_train.errors import UserError
from mmprune_train.packed.host import fetch, upload
from mmprune_train.packed.sequence import PackedSequence

READ_ANEW = "read the conversation anew: all its pixel_values, and no cache"


@dataclass
class Held:
    """What a run of layers holds: a row for each sample, `S` columns of keys and values, some of them empty."""

    token: Tensor
    """[B, S] which of its sample's dense tokens a column is, -1: none; on the host."""
    layers: list[int]
    real: Tensor
    """[B, S] bool: there is a token. On the device, as `ahead`."""
    ahead: Tensor
    """[B] position id of the next token."""


@dataclass
class _Turn:
    """Tokens of a further turn on their way through the layers, a row for each sample; on the host."""

    token: Tensor
    """[B, W] as in `Held`."""
    offset: Tensor
    """[B, W] positions after the last token of the sample."""
    renumbered: Tensor
    """[B, W] the same behind a layer at which stage 2 renumbers."""
    rows: list[Tensor]
    """Per sample, the dense tokens' ids."""


class PrunedCache(DynamicCache):
    """Keys and values per layer, as [B, Hkv, S_l, d], where S_l is that layer's longest sample.

    While the prompt runs through the model packed (`start_layers` names the tokens that enter the next layers),
    `update` files each sample's keys and values in its row and hands the packed ones back. Later updates append one
    column per generated token, as in transformers' dynamic cache, or the columns of a further turn (`enter_turn`).
    `mask(layer)` tells which columns are real. Lengths that others ask for are those of `input_ids`, as if nothing had
    been dropped.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read: list[tuple[Tensor, Tensor, Tensor]] = []
        """Per sample: ids, kinds and turns of the dense prompt; on the host."""
        self.rows: list[Tensor] = []
        """Per sample: ids of all dense tokens but those decoded since `settle`; on the host."""
        self.settled: list[int] = []
        """Per sample: how many of its first tokens decided what was dropped."""
        self.images: list[list[tuple[Tensor, Tensor]]] = []
        """Per sample and image: the kept patches in raster order, and as they entered the LLM; on the host."""
        self.settings: PrunerConfig | None = None
        """Of the pruner that dropped tokens."""
        self.drafting = False
        """Whether the prompt is read already, and transformers' loop begins with drafts of the answer."""
        self._held: list[Held] = []  # the first: what entered the LLM; one more behind each pruning layer
        self._of: list[int] = []  # per layer, the index of what it holds
        self._filing: tuple[Tensor, Tensor, Tensor] | None = None  # segment, column, table of keys' rows
        self._turn: _Turn | None = None
        self._decoded: Tensor | None = None  # [B, n] ids since `settle`
        self._order: Tensor | None = None  # rows of the device's tables, as rows of the host's
        self._columns = 0

    def begin(self, sequence: PackedSequence, columns: int, settings: PrunerConfig) -> None:
        """The dense prompt, on the host; `columns`: the width of its `input_ids`; the pruner's settings."""
        lengths = sequence.lengths.tolist()
        parts = (sequence.ids, sequence.kind, sequence.turn)
        self.read = list(zip(*(part.split(lengths) for part in parts), strict=True))
        self.rows = [ids for ids, _, _ in self.read]
        self.settled, self.images = [0] * len(lengths), [[] for _ in lengths]
        self._columns, self.settings = columns, settings

    def start_layers(self, sequence: PackedSequence, device: torch.device) -> None:
        """The tokens of `sequence` enter every layer from here on (until the next call); states are on `device`."""
        lengths = sequence.lengths
        width = int(lengths.max())
        column = sequence.within() + (width - lengths)[sequence.segment]
        dense = torch.tensor([len(row) for row in self.rows])
        token = torch.full((len(lengths), width), -1)
        token[sequence.segment, column] = sequence.slot - (dense.cumsum(0) - dense)[sequence.segment]
        self._hold(len(self._held), token, [], device)
        self._filing = (upload(sequence.segment, device), upload(column, device), self._held[-1].real)

    def _hold(self, number: int, token: Tensor, layers: list[int], device: torch.device) -> None:
        """Write down what a run of layers holds; `rows` and what entered the LLM come first.

        A token's position is its place among those that entered the LLM, or among all where stage 1 keeps positions;
        where stage 2 renumbers, among those that the layer holds.
        """
        assert self.settings is not None, "no prompt has begun"
        if number and not self._renumbered(number):
            ahead = self._held[0].ahead
        elif not number and self.settings.vision.positions == "original":
            ahead = upload(torch.tensor([len(row) for row in self.rows]), device)
        else:
            ahead = upload((token >= 0).sum(1), device)
        self._held[number : number + 1] = [Held(token, layers, upload(token >= 0, device), ahead)]

    def _hold_more(self, rows: list[Tensor], token: Tensor) -> None:
        """Further columns in every layer; arguments as in `_Turn`."""
        self.rows = [torch.cat(pair) for pair in zip(self.rows, rows, strict=True)]
        for number, held in enumerate(self._held):
            self._hold(number, torch.cat([held.token, token], 1), held.layers, held.real.device)

    def _renumbered(self, number: int) -> bool:
        assert self.settings is not None, "no prompt has begun"
        return number > 0 and self.settings.language.positions == "contiguous"

    def end_prompt(self) -> None:
        """The prompt is through."""
        device = self._held[0].real.device
        self._filing = None
        self._decoded = torch.empty((len(self.rows), 0), dtype=torch.long, device=device)

    @property
    def prompt_is_in(self) -> bool:
        """Whether a prompt has been filed, so that further tokens go on from it."""
        return self._decoded is not None

    def enter_turn(self, sequence: PackedSequence, rows: list[Tensor]) -> Tensor:
        """Tokens of a further turn come next, not all samples having as many.

        Args:
            sequence: what stage 1 left of them; positions from 0, `slot` in the packed dense tokens of the turn.
            rows: per sample, those dense tokens' ids.
        Returns:
            [T] the flat place of each token of `sequence` in a table of [B, W]; on the host.
        """
        self.settle()
        lengths, size = sequence.lengths, len(rows)
        width = int(lengths.max())
        place = sequence.segment * width + sequence.within() + (width - lengths)[sequence.segment]
        new, held = (torch.tensor([len(row) for row in part]) for part in (rows, self.rows))
        token = sequence.slot + (held - (new.cumsum(0) - new))[sequence.segment]

        def table(values: Tensor, empty: int) -> Tensor:
            return torch.full((size * width,), empty).index_copy(0, place, values).view(size, width)

        self._turn = _Turn(table(token, -1), table(sequence.position, 0), table(sequence.within(), 0), rows)
        return place

    def end_turn(self) -> None:
        """The turn is through all layers."""
        assert self._turn is not None, "no turn has been entered"
        turn, self._turn = self._turn, None
        self._hold_more(turn.rows, turn.token)
        self._columns += max(len(row) for row in turn.rows)

    def mask_of_turn(self, valid: Tensor, samples: int, width: int) -> Tensor:
        """[B, width] which tokens of a further turn are real, from a mask of them or of the whole conversation."""
        self.settle()
        if len(valid) != samples or samples != len(self.rows):
            raise UserError(
                f"the cache holds {len(self.rows)} samples, input_ids {samples}, attention_mask {len(valid)}"
            )
        if valid.shape[1] == width:
            return valid
        if valid.shape[1] != self._columns + width:
            raise UserError(
                f"attention_mask has {valid.shape[1]} columns; {width} tokens are new and the cache holds "
                f"{self._columns}, so it must have {width} or {self._columns + width}"
            )
        if valid[:, :-width].sum(1).tolist() != [len(row) for row in self.rows]:
            raise UserError(
                "attention_mask hides tokens that the cache holds, or shows padding; give the whole conversation to "
                f"generate, or {READ_ANEW}"
            )
        return valid[:, -width:]

    def position(self, layer_idx: int, new: int) -> Tensor:
        """Position ids [B, new] of the next tokens in a layer. Where stage 2 renumbers what it keeps, they are smaller
        behind it, as in training."""
        assert self._decoded is not None, "decode before the prompt"
        number = self._of[layer_idx]
        ahead = self._held[number].ahead[:, None]
        if self._turn is not None:
            places = self._turn.renumbered if self._renumbered(number) else self._turn.offset
            return ahead + upload(places, ahead.device)
        done = self._decoded.shape[1]
        return ahead + torch.arange(done, done + new, device=ahead.device)

    def mask(self, layer_idx: int, new: int) -> Tensor:
        """bool [B, 1, new, S + new] of the columns that `new` further tokens of each sample may see in a layer."""
        assert self._decoded is not None, "decode before the prompt"
        real = self._held[self._of[layer_idx]].real
        columns = self._decoded.shape[1] + (new if self._turn is None else 0)
        seen = torch.nn.functional.pad(real, (0, columns), value=True)
        if self._turn is not None:
            seen = torch.cat([seen, upload(self._turn.token >= 0, real.device)], 1)
        causal = torch.ones((new, seen.shape[1]), dtype=torch.bool, device=real.device)
        causal = causal.tril(seen.shape[1] - new)
        own = causal & ~causal.tril(seen.shape[1] - new - 1)  # an empty column sees itself: softmax needs something
        return (seen[:, None, None] & causal) | own

    def advance(self, ids: Tensor) -> None:
        """Tokens [B, n] of answers have gone through all layers."""
        assert self._decoded is not None, "decode before the prompt"
        self._decoded = torch.cat([self._decoded, ids], 1)
        self._columns += ids.shape[1]

    def settle(self) -> None:
        """Write down what was decoded and reordered since the last time. Waits for the device."""
        if self._order is not None:
            order = fetch(self._order).tolist()
            self.read, self.rows = [self.read[row] for row in order], [self.rows[row] for row in order]
            self.settled, self.images = [self.settled[row] for row in order], [self.images[row] for row in order]
            for held in self._held:
                held.token = held.token[order]
            self._order = None
        if self._decoded is not None and self._decoded.shape[1]:
            ids = fetch(self._decoded)
            step = torch.arange(ids.shape[1]).expand_as(ids)
            token = torch.tensor([len(row) for row in self.rows])[:, None] + step
            self._hold_more(list(ids), token)
            self._decoded = self._decoded[:, :0]

    def resume(self, input_ids: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """What of a whole conversation is not held yet; what is held and not part of it is forgotten.

        Args:
            input_ids: [B, L], padded anywhere.
            valid: [B, L] bool, False at padding. Both on the host.
        Returns:
            [B, W] ids that come next, at least one a sample, padded on the left; and [B, W] which are real.
        Raises:
            UserError: another conversation, or another number of them.
        """
        self.settle()
        if len(input_ids) != len(self.rows):
            raise UserError(
                f"the cache holds {len(self.rows)} samples, input_ids {len(input_ids)}: repeat or choose its rows with "
                f"cache.batch_repeat_interleave or cache.batch_select_indices, or {READ_ANEW}"
            )
        whole = [ids[real] for ids, real in zip(input_ids, valid, strict=True)]
        keep = []
        for number, (ids, row, settled) in enumerate(zip(whole, self.rows, self.settled, strict=True)):
            both = min(len(ids), len(row))
            common = int((ids[:both] == row[:both]).cumprod(0).sum())
            if common < max(1, min(settled, len(row))):
                raise UserError(
                    f"input_ids must be the whole conversation: sample {number} differs from what the cache holds at "
                    f"token {common}"
                    + (f", and what was dropped depends on the first {settled}" if settled else "")
                    + f"; {READ_ANEW}"
                )
            keep.append(min(common, len(ids) - 1))
        self._forget(keep)
        rest = [ids[count:] for ids, count in zip(whole, keep, strict=True)]
        width = max(map(len, rest))
        self._columns = input_ids.shape[1] - width
        real = torch.arange(width) >= width - torch.tensor([[len(ids)] for ids in rest])
        return input_ids.new_zeros(real.shape).masked_scatter(real, torch.cat(rest)), real

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -`tokens_to_remove` tokens of each sample, as transformers' caches do.

        Raises UserError where tokens would go by which others were dropped.
        """
        count = -tokens_to_remove
        if count < 0:
            raise UserError(f"cache.crop({tokens_to_remove}): give how many tokens to remove, as a negative number")
        if count and self._decoded is not None and count <= self._decoded.shape[1]:
            super().crop(tokens_to_remove)
            self._decoded = self._decoded[:, :-count]
        elif count:
            self.settle()
            for row, settled in zip(self.rows, self.settled, strict=True):
                if len(row) - count < settled - 1:
                    raise UserError(
                        f"cache.crop({tokens_to_remove}) reaches back to tokens by which others were dropped: of "
                        f"{len(row)} at most {len(row) - settled + 1} can go; {READ_ANEW}"
                    )
            self._forget([max(len(row) - count, 0) for row in self.rows])
        self._columns -= count

    def step_back(self) -> None:
        """Forget the last token of each sample, which comes once more."""
        self.settle()
        self._forget([len(row) - 1 for row in self.rows])
        self._columns -= 1

    def _forget(self, keep: list[int]) -> None:
        """Hold of each sample only the first `keep` dense tokens; columns of nothing at the end go."""
        bound = torch.tensor(keep)[:, None]
        self.rows = [row[:count] for row, count in zip(self.rows, keep, strict=True)]
        for number, held in enumerate(self._held):
            stays = (held.token >= 0) & (held.token < bound)
            used = stays.any(0).nonzero()
            width = int(used.max()) + 1 if len(used) else 0
            token = held.token.masked_fill(~stays, -1)[:, :width]
            self._hold(number, token, held.layers, held.real.device)
            for index in held.layers:
                layer = self.layers[index]
                layer.keys, layer.values = layer.keys[..., :width, :], layer.values[..., :width, :]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):  # type: ignore[no-untyped-def]
        if self._filing is None:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        segment, column, real = self._filing

        def file(packed: Tensor) -> Tensor:
            table = packed.new_zeros((*real.shape, packed.shape[1], packed.shape[3]))
            table[segment, column] = packed[0].transpose(0, 1)[: len(segment)]  # rows behind the tokens: `rounded_up`
            return table.transpose(1, 2)

        super().update(file(key_states), file(value_states), layer_idx)
        self._of.append(len(self._held) - 1)
        self._held[-1].layers.append(layer_idx)
        return key_states, value_states

    def reset(self) -> None:
        """Hold nothing, as if new."""
        self.__init__()  # type: ignore[misc]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of `input_ids` that have gone through the model, whatever a layer holds of them."""
        return self._columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._rows_become(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._rows_become(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self._decoded is not None:
            rows = torch.arange(len(self._decoded), device=self._decoded.device)
            self._rows_become(rows.repeat_interleave(repeats))

    def _rows_become(self, rows: Tensor) -> None:
        assert self._decoded is not None, "no rows before the prompt"
        rows = rows.to(self._decoded.device)
        for held in self._held:
            held.real, held.ahead = held.real[rows], held.ahead[rows]
        self._decoded = self._decoded[rows]
        self._order = rows if self._order is None else self._order[rows]

    def entered(self, layer_idx: int | None) -> list[Tensor]:
        """Per sample, which of its dense tokens a layer holds; None: which entered the LLM. `settle` first."""
        held = self._held[0 if layer_idx is None else self._of[layer_idx]]
        return [row[row >= 0] for row in held.token]
