"""The commands of the guides are commands: every `mmprune` line of their bash blocks composes and passes the checks."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from mmprune_train.config.compose import compose_config

GUIDES = sorted((Path(__file__).parents[2] / "docs" / "guides").glob("*.md"))
STAND_IN = 'mmprune() { printf "%s\\x1f" "$@"; echo; }'
"""Prints its arguments in place of running."""


def commands(page: Path) -> list[list[str]]:
    """The arguments of each `mmprune` command of a page, as a shell reads them."""
    blocks = re.findall(r"```(?:bash)?\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    kept = []
    for block in blocks:
        lines = re.sub(r"^srun .*python -m mmprune_train", "mmprune", block, flags=re.MULTILINE)
        kept += [line for line in lines.replace("\\\n", " ").splitlines() if re.match(r"(mmprune|\w+=)", line)]
    done = subprocess.run(["bash", "-c", "\n".join([STAND_IN, *kept])], capture_output=True, text=True, check=True)
    return [line.split("\x1f")[:-1] for line in done.stdout.splitlines()]


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_every_command_of_a_guide_composes(page: Path) -> None:
    found = commands(page)
    assert len(found) >= 3, "no commands found: has the page's layout changed?"
    for arguments in found:
        compose_config([argument for argument in arguments if argument != "-m" and not argument.startswith("hydra/")])
