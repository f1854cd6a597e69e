"""A run belongs to the annotation files and to the code that it was trained with."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from training.synthetic import overrides, write_dataset

from mmprune_train.config.compose import compose_config
from mmprune_train.config.schema import Config
from mmprune_train.errors import UserError
from mmprune_train.training import sources
from mmprune_train.training.inputs import stage_annotations, stage_extent
from mmprune_train.training.rundir import RunDirectory
from mmprune_train.training.sources import (
    changed_components,
    check_sources,
    component_hashes,
    file_entry,
    told,
    with_advice,
)

SAMPLES = 6


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return compose_config(overrides(write_dataset(tmp_path / "data", images=4), tmp_path))


@pytest.fixture
def run(config: Config, tmp_path: Path) -> RunDirectory:
    """Its first stage is finished, its second has a checkpoint."""
    run = RunDirectory(tmp_path / "run", writable=True)
    for name, state in (("pretrain", "done"), ("instruct", "running")):
        file = Path(config.data.root or "") / f"{name}.json"
        entry = {**file_entry(file), "samples": len(json.loads(file.read_text()))}
        run.update_stage(name, state=state, data=entry, components=component_hashes(config.pruner))
    (run.stage("instruct") / "checkpoints" / "step-00000002.ckpt").mkdir(parents=True)
    return run


def shorten(file: Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_text())[:-1]))


@pytest.mark.parametrize(
    ("name", "did", "counts"),
    [
        ("pretrain", "was trained on it", "4 samples then, 3 now"),
        ("instruct", "was begun on it", "6 samples then, 5 now"),
    ],
)
def test_a_changed_annotation_file_is_refused_on_every_rank(
    config: Config, run: RunDirectory, name: str, did: str, counts: str
) -> None:
    check_sources(config, run)
    file = Path(config.data.root or "") / f"{name}.json"
    before = file.read_bytes()
    shorten(file)
    for rank in (run, RunDirectory(run.path, writable=False)):
        with pytest.raises(
            UserError, match=rf"data\.{name}\.ann.*{name}\.json.*{did} \({counts}\).*restart=true.*run_id="
        ):
            check_sources(config, rank)
    other = [stage for stage in config.stages if stage != name]
    check_sources(replace(config, stages=other), run)  # of a stage that is not asked for
    file.write_bytes(before)
    check_sources(config, run)


def test_as_many_samples_with_other_words_are_another_file(config: Config, run: RunDirectory) -> None:
    file = Path(config.data.root or "") / "instruct.json"
    file.write_text(file.read_text().replace("four", "five"))
    with pytest.raises(UserError, match=r"\(6 samples then and now, other contents\)"):
        check_sources(config, run)


def test_a_stage_without_a_checkpoint_loses_nothing(config: Config, run: RunDirectory) -> None:
    shorten(Path(config.data.root or "") / "instruct.json")
    (run.stage("instruct") / "checkpoints" / "step-00000002.ckpt").rmdir()
    check_sources(config, run)


def test_images_may_change_files_may_be_elsewhere_and_old_runs_have_no_entry(config: Config, run: RunDirectory) -> None:
    (Path(config.data.root or "") / "images" / "0.png").write_bytes(b"")
    check_sources(config, run)
    check_sources(replace(config, data=replace(config.data, root="/nowhere")), run)
    run.update(stages={name: {"state": "done"} for name in config.stages})
    shorten(Path(config.data.root or "") / "instruct.json")
    check_sources(config, run)


def test_the_very_same_file_is_not_read_again(
    config: Config, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    hash_of = sources.sha256_of
    monkeypatch.setattr(sources, "sha256_of", lambda file: read.append(file) or hash_of(file))
    check_sources(config, run)
    assert not read
    file = Path(config.data.root or "") / "instruct.json"
    os.utime(file)
    check_sources(config, run)
    assert read == [file]


def test_changed_code_of_the_users_own_is_refused(
    config: Config, run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "my_scores.py"
    module.write_text("def norm(view): ...")
    vision = replace(config.pruner.vision, score="my_scores:norm", merge="not_there:at_all")
    config = replace(config, pruner=replace(config.pruner, vision=vision))
    hashes = component_hashes(config.pruner)
    assert list(hashes) == ["my_scores:norm"]
    check_sources(config, run)  # recorded without it
    run.update_stage("instruct", components=hashes)
    check_sources(config, run)
    module.write_text("def norm(view): return 1")
    with pytest.raises(
        UserError, match=r"my_scores:norm: .*my_scores\.py has changed since stage instruct .* begun with"
    ):
        check_sources(config, run)


def test_a_package_is_all_its_modules(
    config: Config, run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").write_text("from my_package.scores import norm")
    (package / "scores.py").write_text("def norm(view): ...")
    vision = replace(config.pruner.vision, score="my_package:norm")
    config = replace(config, pruner=replace(config.pruner, vision=vision))
    run.update_stage("instruct", components=component_hashes(config.pruner))
    check_sources(config, run)
    (package / "scores.py").write_text("def norm(view): return 1")
    assert [name for name, _ in changed_components(config.pruner, run.stage_state("instruct"))] == ["my_package:norm"]
    with pytest.raises(UserError, match=r"my_package:norm: .*my_package has changed"):
        check_sources(config, run)


def test_what_a_result_tells_of_a_file_is_true_everywhere(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]")
    entry = told(file_entry(tmp_path / "a.json"))
    assert set(entry) == {"file", "sha256", "bytes"} and entry["file"] == "a.json" and entry["bytes"] == 2


def test_an_error_in_training_says_what_may_be_changed(run: RunDirectory) -> None:
    error = UserError("chat.json[3] (id s3): image 3.png cannot be read")
    assert with_advice(error, run, "pretrain", Path("a.json")) is error, "nothing to lose without a checkpoint"
    advice = str(with_advice(error, run, "instruct", Path("d/chat.json")))
    assert advice.startswith(f"{error}\n") and advice.count("\n") == 1
    assert "after step 2, also with other image files; with a changed chat.json it does not" in advice


@pytest.mark.parametrize(
    ("more", "steps", "words"),
    [
        ((), 3, ["6 of 6 samples, 3 steps of 2: 1.0 passes over the data"]),
        (("stage.instruct.epochs=2",), 6, ["6 steps of 2: 2.0 passes"]),
        (
            ("data.instruct.limit=5",),
            3,
            ["5 of 6 samples, 3 steps of 2: 1.2 passes", "data.instruct.limit=5 (set it to"],
        ),
        (
            ("stage.instruct.max_steps=1",),
            1,
            ["0.33 passes", "stage.instruct.max_steps=1 (set it to null for stage.ins"],
        ),
        (("stage.instruct.max_steps=3", "data.instruct.limit=6"), 3, ["1.0 passes"]),
    ],
)
def test_a_stage_says_how_much_of_its_file_it_sees(
    config: Config, more: tuple[str, ...], steps: int, words: list[str]
) -> None:
    fixed = ["stage.instruct.batch_size=2", "stage.instruct.global_batch_size=2"]
    chosen = compose_config([*overrides(Path(config.data.root or ""), Path(config.runs_dir)), *fixed, *more])
    extent = stage_extent(chosen, "instruct", stage_annotations(chosen, "instruct"))
    assert extent.steps == steps and len(extent.text.splitlines()) == len(words)
    for line, word in zip(extent.text.splitlines(), words, strict=True):
        assert word in line
