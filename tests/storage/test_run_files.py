"""What a run says of its own stages and files is held against what lies there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mmprune_train.errors import UserError
from mmprune_train.model.weights.folders import model_folder
from mmprune_train.storage.files import rows_of, write_json
from mmprune_train.storage.run_files import check_saved, files_of_stage, keep_steps, read_manifest, read_result, rows_to


def test_steps_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s}) + "\n" for s in range(1, 6)) + '{"step": 6, "lo')
    keep_steps(path, 3)
    assert [row["step"] for row in rows_of(path)] == [1, 2, 3]


def test_a_resumed_run_needs_all_rows_up_to_its_step_and_no_later_one(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    one, two, four = (json.dumps({"step": n}) + "\n" for n in (1, 2, 4))
    file.write_text(one + two + "{bad\n" + four)
    assert [row["step"] for row in rows_to(file, 2)] == [1, 2]
    with pytest.raises(UserError, match="line 3 is damaged"):
        rows_to(file, 4)
    file.write_text(one + two)
    with pytest.raises(UserError, match=r"no row of step 3.*delete .*checkpoints"):
        rows_to(file, 3)


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """A finished one."""
    stage = tmp_path / "run" / "instruct"
    for name in ("metrics.jsonl", "model/config.json", "model/text/model.safetensors", "adapters/a.safetensors"):
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        (stage / name).write_bytes(name.encode())
    state = {"state": "done", "files": files_of_stage(stage)}
    write_json(stage.parent / "manifest.json", {"stages": {"instruct": state}}, checked=True)
    (stage.parent / "config.yaml").touch()
    return stage


@pytest.mark.parametrize(
    "harm",
    [Path.unlink, lambda file: file.write_bytes(file.read_bytes()[1:] + b"x"), lambda file: file.write_bytes(b"")],
)
@pytest.mark.parametrize("name", ["model/text/model.safetensors", "adapters/a.safetensors"])
def test_what_a_stage_has_saved_is_held_against_its_manifest(
    name: str, harm: Callable[[Path], None], stage: Path, tmp_path: Path
) -> None:
    folder = stage / name.partition("/")[0]
    check_saved("ckpt", folder)
    harm(stage / name)
    with pytest.raises(UserError, match=rf"ckpt: .*{name}.*; put it back, .*restart=true.* give a copy of"):
        check_saved("ckpt", folder)
    shutil.copytree(folder, tmp_path / "copy" / folder.name)
    check_saved("ckpt", tmp_path / "copy" / folder.name)
    check_saved("ckpt", stage / {"model": "adapters", "adapters": "model"}[folder.name])


def test_what_a_run_before_checksums_has_saved_is_taken_as_it_is(stage: Path) -> None:
    write_json(stage.parent / "manifest.json", {"stages": {"instruct": {"state": "done"}}})
    (stage / "model/config.json").write_bytes(b"")
    check_saved("ckpt", stage / "model")


@pytest.mark.parametrize("text", ["[]", '{"stages": 1}', '{"stages": {"instruct": {"files": {"model/a": 1}}}}', "{"])
def test_a_manifest_of_something_else_says_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "instruct/model").mkdir(parents=True)
    (tmp_path / "manifest.json").write_text(text)
    check_saved("ckpt", tmp_path / "instruct/model")


@pytest.mark.parametrize("name", ["../elsewhere", "/elsewhere", "..", "a/b"])
def test_a_manifest_names_no_stage_outside_its_run(name: str, tmp_path: Path) -> None:
    outside = tmp_path / "elsewhere/model"
    outside.mkdir(parents=True)
    (outside / "config.json").write_text("{}")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/manifest.json").write_text(json.dumps({"stages": {name: {"state": "done"}}}))
    with pytest.raises(UserError, match=r"manifest\.json: its stages name"):
        model_folder(tmp_path / "run")


@pytest.mark.parametrize("content", ['{"stages": []}', '{"stages": {"a": 1}}', '{"base_weights": 3}', "[]", "", "{"])
def test_a_misshapen_manifest_is_told(content: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=rf"{tmp_path}/manifest\.json: .*; put an earlier copy back"):
        read_manifest(tmp_path)


def test_a_result_that_no_table_can_be_made_of_is_told(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"stages": 3}')
    with pytest.raises(UserError, match=r"result\.json: it is no result .*delete it: the same command writes it again"):
        read_result(tmp_path / "result.json", lambda found: found["stages"].keys())
    assert read_result(tmp_path / "absent.json", dict) is None
