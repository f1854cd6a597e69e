"""What a command asks for by name: what is typed, what an experiment sets in turn, and nothing of the defaults."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import mmprune_train
from mmprune_train.config.command import Command
from mmprune_train.config.compose import compose_config
from mmprune_train.errors import UserError

ROOT = Path(mmprune_train.__file__).parent


@pytest.mark.parametrize(
    ("typed", "keys"),
    [
        ([], set()),
        (["++pruner.vision.score=random", "~logger", "ckpt=x"], {"pruner.vision.score", "logger", "ckpt"}),
        (["pruner=fastv", "logger=[csv,wandb]", "data.root=../data/files"], {"pruner", "logger", "data.root"}),
        (["generate.question=why, it's (red)?"], {"generate.question"}),
        (["strategy=deepspeed_llava"], {"strategy", "strategy.name", "stage.pretrain.strategy"}),
    ],
)
def test_a_typed_key_is_asked_for_and_an_option_for_all_of_its_group(typed: list[str], keys: set[str]) -> None:
    assert Command.of(typed).keys == keys


def test_an_experiment_asks_for_what_its_own_file_says() -> None:
    demo = Command.of(["+experiment=demo"])
    assert {"encoder", "llm", "data", "stage", "peft", "experiment_name", "evaluate.limit"} <= demo.keys
    assert "data.instruct.annotations" in demo.keys and "optim.betas" in demo.keys
    assert not demo.names("pruner", "knee", "strategy", "logger"), "the base config's"
    both = Command.of(["+experiment=[smoke,llava7b_dense]"])
    assert both.names("pruner") and {"encoder", "evaluate.batch_size"} <= both.keys
    assert "stage.pretrain.strategy" in both.keys, "of deepspeed_llava, which the second one chooses"
    alone = Command.of(["+experiment=llava7b_dense", "strategy=single"])
    assert alone.names("strategy") and "stage.pretrain.strategy" not in alone.keys, "that one is not chosen"


def test_files_of_the_users_own_are_read_with_those_that_they_include(tmp_path: Path) -> None:
    for name, body in {
        "experiment/top": "defaults: [base, override /pruner: fastv, _self_]\nevaluate: {limit: 3}\n",
        "experiment/base": "defaults: [override /knee: otsu]\nstages: [pretrain]\nhydra: {mode: MULTIRUN}\n",
    }.items():
        (tmp_path / f"{name}.yaml").parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.yaml").write_text(f"# @package _global_\n{body}")
    found = Command.of(["+experiment=top", "seed=1"], sources=[f"file://{tmp_path}"])
    assert found.keys == {"experiment", "pruner", "knee", "evaluate.limit", "stages", "hydra.mode", "seed"}


@pytest.mark.parametrize("overrides", [["pruner=fastv"], ["+experiment=throughput", "knee.scale=1"]])
def test_composing_leaves_no_trace(overrides: list[str]) -> None:
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    before = compose_config([])
    assert compose_config(overrides) != before
    with pytest.raises(UserError):
        compose_config(["pruner=fastvv"])
    assert compose_config([]) == before and Command.of([]) == Command()
    assert not GlobalHydra.instance().is_initialized() and HydraConfig.instance().cfg is None


GLOBALS = {"HydraConfig", "GlobalHydra", "hydra_config", "global_hydra", "initialize_config_dir"}
ARGV = {"__main__.py", "current_folder.py", "training/loggers.py"}
"""What reads how the process was started: the border itself, and what a library is not to be told of it."""


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_but_the_entry_reads_what_was_typed_out_of_globals(file: Path) -> None:
    name = file.relative_to(ROOT).as_posix()
    tree = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    words = {node.attr for node in tree if isinstance(node, ast.Attribute)}
    words |= {alias.name for node in tree if isinstance(node, ast.ImportFrom | ast.Import) for alias in node.names}
    parts = {part for word in words for part in word.split(".")}
    assert name == "__main__.py" or not parts & GLOBALS
    assert name in ARGV or not parts & {"argv", "orig_argv"}
