"""The command line from outside: exit codes, one-line answers, no torch before a task, no litter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def mmprune(*arguments: str, cwd: Path, before: str = "pass") -> subprocess.CompletedProcess[str]:
    code = f"import sys; {before}; from mmprune_train.__main__ import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default"}
    environment.pop("HYDRA_FULL_ERROR", None)
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


NO_TORCH = "sys.modules['torch'] = None"  # an import of torch raises ModuleNotFoundError
FAKE_TASK = "import types; sys.modules['mmprune_train.tasks.train'] = m = types.ModuleType('fake'); "


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], "Config groups"),
        (["+experiment=demo", "--cfg", "job"], "smollm2_135m"),
        (["--cfg", "job", "--resolve", "--package", "pruner"], "method: kneedle"),
        (["--shell-completion", "install=bash"], "complete"),
        (["--info", "defaults"], "mmprune_schema"),
    ],
)
def test_questions_are_answered_without_torch(arguments, words, tmp_path):
    answer = mmprune(*arguments, cwd=tmp_path, before=NO_TORCH)
    assert answer.returncode == 0, answer.stderr
    assert words in answer.stdout
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_task_and_every_group_option(tmp_path):
    text = mmprune("--help", cwd=tmp_path).stdout
    for word in ("train", "calibrate", "evaluate", "generate", "twostage*", "llava13b_twostage", "kneedle*", "csv*"):
        assert word in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pruner=twostge"], "did you mean twostage?"),
        (["task=trian"], "did you mean train?"),
        (["seed=x"], "seed=x"),
        (["+experiment=smoke", "pruner.vision.score=mine:edges", "pruner.vision.score_args.radus=1"], "mean radius?"),
        (["encoder=siglip_so400m_384"], "add pruner.vision.score=map_attention (or pooled_cosine, "),
    ],
)
def test_wrong_input_exits_with_2_and_one_line(arguments, words, tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("import torch\ndef edges(view, *, radius=1): ...\n")
    answer = mmprune(*arguments, cwd=tmp_path, before=NO_TORCH)
    assert answer.returncode == 2
    assert words in answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == [mine]


def test_presets_of_a_config_dir_are_options_like_the_others(tmp_path):
    (tmp_path / "conf" / "pruner").mkdir(parents=True)
    (tmp_path / "conf" / "pruner" / "calibrated.yaml").write_text("name: mine\nvision:\n  knee:\n    mass: 0.25\n")
    command = ["--config-dir", "conf", "+experiment=llava7b_dense"]  # which chooses a pruner of its own
    answer = mmprune(*command, "pruner=calibrated", "--cfg", "job", "--resolve", cwd=tmp_path, before=NO_TORCH)
    assert answer.returncode == 0 and "mass: 0.25" in answer.stdout, answer.stderr
    answer = mmprune(*command, "pruner=calibratde", cwd=tmp_path, before=NO_TORCH)
    assert answer.returncode == 2 and "did you mean calibrated? (one of calibrated, " in answer.stderr
    answer = mmprune("--config-dir", "absent", "pruner=calibrated", cwd=tmp_path, before=NO_TORCH)
    assert answer.returncode == 2 and "absent" in answer.stderr and len(answer.stderr.splitlines()) == 1


def test_debug_adds_the_traceback(tmp_path):
    answer = mmprune("pruner=twostge", "debug=true", cwd=tmp_path)
    assert answer.returncode == 2
    assert "Traceback" in answer.stderr


RAISES = (
    "exec('def run(*_): from mmprune_train.errors import UserError as E; raise E(\\'no such file\\')'); m.run = run"
)


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ("m.run = lambda config, command: print('ran', config.seed)", 0, "ran 7"),
        (RAISES, 2, "error: no such file"),
        ("m.run = lambda config, command: 1 / 0", 1, "ZeroDivisionError"),
    ],
)
def test_how_a_task_ends_decides_the_exit_code(body, code, words, tmp_path):
    answer = mmprune("seed=7", cwd=tmp_path, before=FAKE_TASK + body)
    assert answer.returncode == code
    assert words in answer.stdout + answer.stderr
    assert ("Traceback" in answer.stderr) == (code == 1)
    assert "Error executing job" not in answer.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_runs_every_job_and_keeps_its_record_under_runs(tmp_path):
    body = "m.run = lambda config, command: print('ran', config.seed)"
    answer = mmprune("-m", "seed=1,2", cwd=tmp_path, before=FAKE_TASK + body)
    assert answer.returncode == 0, answer.stderr
    assert "ran 1" in answer.stdout
    assert "ran 2" in answer.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_completion_offers_the_options_of_a_group(tmp_path):
    line = {"COMP_LINE": "mmprune pruner=", "PYTHONPATH": str(ROOT)}
    answer = subprocess.run(
        [sys.executable, "-m", "mmprune_train", "--shell-completion", "query=bash"],
        cwd=tmp_path,
        env={**os.environ, **line},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "pruner=twostage" in answer.stdout, answer.stderr
