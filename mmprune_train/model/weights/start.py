"""What training starts from when it is not base weights: recognised by what lies there, and compared with the chosen
encoder, LLM and projector before anything is built."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from mmprune_train.config.schema import Config
from mmprune_train.errors import UserError
from mmprune_train.model.tokenizer import load_tokenizer
from mmprune_train.model.weights.adapters import adapter_tensors, check_adapters, differs, projector_beside
from mmprune_train.model.weights.base import base_of, check_base
from mmprune_train.model.weights.files import tensors_of, weights_of
from mmprune_train.model.weights.fit import check_fit, chosen_config
from mmprune_train.model.weights.folders import (
    ADAPTERS,
    KEYS_OF,
    LANGUAGE,
    LLAVA,
    NOUNS,
    ORIGINAL,
    PROJECTOR,
    PROJECTOR_BIN,
    Folder,
    check_whole,
    is_hub_id,
    look,
    model_folder,
    unfit,
)
from mmprune_train.model.weights.original import tower_tensors
from mmprune_train.model.weights.places import base_folder, local_or_hub

SOURCES = (
    "a llava-hf folder, a run directory, an exported folder, a stage's adapters/, an original LLaVA checkpoint or a "
    "mm_projector.bin"
)


@dataclass(frozen=True)
class Start:
    """A source of weights."""

    kind: str
    """LLAVA, ORIGINAL, ADAPTERS or PROJECTOR of `folders`."""
    path: Path
    """Its folder; of a projector its file."""
    key: str
    """What gave it, for messages: `init_from` or `stage.NAME.init_from`."""
    base: Start | None = None
    """Of adapters: the model they belong to; None: the chosen encoder and LLM."""
    tower: bool = True
    """Whether the vision tower is inside."""
    projector: bool = True
    """Whether a projector is inside."""
    goes_on: bool = False
    """Of adapters: they are trained further, not merged into the weights."""
    own: bool = False
    """It is what an earlier stage of this very run has left."""

    @property
    def whole(self) -> Start | None:
        """The whole model that this is, or belongs to; None: the chosen encoder and LLM."""
        return self if self.kind in (LLAVA, ORIGINAL) else self.base and self.base.whole

    @property
    def needs(self) -> tuple[str, ...]:
        """Which of the chosen `encoder` and `llm` have to be there, too."""
        if self.kind == ADAPTERS:
            return ("encoder", "llm") if self.base is None else self.base.needs
        if self.kind == PROJECTOR:
            return ("encoder", "llm")
        return () if self.tower else ("encoder",)

    @property
    def new_projector(self) -> bool:
        """Whether the projector begins anew."""
        return not self.projector and (self.base is None or self.base.new_projector)

    @property
    def tokenizer(self) -> Path | None:
        """The folder of the tokenizer; None: that of the chosen LLM."""
        return None if self.whole is None else self.whole.path

    @property
    def adapted(self) -> str | None:
        """What adapters that are trained from here belong to, as PEFT's adapter_config.json names it and `locate` finds
        it again; None: the chosen encoder and LLM."""
        if self.kind == PROJECTOR:
            return None
        if self.goes_on:
            return None if self.base is None else str(self.base.path)
        return str(self.path)

    def words(self) -> str:
        """What is started from, for the terminal."""
        if self.own:
            return str(self.path)
        more = ""
        if self.kind == ADAPTERS:
            more = f", {'trained further' if self.goes_on else 'merged'}, on "
            more += self.base.words() if self.base else "the chosen encoder and LLM"
        if self.kind == PROJECTOR:
            more = ", beside the chosen encoder and LLM"
        if self.new_projector:
            more += " and a new projector"
        noun = "adapters" if self.kind == ADAPTERS else NOUNS[self.kind]
        return f"{self.path} ({noun}{more})"


def asked_start(config: Config, stage: str) -> tuple[str, str] | None:
    """(key, path) of the weights that a stage is told to start from by its own key; None: it is told nothing."""
    path = config.stage[stage].init_from
    return (f"stage.{stage}.init_from", path) if path is not None else None


def first_start(config: Config, stage: str) -> tuple[str, str] | None:
    """The same of a stage with none trained before it, which `init_from` is for."""
    return asked_start(config, stage) or (None if config.init_from is None else ("init_from", config.init_from))


def find_start(config: Config, key: str, path: str, stage: str, download: bool = True) -> Start:
    """What lies at the `path` that `key` gave, whole and fitting the chosen encoder, LLM and projector, for a stage.
    Raises UserError where it is damaged, does not fit or is nothing to start from; NotHere for a hub id that is not
    here and could not be fetched, or (without `download`) was not to be."""
    start = locate(key, path, download)
    if start.kind == ADAPTERS:
        start = replace(start, goes_on=_goes_on(config, start, stage))
    _check(config, start)
    return start


def locate(key: str, path: str, download: bool = True) -> Start:
    """What lies at `path`, not yet compared with anything; as `find_start`, without how adapters are taken up."""
    place = Path(path).expanduser()
    if place.is_file():
        return Start(PROJECTOR, place.resolve(), key)
    if not place.is_dir():
        if not is_hub_id(path):
            raise UserError(f"{key}: there is no {path}; give {SOURCES}")
        place = local_or_hub(key, path, download)
    found = look(key, Path(model_folder(place, key)))
    folder = found.path.resolve()
    if found.kind == LLAVA:
        return Start(LLAVA, folder, key)
    if found.kind == ORIGINAL:
        return Start(ORIGINAL, folder, key, tower=bool(tower_tensors(weights_of(key, folder))))
    if found.kind == ADAPTERS:
        return Start(ADAPTERS, folder, key, _base(key, found, download), projector=bool(projector_beside(key, folder)))
    if found.kind == PROJECTOR:
        return Start(PROJECTOR, folder / PROJECTOR_BIN, key)
    hint = f"; give it as {KEYS_OF[found.kind]}" if found.kind in KEYS_OF else ""
    raise UserError(f"{key}: {place} holds {unfit(found)}, where {SOURCES} is wanted{hint}")


def _base(key: str, found: Folder, download: bool) -> Start | None:
    """The model that adapters belong to, where their config names one that is more than an LLM."""
    named = found.config.get("base_model_name_or_path")
    if not named:
        return None
    place = Path(named).expanduser()
    if not place.is_dir():
        own = found.path.resolve()
        moved = (own.parents[1] / Path(*place.parts[-2:]), own.parent / place.name)  # RUN/STAGE/model, or beside them
        place = next((folder for folder in moved if folder.is_dir() and folder != own), place)
    if not place.is_dir():
        if not is_hub_id(named):
            raise UserError(
                f"{key}: the adapters in {found.path} belong to {named}, which is not here: put it beside them, or "
                f"correct base_model_name_or_path in its adapter_config.json (null: the chosen encoder= and llm=)"
            )
        if "llava" not in named.lower():
            return None  # a plain LLM by its hub id, which llm= is
        place = local_or_hub(key, named, download)
    if look(key, place).kind == LANGUAGE:
        return None
    return locate(key, str(place), download)


def _goes_on(config: Config, start: Start, stage: str) -> bool:
    """Whether a stage trains these adapters further; UserError where it is told to and cannot."""
    how, settings = config.init_adapters, config.stage[stage]
    adapts = settings.use_peft and settings.train_llm and config.peft.name != "none"
    if how == "merge":
        return False
    check_adapters(start.key, start.path)
    if adapts:
        wrong = differs(start.key, start.path, config.peft, chosen_config(config.llm))
    else:
        wrong = [f"stage.{stage} trains no adapters"]
    if wrong and how == "continue":
        raise UserError(
            f"init_adapters=continue: the adapters in {start.path} cannot be trained further with "
            f"{'; '.join(wrong)}; set these as there, or init_adapters=merge"
        )
    return not wrong


def _check(config: Config, start: Start) -> None:
    """Raise UserError where a source is not whole, or does not fit what is chosen."""
    if start.kind in (LLAVA, ORIGINAL):
        found = look(start.key, start.path)
        tensors = check_whole(start.key, found)
        load_tokenizer(start.path, start.key)
        check_fit(config, start.key, found, tensors)
    elif start.kind == PROJECTOR:
        check_fit(config, start.key, Folder(start.path, PROJECTOR, {}), tensors_of(start.key, start.path))
    else:
        check_adapters(start.key, start.path)
        check_fit(config, start.key, Folder(start.path, ADAPTERS, {}), adapter_tensors(start.key, start.path))
        if start.base is not None:
            _check(config, start.base)
        if recorded := base_of(start.key, start.path):
            check_base(start.key, start.path, recorded, base_parts(config, start))


def base_parts(config: Config, adapters: Start) -> dict[str, Path | None]:
    """Folders of what adapters belong to, as `check_base` takes them."""
    if adapters.base is not None:
        return {"model": adapters.base.path}
    return {"encoder": base_folder(config.encoder), "llm": base_folder(config.llm)}
