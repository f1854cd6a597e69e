"""The page over runs and sweeps: what it shows, what it says is missing, and that it needs nothing beside it."""

from __future__ import annotations

import html
import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from reporting.pretended import write_run, write_sweep

from mmprune_train.config.compose import compose_config
from mmprune_train.errors import UserError
from mmprune_train.reporting import charts
from mmprune_train.reporting import page as report_page
from mmprune_train.reporting.runs import read_run, read_runs, telling_keys
from mmprune_train.storage.files import write_json
from mmprune_train.storage.run_files import files_of_stage
from mmprune_train.tasks import report


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def page(sweep: Path) -> str:
    report.run(compose_config(["task=report", f"report.runs=[{sweep}]"]))
    return (sweep / "report" / "report.html").read_text()


def text(page: str) -> str:
    return " ".join(html.unescape(re.sub(r"<(style|script)>.*?</\1>|<[^>]+>", " ", page, flags=re.S)).split())


def test_the_page_is_one_file_without_a_network(page: str) -> None:
    assert not re.findall(r"""(?:src|href)=["'](?!#)[^"']*["']|url\((?!#)|@import""", page)
    assert page.count("<svg") > 20


def test_labels_say_what_a_bare_value_would_not() -> None:
    keys = ("knee.name", "stage.pretrain.lr", "stage.instruct.lr", "seed", "trainer.compile", "peft.name")
    run = SimpleNamespace(name="x", settings=dict(zip(keys, ("otsu", "0.1", "1e-3", "4", "True", "none"), strict=True)))
    assert (
        report_page._label(run, keys) == "otsu, pretrain.lr 0.1, instruct.lr 1e-3, seed 4, compile True, peft.name none"
    )
    assert report_page._label(run, ["optim.eps"]) == "x"


def test_runs_are_ordered_by_the_first_objective_and_the_front_is_marked(page: str) -> None:
    rows = re.findall(r"<tr( class=\"best\")?><td><a href=\"#run-(\d)\">", page)
    assert [int(number) for _, number in rows] == [4, 2, 1, 0, 3, 5]
    assert [int(number) for best, number in rows if best] == [4, 1, 0]


def test_failed_and_unfinished_runs_are_told_with_the_reason(page: str) -> None:
    said = text(page)
    assert "4 done, 1 unfinished, 1 failed" in said
    assert "job 5 failed : pruner.language.layer=10: <too deep>" in said
    assert "stage instruct has not ended: 10 of 20 steps" in said
    assert "2 of 6 runs lack one of the two numbers" in said


def test_the_heat_map_has_a_cell_for_each_pair_and_a_dash_where_there_is_no_number(page: str) -> None:
    (table,) = re.findall(r'<table class="heat">.*?</table>', page, flags=re.S)
    assert re.findall(r"<th>([\w]*)</th>", table) == ["", "kneedle", "otsu", "max_chord", "2", "10"]
    cells = re.findall(r"<td[^>]*>([-\d.]+)</td>", table)
    assert cells[:3] == ["0.545", "0.678", "0.705"] and cells[4:] == ["-", "-"]


def test_the_result_has_what_the_page_compares(sweep: Path, page: str) -> None:
    result = json.loads((sweep / "report" / "result.json").read_text())
    first, last = result["runs"][0], result["runs"][5]
    assert first["settings"] == {"pruner.language.layer": "2", "knee": "kneedle"}
    assert (first["accuracy"], first["keep_ratio"], first["front"]) == (pytest.approx(0.545), 0.1, True)
    assert last["state"] == "failed" and "too deep" in last["error"] and last["accuracy"] is None


def test_a_single_run_shows_its_stages_its_evaluation_and_all_its_settings(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo" / "a")
    report.run(compose_config(["task=report", f"report.runs=[{run}]"]))
    page = (run / "report" / "report.html").read_text()
    said = text(page)
    assert (
        "pruner.language.layer 2" in said
        and "blind majority (question alone) 0.200 0.800" in said
        and "training minutes 1.500" in said
    )
    assert page.count("<svg") == 7 and "Runs beside each other" not in said


def test_an_experiments_runs_are_the_default_and_those_moved_aside_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_page, "run_charts", lambda run: [])
    for name, keep in (("a", 0.1), ("b", 0.2), ("b.old1", 0.3)):
        write_run(tmp_path / "smoke" / name, keep=keep, seed=len(name) + int(10 * keep))
    result = report.run(compose_config(["task=report", "+experiment=smoke", f"runs_dir={tmp_path}"]))
    assert [run["name"] for run in result["runs"]] == ["a", "b"]
    assert (tmp_path / "smoke" / "report" / "report.html").is_file()


def test_other_numbers_and_keys_can_be_asked_for(sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_page, "run_charts", lambda run: [])
    asked = ["report.y=instruct.loss", "report.x=tokens_dense", "report.heat=[knee,pruner.language.layer]"]
    report.run(compose_config(["task=report", f"report.runs=[{sweep}]", f"report.output={tmp_path}", *asked]))
    said = text((tmp_path / "report.html").read_text())
    assert (
        "rows: knee, columns: pruner.language.layer" in said
        and "instruct.loss: less is better; tokens_dense: less is better" in said
    )


