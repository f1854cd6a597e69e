"""What a terminal would obey is shown, wherever it comes from."""

from __future__ import annotations

import errno
import io
import os
import sys

import pytest

from mmprune_train.config.explain import user_mistake
from mmprune_train.printed import Printed, harmless, harmless_output
from mmprune_train.storage import secrets
from mmprune_train.storage.secrets import hide, masked


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mred", "a\\x1b[31mred"),
        ("title \x1b]0;x\x07", "title \\x1b]0;x\\x07"),
        ("done\rerror", "done\\rerror"),
        ("\x9b2J", "\\x9b2J"),
        ("ab\u202egnp.exe", "ab\\u202egnp.exe"),
        ("\u2066\u061c\u200f\u2028", "\\u2066\\u061c\\u200f\\u2028"),
        ("\b\x7f\0", "\\x08\\x7f\\x00"),
        ("half \ud800", "half \\ud800"),
        ("tab\tline\n", "tab\tline\n"),
        ("Grüße, 漢字, 👩‍🔬, שלום", "Grüße, 漢字, 👩‍🔬, שלום"),
    ],
)
def test_it_is_written_out(text: str, shown: str) -> None:
    assert harmless(text) == shown
    stream = io.StringIO()
    print(text, end="", file=Printed(stream))
    assert stream.getvalue() == shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_bars_move_on_a_terminal_and_their_titles_do_not() -> None:
    from tqdm import tqdm

    terminal = Terminal()
    for _ in tqdm(range(2), desc="a\x1b[2Jb", file=Printed(terminal), mininterval=0):
        pass
    assert "\ra\\x1b[2Jb: 100%" in terminal.getvalue() and "\x1b[2J" not in terminal.getvalue()
    plain = io.StringIO()
    Printed(plain).write("\rx")
    assert plain.getvalue() == "\\rx"


def test_a_closed_stream_stays_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    with harmless_output():
        print("nobody reads this", flush=True)
        assert sys.stdout is None and sys.stderr is None


@pytest.mark.parametrize(("number", "words"), [(errno.EPIPE, "what read this command"), (errno.ENOSPC, "make room")])
def test_a_stream_that_takes_no_more_is_named(number: int, words: str) -> None:
    class Broken(io.StringIO):
        name = "<stdout>"

        def write(self, text: str) -> int:
            raise OSError(number, os.strerror(number))

        def flush(self) -> None:
            self.write("")

    for use in (lambda: print("a", file=Printed(Broken())), Printed(Broken()).flush):
        with pytest.raises(OSError) as caught:
            use()
        told = user_mistake(caught.value)
        assert told is not None and told.startswith(f"<stdout>: {os.strerror(number)}; {words}")


def test_all_that_is_printed_meanwhile(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_values", type(secrets._values)())
    before = sys.stdout, sys.stderr
    with harmless_output(), harmless_output():
        hide("s3cr3t-printed")
        print("to \x1b[1m stdout s3cr3t-printed")
        print("to \x1b[1m stderr", file=sys.stderr)
    assert (sys.stdout, sys.stderr) == before
    out, err = capsys.readouterr()
    assert (out, err) == ("to \\x1b[1m stdout ***\n", "to \\x1b[1m stderr\n")
    assert masked("s3cr3t-printed") == "***"
