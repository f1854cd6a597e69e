"""The projector's shape and how its new weights begin."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import LlavaConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from mmprune_train.errors import UserError


def new_projector(config: LlavaConfig, init: str = "torch") -> LlavaMultiModalProjector:
    """LLaVA's projector with new weights, for `projector_hidden_act="linear"` its single Linear: torch's own, or normal
    ones of variance 1 / inputs without bias for `unit_variance` and `matched` (which `match_features` completes)."""
    projector = LlavaMultiModalProjector(config)
    if init in ("unit_variance", "matched"):
        for linear in (projector.linear_1, projector.linear_2):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)
    if config.projector_hidden_act == "linear":  # with the same keys: the second layer is the identity, never trained
        nn.init.eye_(projector.linear_2.weight)
        nn.init.zeros_(projector.linear_2.bias)
        projector.linear_2.requires_grad_(False)
    return projector


@torch.no_grad()
def match_features(projector: LlavaMultiModalProjector, features: Float[Tensor, "K D"], text_rms: float) -> None:
    """Fit a new projector to the features it will see (data-dependent initialisation, as Mishkin and Matas 2016 do for
    whole networks; our choice here).

    The first layer is folded with the standardisation of its inputs, so that a few large feature dimensions do not
    decide every output; the output's root mean square becomes that of the text embeddings.

    Args:
        features: [K, D] patches of a sample of images, as the projector gets them.
        text_rms: root mean square of the LLM's input embeddings.
    Raises:
        UserError: fewer than two patches, or the projector has no bias to fold the mean into.
    """
    first, second = projector.linear_1, projector.linear_2
    if len(features) < 2 or first.bias is None:
        raise UserError("projector.init=matched needs images in the first stage's data and a projector with biases")
    mean, deviation = features.float().mean(0), features.float().std(0)
    weight = first.weight.float() / deviation.clamp(min=1e-6)
    first.weight.copy_(weight)
    first.bias.copy_(first.bias.float() - weight @ mean)
    gain = text_rms / projector(features.to(first.weight.dtype)).float().square().mean().sqrt()
    last = second if second.weight.requires_grad else first
    for tensor in (last.weight, last.bias):
        tensor.mul_(gain.to(tensor.dtype))
