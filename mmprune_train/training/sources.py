"""Which annotation files, and which code of the user's own, a stage was trained with: recorded in the manifest, and the
same at every later start of the run, or it is said."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmprune_train.config.command import AGAIN
from mmprune_train.config.pruner import components
from mmprune_train.config.pruner_schema import PrunerConfig
from mmprune_train.config.schema import Config
from mmprune_train.data.records import count_samples
from mmprune_train.data.sources import data_root
from mmprune_train.errors import UserError
from mmprune_train.storage.assets import sha256_of
from mmprune_train.storage.files import stamp_of
from mmprune_train.training.rundir import RunDirectory

Entry = dict[str, Any]

ASIDE = "start over with restart=true (this run is moved aside) or another run_id="


def file_entry(file: Path) -> Entry:
    """Name, SHA-256 and bytes of an annotation file, and by what the very same file is known."""
    stamp = stamp_of(file)
    return {"file": file.name, "sha256": sha256_of(file), "bytes": file.stat().st_size, "stamp": stamp}


def told(entry: Mapping[str, Any]) -> Entry:
    """Of such an entry what is true on every machine."""
    return {key: value for key, value in entry.items() if key != "stamp"}


def changed(file: Path, known: Mapping[str, Any]) -> str | None:
    """What a file is now and was when `known` was made of it; None: the same, or there is none to compare."""
    if not file.is_file() or known.get("stamp") == stamp_of(file) or known["sha256"] == sha256_of(file):
        return None
    samples = count_samples(file)
    if samples == known["samples"]:
        return f"{samples} samples then and now, other contents"
    return f"{known['samples']} samples then, {samples} now"


def component_files(pruner: PrunerConfig) -> dict[str, Path]:
    """The source file of each `module:function` that a pruner names, of a package its folder; those that cannot be
    found are left out."""
    found = {}
    for name in sorted(set(components(pruner).values())):
        try:
            spec = importlib.util.find_spec(name.partition(":")[0])
        except (ImportError, ValueError):  # told by name when the component is looked for
            continue
        if spec is not None and spec.origin and Path(spec.origin).is_file():
            found[name] = Path(spec.origin).parent if spec.submodule_search_locations else Path(spec.origin)
    return found


def component_hashes(pruner: PrunerConfig) -> dict[str, str]:
    """SHA-256 of those files."""
    return {name: _hash(file) for name, file in component_files(pruner).items()}


def changed_components(pruner: PrunerConfig, state: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    """Those whose source is not what it was for a stage, by the manifest's entry of that."""
    for name, file in component_files(pruner).items():
        known = state.get("components", {}).get(name)
        if known is not None and known != _hash(file):
            yield name, file


def _hash(source: Path) -> str:
    """Of a module's file, or of all modules in a package's folder, which may define what the package names."""
    if source.is_file():
        return sha256_of(source)
    files = sorted(source.rglob("*.py"))
    listed = "".join(f"{file.relative_to(source).as_posix()} {sha256_of(file)}\n" for file in files)
    return hashlib.sha256(listed.encode()).hexdigest()


def check_sources(config: Config, run: RunDirectory) -> None:
    """Hold what the stages of a run were trained with against what is there now. Every process must call it.

    Of a stage without a checkpoint nothing is lost, so it may begin with other files.

    Raises:
        UserError: an annotation file or a component of the user's own is another one.
    """
    for name in config.stages:
        state = run.stage_state(name)
        if not (run.finished(name) or run.checkpoints(name)):
            continue
        did = f"stage {name} of {run.path} was {'trained' if run.finished(name) else 'begun'}"
        if known := state.get("data"):
            file = data_root(config.data) / Path(config.data.part(name).annotations or "").expanduser()
            if how := changed(file, known):
                raise UserError(
                    f"data.{name}.annotations: {file} has changed since {did} on it ({how}): put the earlier file back "
                    f"to go on with this run (images may be replaced), or {ASIDE}"
                )
        for component, file in changed_components(config.pruner, state):
            raise UserError(
                f"{component}: {file} has changed since {did} with it: put the earlier code back to go on with this "
                f"run, or {ASIDE}"
            )


def with_advice(error: UserError, run: RunDirectory, stage: str, file: Path) -> UserError:
    """What ended a stage while it trained, with what may be changed before it goes on, where it has a checkpoint."""
    from mmprune_train.training.checkpoint_files import step_of

    begun = run.checkpoints(stage)
    if not begun:
        return error
    return UserError(
        f"{error}\n{AGAIN.capitalize()} goes on after step {step_of(begun[-1])}, also with other image "
        f"files; with a changed {file.name} it does not: {ASIDE}"
    )
