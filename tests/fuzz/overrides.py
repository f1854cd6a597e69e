"""Single overrides of any key, likely and hostile, in the forms of Hydra's grammar; what is taken runs for a step.

A key of another task than training is tried with that task, on a finished run.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from fuzz.harness import CHARACTERS, LINES, Case, Fault, command
from PIL import Image
from training.synthetic import overrides, write_dataset

import mmprune_train.training.run as training
import mmprune_train.training.throughput as throughput
from mmprune_train.config.compose import compose_config
from mmprune_train.config.docs import _docs
from mmprune_train.storage.conf import conf_dir, options

PLAIN = 1
SMALL = (
    "trainer.precision=fp32", "evaluate.after_train=false", "data.pretrain.limit=8", "data.instruct.limit=8",
    "trainer.keep_checkpoints=1",
    "stage.pretrain.max_steps=1", "stage.instruct.max_steps=1", "stage.instruct.group_by_modality=false",
)  # fmt: skip
CKPT = "ckpt=runs/smoke/t"
OF_A_RUN = {
    "evaluate": ("task=evaluate", CKPT, "evaluate.limit=2"),
    "generate": ("task=generate", CKPT, "generate.images=[photo.png]", "generate.max_new_tokens=2"),
    "calibrate": ("task=calibrate", CKPT, "calibrate.images=4"),
    "bench": ("task=bench", CKPT, "bench.repeats=1", "bench.measure=[generate]", "bench.new_tokens=2",
    "bench.pruners=[none]", "bench.baseline=false"),
    "plan": ("task=plan",),
    "report": ("task=report", "report.runs=[runs/smoke]"),
    "sweep": ("task=report", "report.runs=[runs/smoke]"),
}  # fmt: skip
"""Section -> the task that reads it."""
LONG = ("trainer.compile",)
"""Keys whose documented use takes minutes."""
_known: dict[str, Any] = {}


@dataclass(frozen=True)
class Leaf:
    key: str
    value: Any
    hint: str
    said: tuple[str, ...]
    """Words in backticks of its docstring."""


def warm(root: Path) -> None:
    """A data set, the keys there are, and a run of a step, finished."""
    os.environ |= {"MMPRUNE_CACHE": str(root / "cache"), "PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1"}
    os.environ["WANDB_MODE"] = "offline"
    throughput.measured_tflops = lambda *_: 1.0  # a product of large matrices, for each stage
    extent_of = training.stage_extent

    def one_step(*arguments: Any) -> Any:
        extent = extent_of(*arguments)
        return replace(extent, steps=min(extent.steps, 1))

    training.stage_extent = one_step
    data = write_dataset(root / "data", 8)
    _known["base"] = [argument for argument in overrides(data, Path("runs")) if not argument.startswith("run")]
    _known["leaves"] = list(_leaves(compose_config([*_known["base"], *SMALL])))
    os.chdir(root)
    command(*_known["base"], *SMALL, "run_id=t")
    _known["run"] = root / "runs"


def plain(rng: random.Random, folder: Path, number: int) -> Case:
    """The command without an override."""
    return _case("seed=3", ["seed"], "", folder)


def case(rng: random.Random, folder: Path, number: int) -> Case:
    """One override."""
    if rng.random() < 0.1:
        return _group(rng, folder)
    leaf: Leaf = rng.choice([leaf for leaf in _known["leaves"] if leaf.key not in LONG])
    value = _value(rng, leaf)
    kind = rng.random()
    if kind < 0.8:
        text = f"{leaf.key}={value}"
    elif kind < 0.86:
        text = f"{rng.choice(['+', '++'])}{leaf.key}={value}"
    elif kind < 0.9:
        text = f"~{leaf.key}" + rng.choice(["", f"={value}"])
    elif kind < 0.97:
        text = f"{leaf.key}=" + rng.choice(FORMS).replace("@", value)
    else:
        section = leaf.key.rpartition(".")[0] or leaf.key
        inner = leaf.key.rpartition(".")[2]
        form = rng.choice(["=null", f"={{{inner}:{value}}}", "=[]", f".{inner}.x=1", f"={value}"])
        text = section + form
    return _case(text, _names(leaf.key, value), leaf.key.partition(".")[0], folder)


FORMS = (
    "int(@)", "float(@)", "bool(@)", "str(@)", "json_str(@)", "choice(@)", "range(1,3)", "interval(0,1)", "glob(*)",
    "sort(@)", "shuffle(@)",
    "'@'", '"@"', "[@]", "{a:@}", "@,", "${@}", "'@", "[@", "@]", "{", "}", "$", "\\@", " @ ", "@@", "extend_list(@)",
    "tag(a,@)",
)  # fmt: skip


NO_OPTIONS = (
    "", "nothing", "null", "[]", "../encoder/tiny_clip", "none,none", "[none,none]", "x" * 300, "a/b", "${seed}", "1",
    "true",
)  # fmt: skip


def _group(rng: random.Random, folder: Path) -> Case:
    groups = sorted(path.name for path in conf_dir().iterdir() if path.is_dir())
    group = rng.choice([group for group in groups if group not in ("experiment", "sweep", "encoder", "llm")])
    if rng.random() < 0.6:
        value = rng.choice([option for option in options(group) if "deepspeed" not in option and option != "qlora"])
    else:
        value = rng.choice(NO_OPTIONS)
    names = [*_names(group, value), *(leaf.key for leaf in _known["leaves"] if "." in leaf.key)]  # what it sets
    return _case(f"{rng.choice(['', '', '', '+', '++', '~'])}{group}={value}", names, "", folder)


def _names(key: str, value: str) -> list[str]:
    parts = key.split(".")
    names = [key, parts[-1], *(".".join(parts[:n]) for n in range(1, len(parts))), *value.strip("'\"[]").split(",")]
    return [name for name in names if len(name) > 1] or [key]


def _case(text: str, names: list[str], section: str, folder: Path) -> Case:
    here = folder / "a" / "b"
    here.mkdir(parents=True)
    arguments = [*_known["base"], *SMALL]
    if section in OF_A_RUN:
        shutil.copytree(_known["run"], here / "runs")
        Image.new("RGB", (30, 20), "red").save(here / "photo.png")
        arguments = [*(_known["base"] if section == "plan" else []), *OF_A_RUN[section]]
    key = text.lstrip("+~").partition("=")[0]
    arguments = [argument for argument in arguments if argument.partition("=")[0] != key]

    def run() -> str:
        os.chdir(here)
        before = set(here.rglob("config.yaml"))
        try:
            command(*arguments, text)
        except SystemExit as end:
            message = str(end.code)
            if "finite" not in message or len(message.splitlines()) > LINES or len(message) > CHARACTERS:
                raise Fault(f"{message}") from None
            return "diverged"
        finally:
            left = set(here.rglob("config.yaml")) - before
        _check(here)
        return "accepted" if left or section in OF_A_RUN else "accepted elsewhere"

    return Case(f"{' '.join(arguments[-2:]) if section in OF_A_RUN else ''} {text!r}", names, run)


def _check(folder: Path) -> None:
    """What a run has written is JSON, and its losses are numbers."""
    for file in [*folder.rglob("result.json"), *folder.rglob("manifest.json")]:
        json.loads(file.read_text(encoding="utf-8"), parse_constant=_refuse)
    for file in folder.rglob("metrics.jsonl"):
        for line in file.read_text(encoding="utf-8").splitlines():
            json.loads(line, parse_constant=_refuse)


def _refuse(constant: str) -> None:
    raise Fault(f"{constant} in a JSON file of a run that is said to have ended well")


def _leaves(node: Any, prefix: str = "") -> Iterator[Leaf]:
    hints, said = get_type_hints(type(node)), _docs(type(node))
    for item in fields(node):
        key, value = prefix + item.name, getattr(node, item.name)
        if is_dataclass(value):
            yield from _leaves(value, f"{key}.")
        elif isinstance(value, dict):
            for name, inner in value.items():
                if is_dataclass(inner):
                    yield from _leaves(inner, f"{key}.{name}.")
                else:
                    yield Leaf(f"{key}.{name}", inner, type(inner).__name__, ())
        else:
            words = tuple(re.findall(r"`([\w.:]+)`", said.get(item.name, "")))
            yield Leaf(key, value, str(hints[item.name]), words)


WHOLE = (
    "0", "1", "-1", "2", "3", "5", "7", "8", "12", "64", "100", "1000", "1000000", "1000000000000",
    "9223372036854775807", "9223372036854775808",
    "-9223372036854775809", "1" + "0" * 40, "1.0", "1.5", "-0", "1e3", "0x10", "0b1", "1_000", "+5", "٣", "１",
)  # fmt: skip
REAL = (
    "0", "0.0", "-0.0", "1", "-1", "0.5", "0.1", "0.9", "1.0", "2", "1e-8", "1e-30", "5e-324", "1e-400", "1e30",
    "1e38", "1e39", "1e308", "1e309", "nan",
    "inf", "-inf", "NaN", ".inf", "Infinity", ".5", "5.", "1e", "1e-3", "3", "100", "1" + "0" * 400,
)  # fmt: skip
WRONG = (
    "", "null", "None", "true", "false", "abc", "''", "[]", "[1]", "{}", "{a:1}", "[[1]]", "a b", "a,b", "1,2", "'1'",
    "???", "${seed}", "${nothing}",
    "${oc.env:HOME}", "${oc.env:NOTHING}", "$\\{", "~", "=", "a=b", "é", "🟥", "\udcff", "\x1b[31m", "a\nb", "*",
    "--help", "%s",
)  # fmt: skip
TEXT = (
    "..", ".", "/", "a/b", "../..", "x" * 300, "null", "' '", "' x '", "~/x", "-", "auto", "none", "all", "a:b",
    "os:system", "nothing:here",
    "json:loads", "builtins:eval", "'$\\frac{$'", "http://a/b", "con", "a\\b", "'a b'", '"a\tb"', "NUL", "a.b", "1",
    "nan", "é", "🟥", "\udcff", "é" * 200,
    "'<b>'", "'{{7*7}}'", "'${seed}'", "'\\x1b[2J'", "\x1b[2J", "a\nb", "/dev/null", "/dev/zero", "/proc/self",
    "/dev/full", "/nonexistent/x", "photo.png",
    "photo.png/x",
)  # fmt: skip
LISTS = (
    "[]", "[a]", "[1,2,3]", "[0.5,0.5,0.5]", "[0,0,0]", "[nan,0,0]", "[inf,1,1]", "[1e30,1e30,1e30]", "[-1,-1,-1]",
    "[0.1]", "[null]", "[[1,2]]", "[a,a]",
    "[q_proj]", "[q_proj,v_proj]", "[lm_head]", "[.*]", "['']", "[train]", "[none]", "[none,twostage]", "[0.9,0.999]",
    "[1,1]", "[open]", "[yes_no]",
    "[" + ",".join(["1"] * 2000) + "]", "[pretrain]", "[instruct]", "[instruct,pretrain]", "[pretrain,pretrain]",
    "[vision]", "[photo.png]", "[nothing.png]",
)  # fmt: skip


def _value(rng: random.Random, leaf: Leaf) -> str:
    if rng.random() < 0.15:
        return rng.choice(WRONG)
    if leaf.said and rng.random() < 0.4:
        return rng.choice(leaf.said)
    if "list" in leaf.hint.lower():
        return rng.choice(LISTS)
    if "bool" in leaf.hint:
        return rng.choice(["true", "false", "true", "false", "null", "1", "0", "yes", "TRUE", "on"])
    if "float" in leaf.hint:
        return rng.choice(REAL)
    if "int" in leaf.hint or "Any" in leaf.hint:
        return rng.choice(WHOLE if rng.random() < 0.9 else REAL)
    return rng.choice(TEXT)
