"""Which keys a task reads: those it does not are refused, those of the documentation's commands are not."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from pathlib import Path

import pytest

from mmprune_train.config.command import Command
from mmprune_train.config.docs import all_keys
from mmprune_train.config.schema import Config
from mmprune_train.errors import UserError
from mmprune_train.tasks import ANYWHERE, TASKS, check_keys, unread
from mmprune_train.usage import usage

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "experiments").rglob("README.md")]
STAND_IN = 'mmprune() { printf "%s\\x1f" "$@"; echo; }'


@pytest.mark.parametrize(
    ("task", "arguments", "words"),
    [
        ("train", ["ckpt=x"], "bench, inspect do); the weights that training starts from are init_from"),
        ("prepare", ["ckpt=x"], "task=prepare does not read ckpt"),
        ("plan", ["ckpt=x"], "task=plan does not read ckpt"),
        ("train", ["generate.images=[a]"], "it would change nothing; leave it out (generate, inspect do)"),
        ("train", ["sweep.objectives=[loss]"], "report, every sweep (-m) do"),
        ("generate", ["ckpt=x", "evaluate.limit=3"], "train, prepare, plan, calibrate, evaluate do"),
        ("generate", ["ckpt=x", "peft=lora"], "task=generate does not read peft,"),
        ("generate", ["ckpt=x", "data=files"], "does not read data"),
        ("generate", ["ckpt=x", "llm.template=chat"], "does not read llm.template"),
        ("evaluate", ["ckpt=x", "data.pretrain.limit=3"], "does not read data.pretrain.limit where ckpt= is given"),
        ("calibrate", ["ckpt=x", "data.evaluate.limit=3"], "does not read data.evaluate.limit where"),
        ("bench", ["ckpt=x", "data.blind=a"], "does not read data.blind where"),
        ("generate", ["ckpt=x", "trainer.devices=2"], "does not read trainer.devices"),
        ("evaluate", ["ckpt=x", "stage.instruct.lr=1"], "does not read stage.instruct.lr where ckpt= is given"),
        ("evaluate", ["ckpt=x", "strategy=ddp"], "does not read strategy where ckpt= is given"),
        ("evaluate", ["ckpt=x", "+encoder.image_size=3"], "does not read encoder.image_size where"),
        ("evaluate", ["logger=wandb"], "does not read logger,"),
        ("evaluate", ["restart=true"], "does not read restart"),
        ("inspect", ["ckpt=x", "generate.max_new_tokens=3"], "(generate does)"),
        ("bench", ["optim.eps=1"], "does not read optim.eps"),
        ("report", ["pruner=none"], "does not read pruner"),
    ],
)  # fmt: skip
def test_a_key_without_effect_is_refused(task: str, arguments: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        check_keys(task, Command(tuple(arguments)))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{arguments[-1]}: task={task} ")


@pytest.mark.parametrize(
    ("task", "arguments"),
    [
        ("train", ["init_from=x", "init_adapters=merge", "stage.instruct.init_from=y"]),
        ("train", ["+experiment=demo", "peft.r=3", "encoder=dinov2_small", "restart=true", "evaluate.limit=3"]),
        ("generate", ["ckpt=x", "data.exif_orientation=false"]),
        ("inspect", ["ckpt=x", "data.exif_orientation=false"]),
        ("calibrate", ["ckpt=x", "encoder.text.path=x", "data.pretrain.annotations=a", "data=files"]),
        ("plan", ["logger=[csv,wandb]", "plan.mfu=0.5", "stage.instruct.lr=1", "evaluate.after_train=true"]),
        ("evaluate", ["ckpt=x", "stages=[instruct]", "data.instruct.annotations=a", "run_id=r", "knee=otsu",
                      "evaluate.after_train=true", "trainer.precision=fp32", "encoder.text.path=x", "debug=true"]),
        ("evaluate", ["peft.r=64", "stage.instruct.lr=1", "strategy=ddp"]),
        ("generate", ["+experiment=smoke", "runs_dir=x", "ckpt=x", "generate.images=[a]", "trainer.precision=fp32"]),
        ("calibrate", ["peft=lora", "calibrate.images=3", "init_from=x", "init_adapters=merge"]),
        ("bench", ["bench.repeats=1", "peft=lora", "stage.instruct.batch_size=1", "encoder.image_size=336"]),
        ("report", ["report.x=loss", "sweep.objectives=[loss]"]),
    ],
)  # fmt: skip
def test_a_key_that_is_read_is_not(task: str, arguments: list[str]) -> None:
    check_keys(task, Command((f"task={task}", *arguments)))


def test_a_sweep_reads_what_its_jobs_are_compared_by() -> None:
    arguments = ["sweep.objectives=[loss]", "sweep.directions=[minimize]", "+sweep=methods"]
    assert unread("train", arguments, sweeping=True) == [] and unread("train", arguments) == arguments


def test_every_key_is_read_by_some_task_and_every_key_that_is_read_exists() -> None:
    read = {key for task in TASKS.values() for key in (*task.reads, *task.without_ckpt)}
    assert read <= {*all_keys()}
    top = {field.name for field in dataclasses.fields(Config)} - set(ANYWHERE)
    assert top <= {key.split(".")[0] for key in read}


def commands(page: Path) -> list[list[str]]:
    """The arguments of each command of a page's code blocks, as a shell reads them."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    kept = []
    for block in (text for language, text in blocks if language in ("", "bash")):
        lines = re.sub(r"^(srun .*)?\S*python -m mmprune_train", "mmprune", block, flags=re.MULTILINE)
        kept += [line for line in lines.replace("\\\n", " ").splitlines() if re.match(r"mmprune |\w+=\S", line)]
    done = subprocess.run(["bash", "-c", "\n".join([STAND_IN, *kept])], capture_output=True, text=True, check=True)
    return [line.split("\x1f")[:-1] for line in done.stdout.splitlines()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_the_documentation_have_no_idle_key(page: Path) -> None:
    for arguments in commands(page):
        typed = [one for one in arguments if "=" in one and not one.startswith(("hydra/", "hydra.", "-"))]
        task = next((one.removeprefix("task=") for one in typed if one.startswith("task=")), "train")
        sweeping = "-m" in arguments or any(one.startswith("+sweep=") for one in typed)
        check_keys(task, Command(tuple(typed), sweeping=sweeping))


@pytest.mark.parametrize("task", TASKS)
def test_the_help_of_a_task_begins_with_where_it_writes(task: str) -> None:
    text = usage(["--help", f"task={task}"])
    assert text.startswith(f"task={task} writes ") and "\nExample:\n  mmprune " in text
    own = [key for key in TASKS[task].reads if key == task]
    for key in own:
        assert f"  {key}." in text, "its own keys, one by one"


def test_help_says_what_a_key_means_and_names_a_task_that_is_misspelt() -> None:
    text = usage(["task=evaluate"])
    assert "evaluate.limit=null\n      First N questions of each kind; null: all." in text
    with pytest.raises(UserError, match="did you mean evaluate"):
        usage(["task=evalaute"])
