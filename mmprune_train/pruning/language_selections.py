"""Stage-2 selections: which of the candidates inside the LLM a count keeps.

A selection takes scores [T] of all tokens, counts [G], the view that the score had, and the candidates: their places
[M], and the row that each belongs to, from 0 and not falling, both on the host. It answers a mask [M].
"""

from __future__ import annotations

from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mmprune_train.components.declare import language_selection
from mmprune_train.packed.host import take, upload
from mmprune_train.packed.padding import pad, unpad
from mmprune_train.pruning.selections import top_mask
from mmprune_train.pruning.views import LanguageView

Scores = Float[Tensor, " T"]
Counts = Int64[Tensor, " G"]
Places = Int64[Tensor, " M"]
Mask = Bool[Tensor, " M"]


@language_selection(name="top", default_for="pruner.language.selection")
def top_tokens(scores: Scores, counts: Counts, view: LanguageView, places: Places, row: Places) -> Mask:
    """The highest scores of each row; of equal ones the earlier token stays."""
    table, lengths = pad(take(scores, places), row, len(counts))
    return unpad(top_mask(table, counts, upload(lengths, table.device)), row)
