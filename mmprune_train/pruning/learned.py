"""Stage-1 scores that are trained with the network: a small scorer of patches, and of the question where it is read."""

from __future__ import annotations

from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu

from mmprune_train.components.declare import Range, vision_score
from mmprune_train.pruning.views import VisionView, full_precision, given


class PatchScorer(nn.Module):
    """w . (gelu(W x_i + U m + b) * (1 + V q)): x_i a patch, normalised, m the image's mean of these, q the question.

    Args:
        width: of the patches.
        question_width: of the question's embedding; None: none is read.
        hidden: rows of W, U and V.
    """

    def __init__(self, width: int, question_width: int | None = None, hidden: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, hidden)
        self.context = nn.Linear(width, hidden, bias=False)
        self.outer = nn.Parameter(torch.empty(hidden).uniform_(-(hidden**-0.5), hidden**-0.5))
        self.question = None if question_width is None else nn.Linear(question_width, hidden, bias=False)

    def forward(
        self, patches: Float[Tensor, "I N D"], question: Float[Tensor, "I E"] | None = None
    ) -> Float[Tensor, "I N"]:
        """[I, N] scores, float32."""
        with full_precision(patches):
            patches = self.norm(patches.to(self.inner.weight.dtype))
            inner = gelu(self.inner(patches) + self.context(patches.mean(1, keepdim=True)))
            if self.question is not None and question is not None:
                asked = question / question.norm(dim=-1, keepdim=True).clamp(min=1e-6)
                inner = inner * (1 + self.question(asked.to(inner.dtype)))[:, None]
            return inner.float() @ self.outer.float()  # bf16 would tie patches


@vision_score(reads=("patches",), signed=True, weights="PatchScorer")
def learned(view: VisionView, *, hidden: Annotated[int, Range(1, 65536)] = 64) -> Float[Tensor, "I N"]:
    """[I, N] what a small network makes of each patch and of the image's mean patch, trained by what the answers lose.

    Our choice. It begins with random weights, so with a random choice.

    Args:
        hidden: width of that network.
    """
    return given(view.weights)(view.patches)


@vision_score(reads=("patches", "question"), signed=True, weights="PatchScorer")
def learned_with_question(view: VisionView, *, hidden: Annotated[int, Range(1, 65536)] = 64) -> Float[Tensor, "I N"]:
    """[I, N] the same, its inner layer scaled by what another layer makes of CLIP's embedding of the question.

    An image without a question is scored without. Our choice.

    Args:
        hidden: width of that network.
    """
    return given(view.weights)(view.patches, given(view.question)(True)[1])
