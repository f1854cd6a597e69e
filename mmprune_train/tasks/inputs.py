"""What a run needs that has to be there before it starts: looked for all at once, and told in one list."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

from mmprune_train.config.identity import run_dir
from mmprune_train.config.schema import Config
from mmprune_train.data import sources
from mmprune_train.errors import NotHere, UserError
from mmprune_train.storage.assets import cache_dir, say
from mmprune_train.storage.atomic import delete_leftovers
from mmprune_train.training.rundir import RunDirectory

Found = dict[str, Path | None]
Get = Callable[[bool], "Path | None"]
"""Whether to fetch -> where something lies; None: it is random."""


class Search:
    """Looks for one thing after the other, and keeps what is wrong until all has been looked for."""

    def __init__(self) -> None:
        self.found: Found = {}
        self.faults: list[str] = []
        self.away: dict[str, Get] = {}
        """What is not here and may be fetched."""
        self._told: dict[str, str] = {}

    def look(self, what: str, get: Get) -> None:
        """Take what is on this machine."""
        try:
            self.found[what] = get(False)
        except NotHere as error:
            self.away[what], self._told[what] = get, str(error)
        except UserError as error:
            self._note(error)

    def fetch(self) -> None:
        """Get what is not here."""
        for what, get in self.away.items():
            try:
                self.found[what] = get(True)
            except UserError as error:
                self._note(error)
        self.away = {}

    def _note(self, error: UserError) -> None:
        if str(error) not in self.faults:
            self.faults.append(str(error))

    def end(self) -> None:
        """Raise UserError where something is wrong: its line, or a list of all lines."""
        lines = [*self.faults, *(self._told[what] for what in self.away)]
        if len(lines) == 1:
            raise UserError(lines[0])
        if lines:
            listed = "\n".join(f"  {number}. {line}" for number, line in enumerate(lines, 1))
            raise UserError(f"{len(lines)} things that this run needs are missing or wrong:\n{listed}")


def find_inputs(config: Config, todo: Sequence[str], splits: Sequence[str], trains: bool = True) -> Found:
    """Data and weights of a run, fetched where they can be, by their keys.

    Args:
        todo: stages that are to be trained.
        splits: parts of the data that are read.
        trains: this process is about to train: what it needs beside is looked for, too, and nothing is fetched for a
            run that lacks something. False: everything that can be is fetched first.
    Raises:
        UserError: something is missing or wrong; where several things are, a list of all.
    """
    for kind in ("data", "files", "models"):
        delete_leftovers(cache_dir() / kind)
    search = Search()
    _look_for_data(search, config, splits)
    _look_for_weights(search, config, todo)
    machine = machine_faults(config, todo)
    if trains:
        search.faults += machine
    unknown = any(what.endswith("init_from") for what in search.away)  # and so is what it needs beside
    if not (trains and search.faults):
        search.fetch()
        if unknown and not search.faults:
            return find_inputs(config, todo, splits, trains)
    if not trains and search.faults:
        search.faults += machine
    search.end()
    for name, part in (("encoder", config.encoder), ("llm", config.llm)):
        if search.found.get(name, part) is None:
            say(f"{name}={part.name}: random initialisation")
    return search.found


def _look_for_data(search: Search, config: Config, splits: Sequence[str]) -> None:
    @cache
    def problem() -> UserError | None:
        """Of fetching a built-in data set, which all splits are of."""
        try:
            sources.prepare_data(config.data)
        except UserError as error:
            return error
        return None

    def get(split: str, fetch: bool) -> Path:
        if config.data.source is not None:
            if not (fetch or sources.data_root(config.data).is_dir()):
                raise NotHere(f"data.{split}: {config.data.name} is not here yet; run `task=prepare`")
            if (error := problem()) is not None:
                raise error
        return sources.split_files(config.data, split)[0]

    for split in splits:
        search.look(f"data.{split}", partial(get, split))


def _look_for_weights(search: Search, config: Config, todo: Sequence[str]) -> None:
    from mmprune_train.model.tokenizer import load_tokenizer
    from mmprune_train.model.weights.folders import ADAPTERS
    from mmprune_train.model.weights.places import base_folder
    from mmprune_train.model.weights.start import Start, first_start
    from mmprune_train.training.starts import begins_anew, parts_of, start_of

    directory = None if config.restart else RunDirectory(run_dir(config), writable=False)
    parts: set[str] = set()
    kinds: list[str | None] = []

    def get_start(stage: str, fetch: bool) -> Path | None:
        start: Start | None = start_of(config, directory, stage, fetch)
        parts.update(parts_of(config, start))
        kinds.append(start.kind if start else None)
        return start.path if start else None

    anew = [stage for stage in todo if begins_anew(config, todo, stage)]
    for stage in anew:
        asked = first_start(config, stage)
        search.look(asked[0] if asked else f"start of {stage}", partial(get_start, stage))
        search.found.pop(f"start of {stage}", None)
    all_known = list(todo) == config.stages and len(kinds) == len(anew)  # else a source may be one that is done with
    if config.init_adapters != "auto" and all_known and ADAPTERS not in kinds:
        search.faults.append(
            f"init_adapters={config.init_adapters}: nothing that training starts from is an adapter folder; leave the "
            "key out, or give one as init_from="
        )
    text = config.encoder.text

    def get_llm(fetch: bool) -> Path | None:
        folder = base_folder(config.llm, fetch)
        load_tokenizer(folder)
        return folder

    base: dict[str, tuple[str, Get]] = {
        "encoder": ("encoder", lambda fetch: _fitting_tower(config, fetch)),
        "llm": ("llm", get_llm),
        "text": ("encoder.text", lambda fetch: None if text is None else base_folder(text, fetch)),
    }
    for part, (what, get) in base.items():
        if part in parts:
            search.look(what, get)


def _fitting_tower(config: Config, fetch: bool) -> Path | None:
    """The encoder's folder; UserError also where its keys describe another one."""
    import torch

    from mmprune_train.model.assemble import vision_tower
    from mmprune_train.model.weights.places import base_folder

    folder = base_folder(config.encoder, fetch)
    with torch.device("meta"):
        vision_tower(config.encoder, folder, torch.float32, empty=True)
    return folder


