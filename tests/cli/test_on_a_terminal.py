"""What a person at a terminal sees of the commands: bars, help, and what an interrupt leaves."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

pty = pytest.importorskip("pty", reason="pseudo-terminals are POSIX")
fcntl = pytest.importorskip("fcntl")
termios = pytest.importorskip("termios")

ROOT = Path(__file__).parents[2]


def on_a_terminal(*arguments: str, **environment: str) -> str:
    """What a command writes to standard error, where that is a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))  # a new one has no columns
    with subprocess.Popen(
        [sys.executable, "-m", "pellucid", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "80", "TERM": "xterm", **environment},
    ) as running:
        os.close(theirs)
        seen = b""
        while True:
            try:
                chunk = os.read(ours, 65536)
            except OSError:  # Linux says so when the other side is closed
                break
            if not chunk:
                break
            seen += chunk
        os.close(ours)
        assert running.wait() == 0, seen.decode()
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
    seen = on_a_terminal(*arguments)
    assert bar in seen, seen
    assert "Loading weights" not in seen


def test_the_hubs_switch_turns_the_bars_off() -> None:
    assert on_a_terminal("check", "demo", "--layers", "0", HF_HUB_DISABLE_PROGRESS_BARS="1") == ""
