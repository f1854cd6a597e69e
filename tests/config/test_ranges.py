"""Every number of the config has a range, and what no run can use is refused with its key."""

from __future__ import annotations

import copy
import dataclasses
import errno
import math
import os
import re
from collections.abc import Iterator
from typing import Any, get_type_hints

import pytest
from safetensors import SafetensorError

from mmprune_train.config.checks import check
from mmprune_train.config.compose import compose_config, load_pruner
from mmprune_train.config.explain import user_mistake
from mmprune_train.config.ranges import Range, check_values
from mmprune_train.config.schema import Config
from mmprune_train.errors import UserError


@pytest.fixture(scope="module")
def config() -> Config:
    return compose_config(["+experiment=smoke", "logger=[csv,tensorboard,wandb]"])


def numbers(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dataclasses.Field]]:
    """Every field that holds numbers, with the way to it."""
    hints = get_type_hints(type(tree))
    for item in dataclasses.fields(tree):
        value = getattr(tree, item.name)
        inner = value.items() if isinstance(value, dict) else [(None, value)]
        for name, part in inner:
            if dataclasses.is_dataclass(part):
                yield from numbers(part, (*path, item.name, *([name] if name else [])))
        if re.search(r"\b(int|float)\b", str(hints[item.name])):
            yield (*path, item.name), item


def changed(config: Config, path: tuple[str, ...], value: Any) -> Config:
    """A copy with another value; of a list its first."""
    config = copy.deepcopy(config)
    *way, last = path
    holder: Any = config
    for name in way:
        holder = holder[name] if isinstance(holder, dict) else getattr(holder, name)
    old = getattr(holder, last)
    listed = next(item for item in dataclasses.fields(holder) if item.name == last).type.startswith("list")
    setattr(holder, last, [value, *(old or [])[1:]] if listed else value)
    return config


