"""What a person at a terminal sees of the commands: bars, help, and what an interrupt leaves."""

from __future__ import annotations

import os
import re
import shlex
import struct

import pytest

from tests import forked
from tests.command_line import GROUP, invoke

pty = pytest.importorskip("pty", reason="pseudo-terminals are POSIX")
fcntl = pytest.importorskip("fcntl")
termios = pytest.importorskip("termios")


def new_terminal() -> tuple[int, int]:
    """Both sides of one of 80 columns: a new one has none, and no bar is drawn there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    return ours, theirs


def on_a_terminal(*arguments: str, until: str | None = None, before: str = "") -> str:
    """What a command writes to standard error, where that is a terminal; up to ``until``, after which it is ended."""
    ours, theirs = new_terminal()
    environment = {**os.environ, "COLUMNS": "80", "TERM": "xterm"}
    with open(os.devnull, "r+") as nothing:
        streams = nothing.fileno(), nothing.fileno(), theirs
        running = forked.start(["-m", "pellucid", *arguments], streams, env=environment, before=before)
    os.close(theirs)
    seen = read_terminal(ours, until)
    if until is not None:
        running.kill()
    running.join()
    assert running.exitcode == 0 or until is not None, seen
    return seen


def read_terminal(ours: int, until: str | None = None) -> str:
    """What comes from the other side of a terminal up to its end, or up to ``until``."""
    seen = b""
    while until is None or until.encode() not in seen:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # Linux says so when the other side is closed
            break
        if not chunk:
            break
        seen += chunk
    os.close(ours)
    return seen.decode(errors="replace")


BARS = {
    "check": (("check", "demo", "--layers", "0"), "check:"),
    "demo": (("demo",), "demo: ablating:"),
    "patch": (("patch",), "sweep:"),
}
"""A command on the embedded model that takes a while, and how its bar begins."""


@pytest.mark.parametrize("command", BARS)
def test_a_bar_shows_on_the_embedded_model(command: str) -> None:
    arguments, bar = BARS[command]
    seen = on_a_terminal(*arguments, until=bar)
    assert bar in seen, seen
    assert "Loading weights" not in seen


READ_AGAIN = """
import importlib, sys
for name in ("huggingface_hub.constants", "huggingface_hub.utils.tqdm", "transformers.utils.logging"):
    importlib.reload(sys.modules[name])
"""
"""The switch is read where these are imported, which has been done."""


def test_the_hubs_switch_turns_the_bars_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    assert on_a_terminal("check", "demo", "--layers", "0", before=READ_AGAIN) == ""


# -- help --------------------------------------------------------------------------------------------------------------

COMMANDS = (None, *sorted(GROUP.commands))


def helped(command: str | None) -> str:
    done = invoke(*([command] if command else []), "--help", env={"COLUMNS": "80"}, terminal_width=80)
    assert done.exit_code == 0
    return done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_breaks_no_word_at_80_columns(command: str | None) -> None:
    found = GROUP if command is None else GROUP.commands[command]
    text = helped(command)
    assert max(map(len, text.splitlines())) <= 80
    words = set(text.split())
    for parameter in found.params:
        for word in (parameter.help or "").split():
            assert word in words, f"{parameter.name}: {word!r} is broken"
    assert not [values for values in re.findall(r"<[^>]*>", text) if "\n" in values], "choices are broken"
    for word in " ".join((found.help or "").split("\b")).split():
        assert word in words, f"{word!r} is broken"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_an_example_that_can_be_typed(command: str | None) -> None:
    text = helped(command)
    assert text.count("  Example:\n") == 1
    typed = shlex.split(text.split("  Example:\n")[1].replace("\\\n", " "))
    assert typed[:2] == ["pellucid", command or "demo"]
    found = GROUP.commands[typed[1]]
    found.make_context(typed[1], typed[2:])  # parses, with every option and every value of it


def test_the_list_of_commands_cuts_no_sentence() -> None:
    listed = helped(None).split("Commands:")[1]
    assert "..." not in listed
