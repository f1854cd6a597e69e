"""Kept answers are taken up only by the evaluation that would give the same."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmprune_train.config.command import Command
from mmprune_train.config.compose import compose_config, load_pruner
from mmprune_train.evaluation.asking import Asker, stamps
from mmprune_train.tasks import scoring
from mmprune_train.tasks.checkpoint import Checkpoint


def test_stamps_tell_files_alone_and_those_in_folders_below(tmp_path: Path) -> None:
    for inside in ("model.safetensors", "scorer/scorer.safetensors", "question/model.safetensors"):
        file = tmp_path / "model" / inside
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"one")
        before = stamps(tmp_path / "model")
        file.write_bytes(b"another")
        assert stamps(tmp_path / "model") != before, inside
    projector = tmp_path / "mm_projector.bin"
    projector.write_bytes(b"one")
    before = stamps(projector)
    projector.write_bytes(b"another")
    assert stamps(projector) != before
    assert stamps("owner/name") == ["owner/name"]


@pytest.mark.parametrize("part", ["encoder", "llm", "text"])
def test_parts_from_elsewhere_are_among_the_weights(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("encoder", "llm", "text"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"one")
    (tmp_path / "mm_projector.bin").write_bytes(b"one")
    typed = ["encoder=clip_vit_l14_336", f"encoder.text.path={tmp_path}/text"]
    typed += [f"encoder.path={tmp_path}/encoder", f"llm.path={tmp_path}/llm"]
    monkeypatch.setattr("mmprune_train.tasks.checkpoint.base_folder", lambda chosen: Path(chosen.path))
    config = compose_config(typed)
    found = Checkpoint(tmp_path / "mm_projector.bin", tmp_path, config, None, command=Command.of(typed))
    before = scoring.weights(found)
    assert scoring.weights(found) == before
    (tmp_path / part / "model.safetensors").write_bytes(b"another")
    assert scoring.weights(found) != before


def test_another_chat_template_is_another_evaluation(tmp_path: Path) -> None:
    names = set()
    for text in ("{{ one }}", "{{ another }}"):
        model = SimpleNamespace(pruner=SimpleNamespace(settings=load_pruner("none")))
        processor = SimpleNamespace(image_processor=None, chat_template=text)
        names.add(Asker(model, processor, None, torch.float32, 1, tmp_path)._name([], 1, False))
    assert len(names) == 2
