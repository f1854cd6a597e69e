"""Words and paths as they are typed reach the config as they are."""

from __future__ import annotations

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from mmprune_train.config.compose import compose_config
from mmprune_train.config.typed import quoted, readable
from mmprune_train.errors import UserError

AWKWARD = st.text(alphabet="ab \\'\"${}[](),:=#%!?\n\t.-é漢~@&|<>*", max_size=12)


def through_hydra(argument: str) -> object:
    """What OmegaConf holds in the end."""
    value = OverridesParser.create().parse_override(argument).value()
    return OmegaConf.to_container(OmegaConf.create({"value": value}), resolve=True)["value"]


@given(AWKWARD)
@example("\\${a}")
@example("ends in a backslash\\")
def test_quoted_text_is_read_as_it_is(text: str) -> None:
    assert through_hydra(f"key={quoted(text)}") == text


@given(AWKWARD.filter(lambda text: text[:1] not in ("'", '"')))
@example("What's in the image, a (red) shape?")
@example(" {a: 1}, [b], c=d # ${seed} 100 %")
@example("<image>\nand <image>:\nthe same?")
def test_a_question_is_the_rest_of_the_argument(text: str) -> None:
    (argument,) = readable([f"generate.question={text}"])
    assert through_hydra(argument) == text
    assert readable([argument]) == [argument], "a process that is started again reads the same"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("'a, b'", "a, b"),
        ('"it\'s"', "it's"),
        ("'What' is 'this'?", "'What' is 'this'?"),
        ("'tis red?", "'tis red?"),
        ("null", "null"),
        ("3", "3"),
    ],
)
def test_quotes_around_all_of_a_question_are_not_part_of_it(value: str, text: str) -> None:
    assert compose_config([f"generate.question={value}"]).generate.question == text


@pytest.mark.parametrize(
    ("value", "files"),
    [
        ("[a b.png]", ["a b.png"]),
        ("[a (1).png,it's.png]", ["a (1).png", "it's.png"]),
        ("['a, b.png', c (1).png]", ["a, b.png", "c (1).png"]),
        ("[a[1].png, {b}=c.png]", ["a[1].png", "{b}=c.png"]),
        ("photo.png", ["photo.png"]),
        ("it's #1 (copy).png", ["it's #1 (copy).png"]),
        ("'a, b.png'", ["a, b.png"]),
        ("[]", []),
        ("[07]", ["07"]),
    ],
)
def test_files_with_any_name(value: str, files: list[str]) -> None:
    assert compose_config([f"generate.images={value}"]).generate.images == files


def test_paths_that_hydra_cannot_read_are_quoted_and_the_others_left() -> None:
    awkward = ["ckpt=runs/seed=1 (old)/x", "data.root=it's", "+data.evaluate.annotations=a,(b).json"]
    config = compose_config([argument.lstrip("+") for argument in awkward])
    assert config.ckpt == "runs/seed=1 (old)/x" and config.data.root == "it's"
    assert config.data.evaluate.annotations == "a,(b).json"
    same = ["-m", "knee=kneedle,otsu", "ckpt=a,b", "seed=range(1,3)", "stages=[instruct]", "--cfg", "data.root=null"]
    assert readable(same) == same


def test_an_error_says_how_to_quote() -> None:
    with pytest.raises(UserError, match="not readable as KEY=VALUE") as caught:
        compose_config(["experiment_name=it's (1)"])
    how = str(caught.value).rsplit(": ", 1)[1]
    assert how == """'experiment_name="it'"'"'s (1)"'"""
    with pytest.raises(UserError, match=r"a comma of a text as 'KEY=\"a,b\"', or add -m"):
        compose_config(["knee=kneedle,otsu"])
