"""Commands that go through batches of pairs, stopped by a real Ctrl-C after some of them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from pellucid.attribution.streaming import PairStream
from tests.cli.test_cli import cli, one_line


def ctrl_c_after(*batches: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Send SIGINT when so many batches have run in all; the list that is returned grows by a pass' name for each."""
    done: list[str] = []
    plain = PairStream._after_batch

    def after_batch(self: PairStream) -> None:
        done.append(self.what)
        if len(done) in batches:
            os.kill(os.getpid(), signal.SIGINT)
        plain(self)

    monkeypatch.setattr(PairStream, "_after_batch", after_batch)
    return done


def interrupted(*words: object, out: Path) -> None:
    """Run a command that is to be interrupted, and see that it says what it keeps, and keeps no more."""
    broken = cli(*words, "--out", out)
    assert broken.exit_code == 130
    assert f"is in {out / 'unfinished'}: the same command goes on from there" in one_line(broken.stderr)
    assert [path.name for path in out.iterdir()] == ["unfinished"]
