"""A run goes on only from the weights that it began with."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from mmprune_train.errors import UserError
from mmprune_train.model.weights.base import base_of, check_base, hash_of, weight_files
from mmprune_train.model.weights.start import Start
from mmprune_train.training import base_weights
from mmprune_train.training.base_weights import unchanged
from mmprune_train.training.rundir import RunDirectory
from mmprune_train.training.starts import note_start


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "vicuna"
    path.mkdir()
    for number in (1, 2):
        (path / f"model-0000{number}.safetensors").write_bytes(b"weights %d" % number * 50)
    (path / "config.json").write_text("{}")
    return path


def test_other_weights_are_refused_with_both_hashes_and_the_remedy(folder: Path) -> None:
    recorded = unchanged("llm", folder, None)
    shard = folder / "model-00002.safetensors"
    shard.write_bytes(shard.read_bytes().replace(b"2", b"3"))
    now = hash_of(weight_files(folder))
    message = f"llm: .*{now[:12]}.*{recorded['sha256'][:12]}.*vicuna.*run_id=.*restart=true"
    with pytest.raises(UserError, match=message):
        unchanged("llm", folder, recorded)


def test_files_that_are_the_very_same_are_not_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = unchanged("llm", folder, None)
    read = []
    monkeypatch.setattr(base_weights, "hash_of", lambda files: read.append(files) or hash_of(files))
    assert unchanged("llm", folder, recorded) == recorded and not read
    shard = folder / "model-00001.safetensors"
    written = shard.stat()
    shard.write_bytes(shard.read_bytes())  # as a copy that keeps the date
    os.utime(shard, ns=(written.st_atime_ns, written.st_mtime_ns))
    again = unchanged("llm", folder, recorded)
    assert read and again["sha256"] == recorded["sha256"] and again["stamps"] != recorded["stamps"]


def test_long_reading_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unchanged("llm", folder, None)
    assert not capsys.readouterr().out
    monkeypatch.setattr(base_weights, "LONG", 900)
    unchanged("llm", folder, None)
    assert re.search(r"the weights of llm .*GB", capsys.readouterr().out)


def test_a_manifest_without_a_hash_is_completed(folder: Path) -> None:
    assert unchanged("llm", folder, {"source": "vicuna"})["sha256"] == hash_of(weight_files(folder))


def test_a_stage_that_has_begun_keeps_what_it_started_from(folder: Path, tmp_path: Path) -> None:
    run, start = RunDirectory(tmp_path / "run", writable=True), Start("llava", folder, "stage pretrain", own=True)
    note_start(run, "instruct", None)
    note_start(run, "instruct", start)  # without a checkpoint nothing is lost
    (run.stage("instruct") / "checkpoints" / "step-00000002.ckpt").mkdir(parents=True)
    note_start(run, "instruct", start)
    with pytest.raises(UserError, match=r"began with vicuna, and it would now start from the base weights"):
        note_start(run, "instruct", None)
    other = RunDirectory(run.path, writable=False)
    note_start(other, "instruct", start)
    (folder / "model-00001.safetensors").write_bytes(b"trained anew")
    for rank in (run, other):  # one that went on would wait for the other
        with pytest.raises(UserError, match=r"stage instruct: the weights in .*vicuna"):
            note_start(rank, "instruct", start)


@pytest.mark.parametrize(
    ("part", "remedy"), [("model", "name its folder as base_model_name"), ("encoder", "give encoder.path=FOLDER")]
)
def test_adapters_are_refused_where_a_part_of_their_base_has_no_counterpart(
    part: str, remedy: str, folder: Path, tmp_path: Path
) -> None:
    known = {"sha256": hash_of(weight_files(folder)), "source": "vicuna"}
    check_base("init_from", tmp_path, {part: known}, {part: folder})
    for parts in ({part: None, "llm": folder}, {"llm": folder}):
        with pytest.raises(UserError, match=rf"^init_from: .*trained on the {part} vicuna .*{remedy}"):
            check_base("init_from", tmp_path, {part: known, "llm": known}, parts)


def test_adapters_that_went_on_from_others_belong_to_the_base_weights(tmp_path: Path) -> None:
    adapters = tmp_path / "run" / "instruct" / "adapters"
    adapters.mkdir(parents=True)
    start = {"kind": "adapters", "adapters": "continue", "sha256": "a" * 64, "source": "adapters"}
    llm = {"name": "vicuna_7b", "sha256": "b" * 64, "source": "vicuna"}
    manifest = {"stages": {"instruct": {"start": start}}, "base_weights": {"llm": llm}}
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    assert base_of("ckpt", adapters) == {"llm": {"sha256": "b" * 64, "source": "vicuna"}}
