"""Files of a model folder, looked at without loading them: whether they are whole, and which tensors they hold."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmprune_train.errors import UserError
from mmprune_train.storage.user_files import file_status, parse_json, read_bytes, reason_of

MOST_SMALL = 1 << 30
"""Bytes of a config or tokenizer file."""
BOM = b"\xef\xbb\xbf"
POINTER = b"version https://git-lfs.github.com/spec/"
STEMS = (("model", "safetensors"), ("pytorch_model", "bin"))
"""Names of weights, in the order in which transformers looks for them."""
SMALL = (
    *("config", "generation_config", "tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "spiece"),
    *("sentencepiece", "chat_template", "preprocessor_config", "processor_config"),
)
"""How the names of config and tokenizer files begin."""
ELSEWHERE = ("*.pth", "*.pt", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.safetensors", "*.bin")
"""What a folder without weights for transformers may hold instead, to be named in the message."""
NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin", "tokenizer.bin")


class Entry(NamedTuple):
    """A tensor of a file."""

    file: Path
    name: str
    """In that file."""
    shape: tuple[int, ...]
    dtype: str
    """As safetensors or torch names it, e.g. `BF16` or `torch.bfloat16`."""


Tensors = dict[str, Entry]
"""By name, which need not be that in the file."""


def read_config(key: str, file: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError where the file is a git-lfs pointer, cut off, or something else."""
    found = _read_json(key, file)
    if not isinstance(found, dict):
        raise UserError(f"{key}: {file} holds a {type(found).__name__} where an object is expected; copy it again")
    return found


def _read_json(key: str, file: Path) -> Any:
    refuse_pointer(key, file)
    try:
        return parse_json(read_bytes(file))
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {file} is damaged or cut off ({error}); copy it again") from None


def refuse_pointer(key: str, file: Path) -> None:
    """Raise UserError where `file` is what git leaves in the place of a large file, is empty or cannot be read."""
    try:
        with file.open("rb") as stream:
            begin = stream.read(len(POINTER))
    except OSError as error:
        raise UserError(
            f"{key}: {file} cannot be read ({error.strerror}); copy it again, or make it readable"
        ) from None
    if begin == POINTER:
        raise UserError(
            f"{key}: {file} is a git-lfs pointer, not the file itself; install git-lfs and run `git lfs pull` in "
            f"{file.parent}"
        )
    if not begin:
        raise UserError(f"{key}: {file} is empty; copy it again")
    if begin.startswith(BOM) and file.suffix == ".json":
        raise UserError(
            f"{key}: {file} begins with a byte order mark, with which transformers does not read it; save it as UTF-8 "
            "without one"
        )


def refuse_broken_links(key: str, folder: Path) -> None:
    """Raise UserError where a folder cannot be read, or holds what is neither a file nor a folder: a link that leads to
    nothing, as in a copy of a snapshot of the hub's cache, or a pipe, for which a reader would wait for ever."""
    try:
        files = sorted(file for file in folder.iterdir() if not file.is_dir())
    except OSError as error:
        raise UserError(f"{key}: {folder} cannot be read ({error.strerror}); make it readable") from None
    for file in files:
        if file.is_symlink() and not file.exists():
            raise UserError(
                f"{key}: {file} is a link to {file.readlink()}, which is not there; copy what it leads to (cp -L)"
            )
        try:
            file_status(file)
        except OSError as error:
            raise UserError(f"{key}: {file} cannot be read ({error}); remove it, or copy it again") from None


def check_small_files(key: str, folder: Path) -> None:
    """Raise UserError where a config or tokenizer file is a git-lfs pointer or broken JSON."""
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.name.startswith(SMALL):
            if (size := file.stat().st_size) > MOST_SMALL:
                raise UserError(f"{key}: {file} has {size:,} bytes, at most {MOST_SMALL:,} are read; copy it again")
            if file.suffix == ".json":
                (read_config if file.name.endswith("config.json") else _read_json)(key, file)
            elif file.stat().st_size:  # an empty text file may be meant
                refuse_pointer(key, file)


