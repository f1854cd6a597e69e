"""`task=doctor` tells what is broken here, and breaks at none of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmprune_train.config.compose import compose_config
from mmprune_train.doctor import backends, machine, self_test
from mmprune_train.tasks import doctor

Command = Callable[..., tuple[int, str, str]]
QUICK = {title: rows_of for title, rows_of in doctor.SECTIONS.items() if title != doctor.TEST}
SECRETS = {
    "WANDB_API_KEY": "wandb0secret", "HF_TOKEN": "hf_0secret", "MLFLOW_TRACKING_PASSWORD": "mlflow0secret",
    "WANDB_BASE_URL": "https://user:base0secret@wandb.example.org", "NCCL_UNKNOWN": "nccl0secret",
}  # fmt: skip


def told(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "runs/default/d/doctor/result.json").read_text(encoding="utf-8"))


def test_every_section_is_told_and_no_secret_is(
    mmprune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    code, out, _ = mmprune("task=doctor", "run_id=d", "trainer.accelerator=cpu")
    assert code == 0, out
    sections = told(tmp_path)["sections"]
    assert list(sections) == list(doctor.SECTIONS) and all(sections.values())
    assert all(title in out and name in out for title, rows in sections.items() for name in rows)
    assert sections["self-test"]["cpu, fp32"]["says"].startswith("losses ")
    assert sections["attention"]["flash_2"]["says"] == "cannot run: needs a CUDA device"
    assert sections["loggers and accounts"]["wandb account"]["says"].startswith("logged in: yes")
    assert sections["loggers and accounts"]["Hugging Face account"]["says"] == "logged in: yes"
    assert not [value for value in ("0secret", "user:") if value in out + json.dumps(told(tmp_path))]


def _raise(error: BaseException) -> Callable[..., Any]:
    def broken(*_: Any, **__: Any) -> Any:
        raise error

    return broken


@pytest.mark.parametrize(
    ("module", "name", "error", "section", "row"),
    [
        ("shutil", "disk_usage", OSError("gone\nand more"), "disk", "shared memory"),
        ("mmprune_train.model.loss", "loss_kernel", SystemExit(3), "loss and adapters", "logits on cpu"),
        ("mmprune_train.doctor.machine", "requirements", ValueError("no metadata"), "versions", "versions"),
        ("mmprune_train.training.precision", "choose_precision", RuntimeError("driver"), "attention", "attention"),
    ],
)
def test_what_is_broken_is_a_row_and_the_others_go_on(
    module: str,
    name: str,
    error: BaseException,
    section: str,
    row: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(doctor, "SECTIONS", QUICK)
    monkeypatch.setattr(f"{module}.{name}", _raise(error))
    result = doctor.run(compose_config(["task=doctor", f"runs_dir={tmp_path}/runs", "run_id=d"]))
    failed = result["sections"][section][row]
    assert failed == {"says": f"failed: {type(error).__name__}: {str(error).splitlines()[0]}", "note": True}
    assert list(result["sections"]) == list(QUICK) and result["sections"]["limits and environment"]
    assert f"!  {row}" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_a_library_that_cannot_be_imported_breaks_no_other_section(package: str, tmp_path: Path) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from mmprune_train.__main__ import main; main()"
    command = [sys.executable, "-c", code, "task=doctor", "run_id=d"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "a training step does not work here" in done.stderr and package in done.stdout
    assert list(told(tmp_path)["sections"]) == list(doctor.SECTIONS)


@pytest.mark.parametrize(("error", "says"), [(RuntimeError("CUDA error: sticky"), "sticky"), (SystemExit(0), "failed")])
def test_a_self_test_that_fails_is_exit_code_1(
    error: BaseException, says: str, mmprune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "SECTIONS", {doctor.TEST: backends.self_test})
    monkeypatch.setattr(self_test, "losses_of_steps", _raise(error))
    code, out, err = mmprune("task=doctor", "run_id=d")
    assert code == 1 and says in out and "Traceback" not in err
    assert "error: a training step does not work here: cpu, fp32" in err and "cpu, fp32" in told(tmp_path)["failed"]


def test_a_device_that_computes_something_else_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SECTIONS", {doctor.TEST: backends.self_test})
    monkeypatch.setattr("mmprune_train.training.precision.hardware_bf16", lambda _: (True, "it says so"))
    answers = {"fp32": [6.3, 6.2], "bf16": [7.3, 6.9]}
    monkeypatch.setattr(self_test, "losses_of_steps", lambda device, precision: (answers[precision.name], ""))
    with pytest.raises(SystemExit):
        doctor.run(compose_config(["task=doctor", f"runs_dir={tmp_path}/runs", "run_id=d", "trainer.accelerator=cpu"]))
    row = told(tmp_path)["sections"][doctor.TEST]["cpu, bf16"]["says"]
    assert "first loss is 7.3, on the processor in fp32 it is 6.3" in row


def test_where_nothing_can_be_written_the_page_is_printed_all_the_same(
    mmprune: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "SECTIONS", {"limits": machine.limits})
    (tmp_path / "file").touch()
    code, out, _ = mmprune("task=doctor", "runs_dir=file")
    assert code == 0 and "open files" in out and "result.json failed: " in out


@pytest.mark.parametrize(
    ("package", "version"), [("deepspeed", "0.19.2"), ("pytorch-lightning", "2.6.5"), ("hydra-core", "1.3.5")]
)
def test_versions_that_this_project_refuses_are_notes(
    package: str, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = next(one for one, _ in machine.requirements() if one.name == package)
    monkeypatch.setattr("importlib.metadata.version", lambda _: version)
    says = machine.version_of(wanted, optional=False)
    assert isinstance(says, machine.Note) and says.startswith(f"{version}, ") and "pip install" in says
    monkeypatch.setattr("importlib.metadata.version", lambda _: "1.3.6" if package == "hydra-core" else "2.6.6")
    assert package == "deepspeed" or not isinstance(machine.version_of(wanted, optional=False), machine.Note)


def test_installed_packages_say_themselves_what_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch>=2.8", "deepspeed!=0.19.2; sys_platform == 'none'", "ruff; extra == 'dev'", "bits; extra == 'gpu'"]
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "a" / "b" / "machine.py"))
    monkeypatch.setattr("importlib.metadata.requires", lambda _: lines)
    assert [(one.name, optional) for one, optional in machine.requirements()] == [("torch", False), ("bits", True)]