def machine_faults(config: Config, todo: Sequence[str]) -> list[str]:
    """What this machine lacks for training these stages: devices, and libraries of the strategy and the adapters."""
    from importlib.util import find_spec

    import torch

    from mmprune_train.model.quantize import check_quantization
    from mmprune_train.training.loggers import logger_faults
    from mmprune_train.training.precision import choose_accelerator

    faults: list[str] = []
    if not todo:
        return faults
    try:
        accelerator = choose_accelerator(config.trainer.accelerator)
        wanted, there = config.trainer.devices, torch.cuda.device_count()
        if accelerator == "cuda" and wanted > there:
            faults.append(
                f"trainer.devices={wanted}: this machine has {there} CUDA device(s); set trainer.devices={there}"
            )
        most = max(8, 4 * (os.cpu_count() or 1))
        processes = {"trainer.num_workers": config.trainer.num_workers}  # a process takes seconds to start
        if accelerator == "cpu":
            processes["trainer.devices"] = wanted
        for key, number in processes.items():
            if number > most:
                faults.append(f"{key}={number}: too many processes for this machine's cores; set {most} or less")
        if config.peft.name == "qlora" and any(config.stage[name].use_peft for name in todo):
            check_quantization(accelerator)
    except UserError as error:
        faults.append(str(error))
    faults += logger_faults(config.logger)
    names = {config.stage[name].strategy or config.strategy.name for name in todo}
    deep = sorted(name for name in names if name.startswith("deepspeed"))
    if deep and find_spec("deepspeed") is None:
        faults.append(f"strategy={deep[0]}: deepspeed is not installed; pip install deepspeed, or strategy=fsdp2")
    return faults
