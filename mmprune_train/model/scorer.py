"""Weights of the pruner's own: those of a stage-1 score that is trained with the network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlavaForConditionalGeneration

from mmprune_train.errors import UserError
from mmprune_train.model.question import QuestionEncoder
from mmprune_train.model.weights.files import read_tensors, tensors_of
from mmprune_train.pruning import Pruner
from mmprune_train.pruning.parts import Part, new_weights

if TYPE_CHECKING:
    from mmprune_train.model.llava import PackedLlava

FILE = "scorer/weights.safetensors"
"""In a folder of its own: engines take every file of weights beside the model's for a part of it."""


def new_scorer(pruner: Pruner, hf: LlavaForConditionalGeneration, question: QuestionEncoder | None) -> nn.Module | None:
    """What the pruner's score declares as its weights, on the network's device and in its type; None: it has none."""
    if pruner.weighted is None:
        return None
    text = None
    if question is not None and "question" in pruner.weighted.component.reads:
        text = int(question.clip.config.projection_dim)
    with torch.device(hf.device):
        made = new_weights(pruner.weighted, width=int(hf.config.vision_config.hidden_size), question_width=text)
    return made.to(hf.dtype)


def refuse_other_scorer(pruner: Pruner, made: Part | None) -> None:
    """Raise UserError where a pruner scores by weights that a network does not have.

    Args:
        made: the score that the network's own were made for; None: it has none.
    """
    asked = pruner.weighted
    if asked is None or (made and (made.component.name, made.told) == (asked.component.name, asked.told)):
        return
    has = f"with those of {made.component.name}({_listed(made)})" if made else "without"
    raise UserError(
        f"pruner={pruner.settings.name}: pruner.vision.score={asked.component.name}({_listed(asked)}) has weights of "
        f"its own, and this network was made {has}: take another pruner, or a model that was trained with this one"
    )


def _listed(part: Part) -> str:
    return ", ".join(f"{name}={value}" for name, value in part.told.items())


def save_scorer(scorer: nn.Module, folder: Path) -> None:
    """Write its weights where `load_scorer` finds them."""
    weights = {name: weight.detach().cpu().contiguous() for name, weight in scorer.state_dict().items()}
    (folder / FILE).parent.mkdir(exist_ok=True)
    save_file(weights, folder / FILE, {"format": "pt"})


def has_scorer(folder: Path) -> bool:
    """Whether a model's folder has weights of a score."""
    return (folder / FILE).is_file()


def load_scorer(model: PackedLlava, told: object, folder: Path) -> None:
    """Put the folder's weights into the model's score, in place; on the meta device they are only compared.

    Args:
        told: where the folder's name came from, for messages.
    Raises:
        UserError: there are none, or they are those of another score.
    """
    assert model.scorer is not None
    name = model.pruner.settings.vision.score
    if not has_scorer(folder):
        raise UserError(
            f"{told}: pruner.vision.score={name} has weights that are trained, and there is no {FILE} in {folder}; "
            "train a model with it, or take another pruner"
        )
    found, here = tensors_of(str(told), folder / FILE), model.scorer.state_dict()
    wrong = sorted(found.keys() ^ here.keys()) or [key for key in here if found[key].shape != tuple(here[key].shape)]
    if wrong:
        raise UserError(
            f"{told}: {folder / FILE} does not fit pruner.vision.score={name} ({wrong[0]} and {len(wrong) - 1} more); "
            "take the score and the score_args that it was trained with"
        )
    values = read_tensors(found)
    with torch.no_grad():
        for key, tensor in here.items():
            tensor.copy_(values[key])
