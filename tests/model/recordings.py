"""What authors' own code has answered on small inputs (tests/model/recorded), read back as our code's inputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mmprune_train.config.compose import load_pruner
from mmprune_train.model.execution import Execution
from mmprune_train.model.images import ImageSide
from mmprune_train.pruning import IGNORE, Kind, PackedSequence, Pruner
from mmprune_train.pruning.views import VisionView

FOLDER = Path(__file__).parent / "recorded"
MADE = -1
"""In `entering` and `stays`: a token that is none of those that came in."""
NOTHING = -2
"""There: no token; a row is shorter than the longest."""


@dataclass
class Recording:
    """A file of the folder; README.md there says what is in it."""

    told: dict[str, Any]
    """Its metadata: JSON where it is that, else text."""
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, file: Path) -> Recording:
        with safe_open(file, "pt") as opened:
            return cls(
                {key: _plain(value) for key, value in opened.metadata().items()},
                {key: opened.get_tensor(key) for key in opened.keys()},  # noqa: SIM118  (no mapping)
            )

    def pruner(self) -> Pruner:
        """With the preset's settings, and what the file changes of them."""
        return Pruner(load_pruner(self.told["pruner"]))

    def images(self) -> tuple[Tensor, VisionView]:
        """What the vision tower would have given: features [I, N, D], and the view."""
        given = self._fields("view")
        if "patch_keys" not in given:
            given["patch_keys"] = lambda: given["cls_query_keys"]()[1][:, 1:]
        features = self.tensors.get("features", given.get("patches"))
        told = {"heads": self.told.get("heads", 1), "grid": tuple(self.told["grid"])}
        view = VisionView(**{"patches": features, **told, **given})
        second = self._fields("block")
        return features, replace(view, block=lambda _: replace(view, **second)) if second else view

    def _fields(self, prefix: str) -> dict[str, Any]:
        """Of a view, those that the file has."""
        parts = {name: part for name, part in self.tensors.items() if name.startswith(f"{prefix}.")}
        given: dict[str, Any] = {}
        for field in fields(VisionView):
            found = [parts[name] for name in sorted(parts) if name.split(".")[1] == field.name]
            if found:
                given[field.name] = _giving(found) if "Callable" in str(field.type) else found[0]
        return given

    def sequence(self) -> PackedSequence:
        """What enters the LLM, by the kind and turn of each token."""
        kind, turn = self.tensors["kind"], self.tensors["turn"]
        segment = self.tensors.get("segment", torch.zeros_like(kind))
        visual = kind == Kind.VISUAL
        first = visual.clone()
        first[1:] &= ~visual[:-1] | (segment[1:] != segment[:-1])
        image = torch.where(visual, first.cumsum(0) - 1, -1)
        slot, none = torch.arange(len(kind)), torch.full_like(kind, IGNORE)
        patch = torch.where(visual, slot - torch.where(first, slot, 0).cummax(0).values, -1)
        samples = int(segment[-1]) + 1
        sequence = PackedSequence(slot, slot, segment, kind, image, patch, turn, none, slot, samples)
        position = sequence.within()
        return PackedSequence(**{**vars(sequence), "position": position, "entry": position})


def _plain(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


def _giving(parts: list[Tensor]) -> Callable[..., Any]:
    return lambda *_: parts[0] if len(parts) == 1 else tuple(parts)


class RecordedImages(ImageSide):
    """The image side of a network whose tower and projector have run already."""

    def __init__(self, recording: Recording) -> None:
        self.pruner = recording.pruner()
        self.config: Any = SimpleNamespace(vision_feature_select_strategy="default")
        self.question, self.execution, self.training = None, Execution(), False
        self._projected = recording.tensors.get("projected")

    def _project_to_look(self, features: Tensor, rows: Tensor | None = None) -> Tensor:
        assert self._projected is not None, "the file has no `projected`"
        return self._projected

    def project(self, features: Tensor) -> Tensor:
        return self._project_to_look(features).flatten(0, 1)