def test_every_number_is_held_to_a_range(config: Config) -> None:
    found = dict(numbers(config))
    assert len(found) > 100 and ("stage", "instruct", "lr") in found and ("encoder", "image_std") in found
    for path, item in found.items():
        allowed = item.metadata.get("range")
        assert isinstance(allowed, Range), f"{'.'.join(path)} has no range"
        senseless = [math.nan, math.inf, -math.inf, allowed.least - 1, allowed.most * 2 + 1]
        senseless += [allowed.most] if allowed.below else []
        for value in senseless:
            with pytest.raises(UserError) as caught:
                check_values(changed(config, path, value))
            assert str(caught.value).startswith(f"{'.'.join(path)}={value} ") and len(str(caught.value)) < 200
        edges = [allowed.least, allowed.most - allowed.below * 0.5]
        for value in edges:
            check_values(changed(config, path, value))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed=-1", "seed=-1 must be at least 0"),
        ("trainer.num_workers=1000000000000", "at most 512: each is a process"),
        ("stage.pretrain.samples_per_image=0", "samples_per_image=0 must be at least 1"),
        ("stage.pretrain.lr=nan", "stage.pretrain.lr=nan is not finite"),
        ("optim.betas=[0.9,1]", "optim.betas=1.0 must be less than 1"),
        ("encoder.image_std=[0,0,0]", "encoder.image_std=0.0 must be at least 0.001"),
        ("encoder.arch.layer_norm_eps=inf", "encoder.arch.layer_norm_eps=inf is not finite"),
        ("llm.arch.rope_parameters.rope_theta=nan", "llm.arch.rope_parameters.rope_theta=nan is not finite"),
        ("pruner.language.layer=[nan]", "pruner.language.layer=nan is not finite"),
        ("run_id=" + "x" * 300, r"run_id=x+\.\.\. names a folder: at most 160 bytes, this has 300"),
        ("evaluate.name='a\tb'", "no control characters"),
        ("data.name=../x", "no slashes"),
        ("peft.r=65", "peft.r=65 is more than the width of llm tiny_llama: adapters have at most 64"),
        ("data.root=" + "x" * 300, "no path is as long"),
        ("init_from='a\0b'", "holds a NUL character"),
        ("llm.path=", "llm.path is empty"),
        ("evaluate.max_new_tokens=5000", "set less than 2012"),
        ("logger.wandb.project=a/b", "logger.wandb.project: 1 to 128 characters"),
    ],
)
def test_values_that_no_run_can_use(override: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        compose_config(["+experiment=smoke", "logger=[csv,wandb]", override])
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 400


def test_a_pruner_alone_is_held_to_its_ranges_too() -> None:
    with pytest.raises(UserError, match="pruner.vision.knee.mass=nan is not finite"):
        load_pruner({"name": "twostage", "vision": {"knee": {"mass": math.nan}}})


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("num_attention_heads", 3, "hidden_size=64 is no multiple of llm.arch.num_attention_heads=3"),
        ("num_key_value_heads", 3, "num_attention_heads=4 is no multiple of llm.arch.num_key_value_heads=3"),
        ("num_attention_heads", 64, "heads of 1 features have no pairs"),
        ("hidden_size", -4, "hidden_size=-4 must be a whole number from 1"),
        ("num_hidden_layers", "two", "num_hidden_layers=two must be a whole number from 1 to 1,000"),
        ("max_position_embeddings", True, "must be a whole number"),
        ("vocab_size", 1.5, "must be a whole number"),
        ("rms_norm_eps", -1.0, "rms_norm_eps=-1.0 must be a number from 0 to 1"),
        ("attention_dropout", 5, "is a probability"),
        ("eos_token_id", [], "llm.arch.eos_token_id=.. is no token"),
        ("max_position_embeddings", 1, "must be a whole number from 8"),
        ("eos_token_id", 512, "llm.arch.eos_token_id=512 is no token"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": "x"}, "rope_theta=x must be a number"),
        ("model_type", 3, "llm.arch.model_type is not set"),
    ],
)
def test_an_arch_that_no_network_can_have(config: Config, field: str, value: Any, words: str) -> None:
    wrong = copy.deepcopy(config)
    wrong.llm.arch[field] = value
    with pytest.raises(UserError, match=words):
        check(wrong)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("logger.wandb.mode=offline", r"logger.wandb is not chosen, .* choose logger=wandb, or logger=\[csv,wandb\]"),
        ("logger.tensorboard.flush_seconds=3", "choose logger=tensorboard"),
        ("encoder.wheel.file=x", "encoder.wheel.file: encoder.wheel is not chosen"),
        ("encoder.wheel={package:a}", "encoder.wheel: encoder.wheel is not chosen"),
        ("+logger.wandb={mode:offline}", "choose logger=wandb"),
    ],
)
def test_keys_of_what_is_not_chosen(override: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        compose_config(["+experiment=smoke", override])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer=null", "trainer=null: give the name of an option"),
        ("~stage=[none,none]", r"~stage=\[none,none\]: give the name of an option"),
        ("encoder=[0.9,0.999]", r"encoder=\[0.9,0.999\]: give the name of an option"),
        ("logger=[csv,1]", r"logger=\[csv,1\]: give the name of an option"),
        ("plan.keep=1" + "0" * 400, r"plan.keep=10+\.\.\.0+: int too large"),
        ("optim.betas=[0.9,1" + "0" * 400 + "]", r"optim.betas=\S+: int too large"),
        ("seed=1" + "0" * 5000, r"seed=10+\.\.\.0+: \w+"),
        ("stages.x=1", "stages.x=1: "),
        ("run_id=" + "[" * 2000, r"run_id=\S+: \w+"),
    ],
)
def test_what_hydra_breaks_at_is_told_with_the_override(override: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        compose_config(["+experiment=smoke", override])
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "override", ["stages=['a\nb\nc\nd']", "knee='a\nb\nc\nd'", "seed='a\nb\nc\nd'", "a\nb\nc\nd=1", "run_id=a\nb\nc\nd"]
)
def test_lines_of_a_value_are_no_lines_of_the_message(override: str) -> None:
    with pytest.raises(UserError) as caught:
        compose_config(["+experiment=smoke", override])
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "override",
    [
        "llm.wheel=${seed}",
        "llm.wheel=${encoder}",
        "report.heat=${seed}",
        "report.heat=[[1]]",
        "stages=[{a:1}]",
        "optim.betas=[[0.1],0.2]",
    ],
)
def test_lists_hold_single_values(override: str) -> None:
    with pytest.raises(UserError, match=override.partition("=")[0]):
        compose_config(["+experiment=smoke", override])


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EACCES, "/x/y: Permission denied; let this user in"),
        (errno.ENOSPC, "make room"),
        (errno.ENOTDIR, "correct the path"),
    ],
)
def test_what_is_wrong_with_a_place_is_told_without_a_traceback(number: int, words: str) -> None:
    told = user_mistake(OSError(number, os.strerror(number), "/x/y"))
    assert told is not None and words in told
    assert user_mistake(OSError(errno.ECHILD, "No child processes", "/x/y")) is None
    assert user_mistake(AssertionError("an invariant of ours")) is None


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError(f"Error while serializing: I/O error: {os.strerror(errno.ENOSPC)} (os error 28)"),
    ],
)
def test_a_full_disk_that_no_file_is_named_of_is_told_without_a_traceback(error: Exception) -> None:
    told = user_mistake(error)
    assert told is not None and "No space left on device" in told and "make room" in told


def test_long_words_of_a_message_are_shortened() -> None:
    told = user_mistake(UserError(f"knee={'x' * 5000}: there is no such option"))
    assert told is not None and len(told) < 300 and told.endswith(": there is no such option")
