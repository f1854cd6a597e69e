"""What a component of the user's own answers, held to what the pruner goes on with.

The library's own are not looked at: a look at numbers waits for the device.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmprune_train.errors import UserError

Check = Callable[..., None]
"""Told who answered, the answer, and the arguments of the call; raises UserError for an answer of no use."""
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8)


def checked(function: Callable, told: str, check: Check) -> Callable:
    """The function, its answers checked; `told`: key and name, for the messages."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            answer = function(*args, **kwargs)
        except TypeError as error:
            if not _takes(function, args, kwargs):
                raise UserError(f"{told} cannot be called with its {len(args)} arguments: {error}") from None
            raise  # from inside it
        check(told, answer, *args)
        return answer

    return call


def _takes(function: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return False
    except ValueError:  # a function of C has no signature
        pass
    return True


def _described(answer: object) -> str:
    if not isinstance(answer, Tensor):
        return type(answer).__name__
    return f"{str(answer.dtype).removeprefix('torch.')} {list(answer.shape)} on {answer.device}"


def _table(
    told: str, answer: object, wanted: str, shape: Sequence[int], device: torch.device, *dtypes: torch.dtype
) -> Tensor:
    """The answer, where it is a tensor of that shape on that device, of one of the dtypes."""
    if isinstance(answer, Tensor) and answer.dtype in dtypes and answer.shape == shape and answer.device == device:
        return answer
    raise UserError(f"{told} returned {_described(answer)}; wanted is {wanted} {list(shape)} on {device}")


def _two(told: str, answer: object, wanted: str, states: Tensor, shape: str) -> tuple[Tensor, object]:
    """Changed states, of the shape and dtype of the given ones, and what else a merge answers."""
    if not isinstance(answer, tuple | list) or len(answer) != 2:
        size = f" of {len(answer)}" if isinstance(answer, tuple | list) else ""
        raise UserError(f"{told} returned {_described(answer)}{size}; wanted are two: {wanted}")
    like = f"{str(states.dtype).removeprefix('torch.')} {shape}"
    return _table(told, answer[0], like, states.shape, states.device, states.dtype), answer[1]


def _row(bad: Tensor) -> int:
    """The first of the rows [B] marked; -1 where none is."""
    return int(bad.int().argmax()) if bool(bad.any()) else -1


def vision_scores(told: str, answer: object, view: Any) -> None:
    """[I, N] scores of patches, finite where the patches are."""
    patches = view.patches
    wanted = "floating [images, patches], one score a patch,"
    scores = _table(told, answer, wanted, patches.shape[:2], patches.device, *FLOATING)
    if (image := _row(~scores.isfinite().all(1) & patches.isfinite().all(2).all(1))) >= 0:
        raise UserError(
            f"{told} returned NaN or infinite scores for image {image} of the batch; wanted are finite ones"
        )


def language_scores(told: str, answer: object, view: Any) -> None:
    """[T] scores of tokens; those of candidates must be finite, which is found with what stays."""
    wanted = "floating [tokens], one score a token of view.sequence,"
    _table(told, answer, wanted, (len(view.sequence),), view.hidden.device, *FLOATING)


def counts(told: str, answer: object, curve: Tensor, *_: Any) -> None:
    """[B] whole numbers; `min_tokens`, `max_tokens` and the row's length bound them afterwards."""
    _table(told, answer, "integer [rows], a count a row,", curve.shape[:1], curve.device, *INTEGER)


def selected(told: str, answer: object, scores: Tensor, *_: Any) -> None:
    """[B, N] bool, something of every row."""
    hint = "a bool mask [rows, patches], true at what stays (of indices: mask.scatter(1, indices, True)),"
    mask = _table(told, answer, hint, scores.shape, scores.device, torch.bool)
    if (row := _row(~mask.any(1) & scores.isfinite().all(1))) >= 0:
        raise UserError(
            f"{told} keeps nothing of row {row} (an image, or an image and its question); at least one stays"
        )


def selected_tokens(
    told: str, answer: object, scores: Tensor, counts: Tensor, view: Any, places: Tensor, *_: Any
) -> None:
    """[M] bool; a row of which nothing stays is found with what stays."""
    _table(told, answer, "a bool mask [places], true at what stays,", places.shape, scores.device, torch.bool)


def merged(told: str, answer: object, features: Tensor, kept: Tensor, *_: Any) -> None:
    """Finite features [I, N, D] of the same dtype, and the mask [I, N] with something of every image."""
    both = "the features and the kept mask"
    changed, stays = _two(told, answer, both, features, "features [images, patches, width]")
    mask = _table(told, stays, "a bool mask [images, patches]", kept.shape, kept.device, torch.bool)
    if (image := _row(~mask.any(1) & kept.any(1))) >= 0:
        raise UserError(f"{told} keeps nothing of image {image}; at least one token stays")
    bad = ~changed.detach().isfinite().all(2) & features.detach().isfinite().all(2) & mask
    if (image := _row(bad.any(1))) >= 0:
        raise UserError(f"{told} returned NaN or infinite features for image {image} of the batch")


def merged_states(told: str, answer: object, hidden: Tensor, places: Tensor, *more: Any) -> None:
    """States [T, D] of the same dtype, and a mask [M] of the dropped tokens that became a made one."""
    both = "the states and the mask of made tokens"
    _, mask = _two(told, answer, both, hidden, "states [tokens, width]")
    _table(told, mask, "a bool mask [places]", places.shape, hidden.device, torch.bool)
