"""Sweeps from the command line: records, the table, failures, objectives, and what a second start does."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from training.synthetic import overrides as smoke_on
from training.synthetic import write_dataset

from mmprune_train.config.checks import check
from mmprune_train.config.command import Command
from mmprune_train.config.compose import compose_config, load_pruner
from mmprune_train.config.schema import Config
from mmprune_train.errors import NotFinite, UserError
from mmprune_train.reporting.sweeps import SWEEP
from mmprune_train.storage.checksums import checksum_of
from mmprune_train.storage.conf import conf_dir, options
from mmprune_train.storage.files import write_json
from mmprune_train.storage.locks import alone_in
from mmprune_train.sweeps.watch import STUDY, check_study

Sweep = Callable[..., tuple[int, str, str]]


def scored(config: Config, command: Command) -> dict:
    """A task in place of training: later pruning is better and dearer; layer 3 fails, 2 is a mistake."""
    layer = config.pruner.language.layer
    if layer == 3:
        raise RuntimeError("out of memory\non device 0")
    if layer == 2:
        raise UserError("pruner.language.layer=2: not here")
    if config.seed == 13:
        raise NotFinite("stage pretrain, step 3: the loss is not finite.\nkept.\nLower it")
    if layer == 9:
        raise KeyboardInterrupt
    print("worked on", layer, config.knee.method)
    better = {"kneedle": 0.0, "otsu": 0.2}.get(config.knee.method, 0.1)
    return {"evaluate": {"accuracy": {"open": 0.1 * layer + better, "yes_no": 0.1}, "keep_ratio": 0.1 * layer + 0.05}}


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch, mmprune: Sweep) -> Sweep:
    """`sweep("knee=a,b", ...)`: exit code, stdout and stderr of `-m +experiment=smoke ...` with the task above."""
    fake = ModuleType("fake_task")
    fake.run = scored
    monkeypatch.setitem(sys.modules, "mmprune_train.tasks.train", fake)
    return partial(mmprune, "-m", "+experiment=smoke")


def directory() -> Path:
    (found,) = Path("runs/sweeps").iterdir()
    return found


def jobs() -> list[dict]:
    return json.loads((directory() / "sweep.json").read_text())["jobs"]


def test_every_job_is_announced_and_the_sweep_ends_with_a_table_and_two_files(sweep: Sweep) -> None:
    code, out, _ = sweep("knee=kneedle,otsu", "pruner.language.layer=0,1")
    assert code == 0
    heads = [line for line in out.splitlines() if line.startswith("== job ")]
    assert len(heads) == 4 and heads[1].startswith("== job 1: knee=kneedle pruner.language.layer=1 -> runs/smoke/")
    assert "Sweep of 4 jobs: 4 done" in out and "Pareto front (accuracy maximize, keep_ratio minimize)" in out
    assert [job["front"] for job in jobs()] == [False, False, True, True]
    rows = list(csv.DictReader((directory() / "sweep.csv").open()))
    assert rows[3] | {"seconds": "", "run": ""} == {
        "job": "3", "knee": "otsu", "pruner.language.layer": "1", "accuracy": "0.2",
        "keep_ratio": "0.15000000000000002", "front": "1", "state": "done", "seconds": "", "run": "", "error": "",
    }  # fmt: skip


def test_a_failed_job_leaves_the_others_running_and_is_told_at_the_end(sweep: Sweep) -> None:
    code, out, err = sweep("pruner.language.layer=3,2,1")
    assert code == 1 and "worked on 1" in out
    assert "Sweep of 3 jobs: 1 done, 2 failed" in out
    assert "failed: job 0 (pruner.language.layer=3): RuntimeError: out of memory on device 0" in out
    assert "failed: job 1 (pruner.language.layer=2): pruner.language.layer=2: not here" in out
    assert err.count("Traceback") == 1, "the mistake has none"


@pytest.mark.parametrize(("layers", "code"), [("2,1", 1), ("2,-1", 2), ("3", 1), ("0,1", 0)])
def test_the_exit_code_is_2_where_nothing_ran_for_wrong_input(sweep: Sweep, layers: str, code: int) -> None:
    assert sweep(f"pruner.language.layer={layers}")[0] == code


def test_the_same_command_takes_up_its_sweep_and_replaces_the_records(sweep: Sweep) -> None:
    sweep("pruner.language.layer=0,1")
    first = directory()
    code, out, _ = sweep("pruner.language.layer=0,1", "restart=true")
    assert code == 0 and directory() == first and "2 jobs are recorded there already" in out
    assert [job["job"] for job in jobs()] == [0, 1] and jobs()[0]["overrides"][-1].lower() == "restart=true"


def test_an_interrupted_sweep_says_how_far_it_came(sweep: Sweep) -> None:
    code, out, err = sweep("pruner.language.layer=1,9", "llm=smollm2_135m")
    assert code == 1 and "the same command (without restart=true) continues it" in err
    assert "Sweep of 2 jobs: 1 done, 1 interrupted" in out


def test_jobs_that_do_not_differ_in_what_is_trained_are_told(sweep: Sweep) -> None:
    code, out, _ = sweep("pruner.language.layer=1", "trainer.num_workers=0,1")
    assert code == 0
    assert "note: job 1 has the run directory of job 0 (trainer.num_workers=0): what differs does not change" in out


def test_the_objectives_may_be_others_and_one_that_no_job_has_is_told(sweep: Sweep) -> None:
    code, out, _ = sweep("pruner.language.layer=0,1", "sweep.objectives=[accuracy.open,loss]")
    assert code == 0 and "note: sweep.objectives: no job found loss" in out
    assert [job["objectives"] for job in jobs()] == [{"accuracy.open": 0.0}, {"accuracy.open": 0.1}]


def test_several_processes_may_not_start_one_sweep(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RUN_ID", "x"), ("RESTART_COUNT", "0")):
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    code, out, err = sweep("pruner.language.layer=1,2", "trainer.devices=2", "strategy=ddp")
    assert code == 2 and "-m under torchrun, which started 2 processes: start the sweep once" in err
    assert "== job" not in out


def test_another_rank_of_a_job_leaves_no_record(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("LOCAL_GLOBALID", "1"), ("LOCAL_NTASKS", "2"), ("EXECUTOR", "local")):
        monkeypatch.setenv(f"SUBMITIT_{name}", value)
    _, out, _ = sweep("pruner.language.layer=1", "trainer.devices=2", "strategy=ddp")
    assert "worked on 1" in out and "== job" not in out
    assert not (directory() / "jobs").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sweep.objectives=[accuracy]", "knee=kneedle,otsu"], "sweep.directions has 2 entries for 1 objectives"),
        (["sweep.directions=[maximize,maximise]", "seed=1,2"], "did you mean maximize"),
        (["hydra/sweeper=optuna"], "nothing to search"),
        (["hydra/sweeper=optuna", "seed=1,2", "evaluate.after_train=false"], "accuracy needs an evaluation"),
    ],
)
def test_what_would_fail_every_job_is_refused_before_the_first(sweep: Sweep, arguments: list[str], words: str) -> None:
    if "hydra/sweeper=optuna" in arguments:
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    code, out, err = sweep(*arguments)
    assert code == 2 and words in err and "== job" not in out
    assert not Path("runs").exists()


@pytest.mark.slow
def test_optuna_gets_the_objectives_marks_failed_trials_and_goes_on_with_its_study(sweep: Sweep) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    import optuna

    search = ["hydra/sweeper=optuna", "hydra.sweeper.sampler.seed=3", "knee=kneedle,otsu"]
    search += ["pruner.language.layer=choice(0,1,3)"]
    code, out, _ = sweep(*search, "hydra.sweeper.n_trials=8")
    assert code == 1 and "failed: job" in out and "Pareto front" in out
    storage = f"sqlite:///{directory()}/optuna.db"
    study = optuna.load_study(study_name="sweep", storage=storage)
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    states = {trial.state.name for trial in study.trials}
    assert len(study.trials) == 8 and states == {"COMPLETE", "FAIL"}
    done = {job["job"]: job for job in jobs() if job["state"] == "done"}
    for number, job in done.items():
        assert list(job["objectives"].values()) == study.trials[number].values
    fronts = {tuple(trial.values) for trial in study.best_trials}
    assert {tuple(job["objectives"].values()) for job in done.values() if job["front"]} == fronts
    sweep(*search, "hydra.sweeper.n_trials=2")
    study = optuna.load_study(study_name="sweep", storage=storage)
    assert len(study.trials) == 10 and max(job["job"] for job in jobs()) <= 9


def test_a_run_directory_is_used_by_one_process_at_a_time(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "smoke" / "a"
    code = "import sys, pathlib, time; from mmprune_train.storage.locks import alone_in\n"
    code += "with alone_in(pathlib.Path(sys.argv[1])): print('in', flush=True); time.sleep(1.5)"
    other = subprocess.Popen([sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "in\n"
    with alone_in(tmp_path / "smoke" / "b"):
        assert "waits" not in capfd.readouterr().out
    with pytest.raises(UserError, match="another process trains this run; wait"), alone_in(run):
        pass
    with alone_in(run, wait=True), alone_in(run):
        assert "waits for another job with the same run directory" in capfd.readouterr().out
        assert other.wait(10) == 0


@pytest.mark.parametrize("experiment", ["smoke", "demo"])
@pytest.mark.parametrize("name", options("sweep"))
def test_every_value_of_a_ready_sweep_fits_the_base(name: str, experiment: str) -> None:
    config = compose_config([f"+experiment={experiment}", f"+sweep={name}"])
    params = yaml.safe_load((conf_dir() / "sweep" / f"{name}.yaml").read_text())["hydra"]["sweeper"]["params"]
    pruners = [load_pruner(value) for value in params.pop("pruner", "twostage").split(",")]
    for layer in params.pop("pruner.language.layer", "2").split(","):
        for pruner in pruners:
            there = replace(pruner.language, layer=float(layer) if "." in layer else int(layer))
            check(replace(config, pruner=replace(pruner, language=there) if len(pruners) == 1 else pruner))
    assert set(params.pop("knee", "kneedle").split(",")) <= set(options("knee"))
    assert not params and config.experiment_name == experiment and config.evaluate.after_train


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "squares")


def real(squares: Path, folder: Path, *arguments: str, before: str = "pass") -> subprocess.CompletedProcess[str]:
    base = smoke_on(squares, folder / "runs")[:-1]  # without the run_id
    short = [
        "evaluate.limit=2",
        "evaluate.max_new_tokens=2",
        "stage.pretrain.max_steps=1",
        "stage.instruct.max_steps=1",
    ]
    code = f"import sys; {before}; from mmprune_train.__main__ import main; main()"
    command = [sys.executable, "-c", code, "-m", *base, *short, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=400)


@pytest.mark.slow
def test_a_ready_sweep_trains_is_not_trained_again_and_has_its_report(squares: Path, tmp_path: Path) -> None:
    grid = ["+sweep=layer_x_knee", "knee=kneedle,otsu", "pruner.language.layer=0.25,0.5"]
    done = real(squares, tmp_path, *grid)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Sweep of 4 jobs: 4 done" in done.stdout
    again = real(squares, tmp_path, *grid, before="sys.modules['torch'] = None")  # a finished run needs no torch
    assert again.returncode == 0, again.stderr
    assert "Sweep of 4 jobs: 4 done" in again.stdout and "Stage pretrain" not in again.stdout
    (folder,) = (tmp_path / "runs" / "sweeps").iterdir()
    assert folder.name.startswith("layer_x_knee-")
    command = [sys.executable, "-m", "mmprune_train", "task=report", f"report.runs=[{folder}]"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert shown.returncode == 0, shown.stderr
    page = (folder / "report" / "report.html").read_text()
    assert page.count('<details id="run-') == 4 and 'class="heat"' in page


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_jobs_in_other_processes_are_recorded_alike(launcher: str, squares: Path, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    parallel = ["hydra.launcher.n_jobs=2"] if launcher == "joblib" else ["hydra.launcher.timeout_min=5"]
    done = real(squares, tmp_path, f"hydra/launcher={launcher}", *parallel, "pruner.language.layer=1,77")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Sweep of 2 jobs: 1 done, 1 failed" in done.stdout
    assert "failed: job 1 (pruner.language.layer=77): pruner.language.layer=77: this LLM has 4 layers" in done.stdout


@pytest.mark.slow
def test_optuna_searches_in_parallel(squares: Path, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=3", "knee=kneedle,otsu"]
    done = real(squares, tmp_path, *search, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Pareto front" in done.stdout
    (folder,) = (tmp_path / "runs" / "sweeps").iterdir()
    assert "solutions" in (folder / "optimization_results.yaml").read_text()


@pytest.mark.parametrize("seeds", ["13", "1,13"])
def test_a_job_that_diverges_has_failed_and_shows_no_traceback(sweep: Sweep, seeds: str) -> None:
    code, _, err = sweep(f"seed={seeds}", "pruner.language.layer=1")
    jobs = json.loads((directory() / "sweep.json").read_text())["jobs"]
    assert code == 1 and "Traceback" not in err and "the loss is not finite" in err
    assert (jobs[-1]["state"], jobs[-1]["mistake"]) == ("failed", False)
    assert jobs[-1]["error"] == "stage pretrain, step 3: the loss is not finite. kept. Lower it"


@pytest.mark.parametrize("debug", [False, True])
def test_divergence_ends_a_run_with_exit_code_1_and_its_three_lines(sweep: Sweep, mmprune: Sweep, debug: bool) -> None:
    code, _, err = mmprune("+experiment=smoke", "seed=13", "pruner.language.layer=1", f"debug={str(debug).lower()}")
    assert code == 1 and ("Traceback" in err) == debug
    assert err.endswith("error: stage pretrain, step 3: the loss is not finite.\nkept.\nLower it\n")


@pytest.mark.parametrize("harm", [Path.unlink, lambda file: file.write_bytes(b"b" + file.read_bytes()[1:])])
def test_a_study_that_is_not_as_its_sweep_left_it_is_told(harm: Callable[[Path], None], tmp_path: Path) -> None:
    study, record = tmp_path / STUDY, tmp_path / SWEEP
    study.write_bytes(b"a study")
    check_study(tmp_path)
    for known in ({STUDY: 3}, {STUDY: {"bytes": 1}}, {}):
        write_json(record, known)
        check_study(tmp_path)
    write_json(record, {STUDY: asdict(checksum_of(study))}, checked=True)
    check_study(tmp_path)
    harm(study)
    with pytest.raises(UserError, match=rf"{tmp_path}: {STUDY} .*; put an earlier copy back, or move the folder aside"):
        check_study(tmp_path)
