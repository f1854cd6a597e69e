"""The plain Hugging Face model beside which everything is measured: padded, dense, logits at every position."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmprune_train.data.batch import Batch
from mmprune_train.model import attention
from mmprune_train.model.llava import PackedLlava
from mmprune_train.model.lora import as_peft_adds
from mmprune_train.pruning import IGNORE


def padded_inputs(batch: Batch) -> dict[str, Tensor]:
    """What `LlavaForConditionalGeneration.forward` takes of a packed batch: padded on the right to its longest sample,
    an image encoded for each sample that shows it, labels not shifted."""
    sequence = batch.sequence
    lengths = sequence.lengths.tolist()
    ids = pad_sequence(list(sequence.ids.split(lengths)), batch_first=True, padding_value=0)
    targets = pad_sequence(list(sequence.target.split(lengths)), batch_first=True, padding_value=IGNORE)
    labels = torch.full_like(ids, IGNORE)
    labels[:, 1:] = targets[:, :-1]
    mask = torch.arange(ids.shape[1], device=ids.device) < sequence.lengths[:, None]
    inputs = {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}
    if batch.pixel_values is not None:
        inputs["pixel_values"] = batch.pixel_values[sequence.image[sequence.patch == 0]]
    return inputs


@contextmanager
def as_transformers(model: PackedLlava) -> Iterator[None]:
    """While the context lasts, `model.hf` runs as transformers and PEFT make it, with torch's attention."""
    config = model.hf.model.language_model.layers[0].self_attn.config
    config._attn_implementation = "sdpa"
    try:
        with as_peft_adds(model.hf):
            yield
    finally:
        config._attn_implementation = attention.NAME