def test_sweeps_beside_each_other_are_told_apart_by_their_configs(sweep: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", knee__method="lof")
    runs = read_runs([sweep, other, sweep.parent.parent / "smoke" / "run0"])
    assert [run.name for run in runs] == ["run0", "run1", "run2", "run3", "run4", "smoke-1, job 5", "other"]
    assert runs[2].settings["knee.method"] == "otsu" and runs[6].settings["knee.method"] == "lof"
    assert runs[5].settings["knee"] == "max_chord", "a job without a run has its overrides alone"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("report.heat=[knee]", "needs two different keys"),
        ("report.runs=[absent]", "there is no absent"),
        ("report.y=acuracy", "did you mean accuracy"),
        ("report.heat=[knee,seed]", "no run has a setting seed; they differ in pruner.language.layer, knee"),
    ],
)
def test_what_cannot_be_shown_is_named(override: str, words: str, sweep: Path) -> None:
    with pytest.raises(UserError, match=words):
        report.run(compose_config(["task=report", f"report.runs=[{sweep}]", override]))


def test_nothing_is_written_over_a_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "smoke" / "a")
    with pytest.raises(UserError, match=r"result\.json would be lost"):
        report.run(compose_config(["task=report", f"report.runs=[{run}]", f"report.output={run}"]))
    with pytest.raises(UserError, match="holds no run"):
        report.run(compose_config(["task=report", f"report.runs=[{tmp_path}]"]))


def test_settings_that_go_with_a_chosen_option_are_not_listed_twice(tmp_path: Path) -> None:
    for number, knee in enumerate(("kneedle", "otsu", "otsu")):
        pruner = {"name": "twostage", "vision": {"knee": knee}, "language": {"layer": number}}
        write_run(tmp_path / "smoke" / str(number), knee={"method": knee}, pruner=pruner, seed=number)
    assert telling_keys(read_runs([tmp_path / "smoke"])) == ["seed", "knee.method", "pruner.language.layer"]


def test_long_series_are_thinned_to_means() -> None:
    along, up = charts.thinned(list(range(1000)), [float(i % 2) for i in range(1000)])
    assert len(along) <= charts.POINTS and along[0] == 1.5 and set(up[:-1]) == {0.5}


def test_long_labels_leave_the_figures_their_room(tmp_path: Path) -> None:
    for number in range(6):
        more = {"stages": ["pretrain", "instruct"], "init_from": f"runs/of/a/long/path/of/a/projector/{number}"}
        write_run(tmp_path / f"run{number}", pruner__name=f"a_pruner_of_number_{number}", seed=number, **more)
    found = report_page.Shown("accuracy", "keep_ratio")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for count in (2, 6):
            page = report_page.render(read_runs([str(tmp_path)])[:count], found, "title", [])
            assert all(f"a_pruner_of_number_{number}" in page for number in range(count))
            charts.lines({"a" * 40 + str(i): ((1, 2), (3, 4)) for i in range(count)}, "x", "y", size=(6.6, 3.0))


def test_settings_are_shown_as_they_are_typed_and_kinds_as_they_are_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", stages=["pretrain", "instruct"])
    result = json.loads((run / "result.json").read_text())
    result["evaluate"]["accuracy"] = {"yes_no": 0.5, "my_kind": 0.1}
    (run / "result.json").write_text(json.dumps(result))
    page = report_page.render(read_runs([str(run)]), report_page.Shown("accuracy", None), "title", [])
    assert "[pretrain,instruct]" in page
    assert ">my_kind</th>" in page and ">yes/no</th>" in page


def cut(file: Path) -> None:
    file.write_text(file.read_text()[:-9])


HARMS = {
    "result.json": cut, "manifest.json": cut, "config.yaml": lambda file: file.write_text(""),
    "pretrain/metrics.jsonl": lambda file: file.write_text(file.read_text().replace("loss", "l\x00ss", 1)),
    "instruct/metrics.jsonl": lambda file: file.write_text(file.read_text().replace('"loss"', '"lors"', 1)),
    "evaluate-x/result.json": lambda file: file.write_text('{"accuracy": 3}'),
}  # fmt: skip


def test_damaged_runs_are_named_and_the_others_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[str] = []
    monkeypatch.setattr(report_page, "run_charts", lambda run: drawn.append(run.name) or [])
    for number, (name, harm) in enumerate(HARMS.items()):
        run = write_run(tmp_path / "smoke" / f"bad{number}")
        write_json(run / "evaluate-x/result.json", {"accuracy": {"open": 0.5}})
        harm(run / name)
    write_run(tmp_path / "smoke" / "good")
    result = report.run(compose_config(["task=report", f"report.runs=[{tmp_path / 'smoke'}]"]))
    assert [run["state"] for run in result["runs"]] == ["damaged"] * len(HARMS) + ["done"]
    said = capsys.readouterr().err.splitlines()
    for number, name in enumerate(HARMS):
        assert any(f"bad{number}" in line and name.rpartition("/")[2] in line for line in said), name
        assert name.rpartition("/")[2] in " ".join(result["runs"][number]["missing"])
    assert len(drawn) == len(HARMS) + 1


def test_rows_that_are_not_those_that_were_written_are_not_drawn(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["stages"]["pretrain"]["files"] = files_of_stage(run / "pretrain")
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert read_run(run).state == "done"
    file = run / "pretrain/metrics.jsonl"
    file.write_text(file.read_text().replace("2352", "2353", 1))
    found = read_run(run)
    assert found.state == "damaged" and "metrics.jsonl has other rows than were written" in found.missing[0]


def test_a_damaged_record_of_a_job_is_named_and_the_others_shown(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path)
    first, second, *_ = sorted((sweep / "jobs").glob("*.json"))
    cut(first)
    second.write_text('{"job": "x", "overrides": [1]}')
    runs = read_runs([sweep])
    assert [run.state for run in runs].count("damaged") == 2 and len(runs) == 6
    assert {first.name, second.name} == {Path(run.missing[0].split(":")[0]).name for run in runs[-2:]}