def weights_of(key: str, folder: Path) -> Tensors:
    """The tensors of a model folder, as transformers would find them, from the files' headers.

    Raises UserError where there are no weights, or a file is a git-lfs pointer, cut off or absent, or the index names
    a tensor that its file does not hold.
    """
    for stem, ending in STEMS:
        whole, index = folder / f"{stem}.{ending}", folder / f"{stem}.{ending}.index.json"
        if whole.is_file():
            return tensors_of(key, whole)
        if index.is_file():
            return _indexed(key, index)
        if shards := sorted(folder.glob(f"{stem}-*-of-*.{ending}")):
            raise UserError(f"{key}: {folder} has {shards[0].name}, but no {index.name}; copy the index, too")
    others = {file.name for pattern in ELSEWHERE for file in folder.glob(pattern)} - set(NOT_WEIGHTS)
    found = f"only {', '.join(sorted(others)[:3])}, which transformers does not read" if others else "no weights"
    raise UserError(
        f"{key}: {folder} holds {found}; copy its model.safetensors (or all shards with their index), or convert it "
        "to that format"
    )


def _indexed(key: str, index: Path) -> Tensors:
    where = read_config(key, index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise UserError(f"{key}: {index} has no weight_map; copy it again")
    if away := [name for name in where.values() if not isinstance(name, str) or Path(name).name != name]:
        raise UserError(f"{key}: {index} names {away[0]!r}, which is no file beside it; copy it again, with its shards")
    files = sorted(set(where.values()))
    if absent := [name for name in files if not (index.parent / name).is_file()]:
        raise UserError(
            f"{key}: {index.parent} lacks {', '.join(absent[:3])} ({len(absent)} of the {len(files)} files that "
            f"{index.name} names); copy what is absent"
        )
    tensors: Tensors = {}
    for name in files:
        tensors |= tensors_of(key, index.parent / name)
    if lost := [name for name, file in where.items() if name not in tensors or tensors[name].file.name != file]:
        raise UserError(
            f"{key}: {index} says that {where[lost[0]]} holds {lost[0]}, which it does not ({len(lost)} such tensors); "
            "index and shards are of different checkpoints, copy all of them again"
        )
    return tensors


def tensors_of(key: str, file: Path) -> Tensors:
    """The tensors of one .safetensors or .bin file. Raises UserError where it is a git-lfs pointer or cut off."""
    refuse_pointer(key, file)
    return _of_safetensors(key, file) if file.suffix == ".safetensors" else _of_pickle(key, file)


def _of_safetensors(key: str, file: Path) -> Tensors:
    try:
        with safe_open(file, "pt") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {name: Entry(file, name, tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    except SafetensorError as error:
        raise UserError(f"{key}: {file} is damaged or cut off ({str(error)[:160]}); copy it again") from None


def _of_pickle(key: str, file: Path) -> Tensors:
    try:
        found = torch.load(file, map_location="meta", mmap=zipfile.is_zipfile(file) or None, weights_only=True)
    except Exception as error:  # of a damaged file, any kind
        raise UserError(f"{key}: {file} {pickled(error)}; copy it again, or as safetensors") from None
    if not isinstance(found, dict):
        raise UserError(f"{key}: {file} holds a {type(found).__name__}, not weights by name; give a state dict")
    return {n: Entry(file, n, tuple(t.shape), str(t.dtype)) for n, t in found.items() if isinstance(t, Tensor)}


def pickled(error: Exception) -> str:
    """What a file is that torch.load refuses to read as data alone."""
    if found := re.search(r"(?:GLOBAL|Unsupported global:|Can only .*?:)\s+(?:GLOBAL )?([\w.]+)", str(error)):
        return f"is not a file of weights alone: it holds {found[1]}, code that is never run here"
    return f"is cut off or damaged, or not a file of weights alone ({reason_of(error)})"


def read_tensors(tensors: Tensors) -> dict[str, Tensor]:
    """The values of these tensors; of safetensors files only what is asked for is read."""
    wanted: dict[Path, dict[str, str]] = {}
    for name, entry in tensors.items():
        wanted.setdefault(entry.file, {})[name] = entry.name
    values: dict[str, Tensor] = {}
    for file, some in wanted.items():
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                values |= {name: opened.get_tensor(source) for name, source in some.items()}
        else:
            loaded = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file) or None, weights_only=True)
            values |= {name: loaded[source].clone() for name, source in some.items()}
    return values
