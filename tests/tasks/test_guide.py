"""docs/add_a_pruner.md: its files are written, its commands run and its Python executed, as a reader would."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training.synthetic import overrides, write_dataset

from mmprune_train.errors import UserError
from mmprune_train.pruning import find_knee

GUIDE = Path(__file__).parents[2] / "docs/add_a_pruner.md"
TEXT = GUIDE.read_text(encoding="utf-8")
FILES = re.findall(r"^`([\w./]+)`\n```\w+\n(.*?)^```", TEXT, flags=re.S | re.M)
COMMANDS = [
    line for block in re.findall(r"^```bash\n(.*?)^```", TEXT, flags=re.S | re.M) for line in block.splitlines()
]
SNIPPETS = re.findall(r"(?<!`\n)^```python\n(.*?)^```", TEXT, flags=re.S | re.M)
SHORT = ("stage.pretrain.max_steps=2", "stage.instruct.max_steps=2", "evaluate.limit=2", "evaluate.max_new_tokens=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's folder: the guide's files, a picture, and data in place of those that smoke would fetch."""
    root = tmp_path_factory.mktemp("reader")
    write_dataset(root / "squares")
    (root / "picture.png").write_bytes((root / "squares/images/0.png").read_bytes())
    for name, content in FILES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content, encoding="utf-8")
    return root


def run(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(GUIDE.parents[1])}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_guide_has_what_this_test_runs() -> None:
    assert [name for name, _ in FILES] == [
        "my_methods/pruner/attended.yaml",
        "my_parts.py",
        "my_methods/pruner/edges.yaml",
        "my_scorer.py",
        "my_methods/pruner/scored.yaml",
    ]
    assert len(COMMANDS) == 6 and len(SNIPPETS) == 1


@pytest.mark.slow
def test_its_commands_run_in_order(folder: Path) -> None:
    for command in COMMANDS:
        python, *words = shlex.split(command)
        assert python == "python"
        data = [word for word in overrides(folder / "squares", Path("runs")) if not word.startswith("+")]
        if "+experiment=smoke" in words:
            here = [word for word in data if word.split("=")[0] not in {w.split("=")[0] for w in words}]
            words += [*here, *SHORT]
            words = [word for word in words if word != "run_id=t"]
        sweep = "-m" in words[2:]
        out = run(folder, *words)
        assert ("accuracy" in out) == ("+experiment=smoke" in words)
        if sweep:
            records = [json.loads(file.read_text()) for file in folder.glob("runs/sweeps/*/jobs/*.json")]
            assert len(records) == 2, "one for each power"
    assert (folder / "runs/smoke/edges/instruct/model/config.json").is_file()
    assert '"my_parts:edges"' in (folder / "runs/smoke/edges/instruct/model/config.json").read_text()
    assert (folder / "runs/smoke/edges/inspect/pruning.png").is_file()


def test_a_wrong_key_in_a_file_of_ones_own_is_named_with_the_file(folder: Path) -> None:
    (folder / "my_methods/pruner/typo.yaml").write_text("name: typo\nvision:\n  mergee: nearest\n")
    with pytest.raises(AssertionError, match=r"pruner/typo.yaml: pruner.vision.mergee.*mean pruner.vision.merge\?"):
        run(folder, "-m", "mmprune_train", "--config-dir", "my_methods", "+experiment=smoke", "pruner=typo")


def test_a_misspelt_method_of_ones_own_is_found(folder: Path) -> None:
    with pytest.raises(AssertionError, match="pruner=atended: .*did you mean attended"):
        run(folder, "-m", "mmprune_train", "--config-dir", "my_methods", "+experiment=smoke", "pruner=atended")


def test_the_console_script_finds_the_readers_module(folder: Path) -> None:
    """A script's folder, not the reader's, comes first on sys.path; -P leaves that out as well."""
    words = ["--config-dir", "my_methods", "task=nothing", "+experiment=smoke", "pruner=edges"]
    code = (
        f"import sys; sys.argv = ['mmprune', *{words}]; sys.path.insert(0, {str(GUIDE.parents[1])!r})\n"
        "from mmprune_train.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "import my_parts; print(my_parts.__file__)"
    )
    assert run(folder, "-P", "-c", code).strip() == str(folder / "my_parts.py")


def test_its_python_runs(folder: Path) -> None:
    assert run(folder, "-c", SNIPPETS[0] + "print('ran', scores.shape)").startswith("ran")


def test_its_score_and_budget_are_what_it_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(folder))
    from my_parts import edges

    class View:
        patches, grid = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)), (2, 3)

    for radius, power in ((1, 1.0), (2, 1.0), (1, 2.0), (4, 1.5)):
        found = edges(View, radius=radius, power=power)
        for image, row, column in itertools.product(range(2), range(2), range(3)):
            steps = [step for step in range(-radius, radius + 1) if step]
            near = [(row + step, column) for step in steps] + [(row, column + step) for step in steps]
            here, states = View.patches[image, 3 * row + column], View.patches[image]
            gaps = [
                (1 - torch.cosine_similarity(here, states[3 * r + c], 0)) ** power
                for r, c in near
                if 0 <= r < 2 and 0 <= c < 3
            ]
            torch.testing.assert_close(found[image, 3 * row + column], torch.stack(gaps).mean())
    scores = torch.rand(5, 12, generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([12, 1, 5, 7, 3])
    counts = find_knee(scores, "my_parts:above_mean", lengths, factor=1.2)
    for row, length in enumerate(lengths.tolist()):
        valid = scores[row, :length]
        assert int(counts[row]) == max(1, int((valid > 1.2 * valid.mean()).sum()))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module:f", "no module no_such_module.*PYTHONPATH"),
        ("math:no_such_function", "math has no no_such_function"),
        ("math:sqr", "math has no sqr; did you mean sqrt"),
        ("math:pi", "no function but a float"),
        ("knedle", "did you mean kneedle.*module:function"),
    ],
)
def test_a_function_that_cannot_be_found_is_named(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        find_knee(torch.rand(1, 3), name)


def test_an_import_that_fails_inside_the_module_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_there.py").write_text("import not_installed_at_all\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="not_installed_at_all"):
        find_knee(torch.rand(1, 3), "half_there:f")
    (tmp_path / "older.py").write_text("import math\nmath.gone\ndef f(curve, lengths): ...\n")
    with pytest.raises(AttributeError, match="gone"):
        find_knee(torch.rand(1, 3), "older:f")
