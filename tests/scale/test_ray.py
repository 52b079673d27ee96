"""Ray: the same bytes as one process, and a worker that is killed on the way. Skipped where Ray is not installed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests import forked
from tests.scale.jobs import contents
from tests.scale.test_processes import ROOT, cli, text, words

pytest.importorskip("ray", reason="the extra `distributed` is not installed")
__all__ = ["text"]

APART = "import os; os.setsid()"
"""Of the job: its tasks are those of its session, which nobody else's are."""


def tasks_of(session: int) -> list[int]:
    """Processes of a session that are running a Ray task."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command, stat = (folder / "cmdline").read_bytes(), (folder / "stat").read_text()
        except OSError:  # it has ended
            continue
        if command.startswith(b"ray::_make") and int(stat.rpartition(")")[2].split()[3]) == session:
            found.append(int(folder.name))
    return found


def test_a_killed_ray_worker_costs_its_shard_only(text: dict[str, Path], tmp_path: Path) -> None:
    alone = cli(*words(text, tmp_path / "alone"))
    assert alone.exit_code == 0, alone.stderr
    with open(tmp_path / "output", "w+b") as output, open(os.devnull) as nothing:
        streams = nothing.fileno(), output.fileno(), output.fileno()
        command = ["-m", "pellucid", *words(text, tmp_path / "ray"), "--ray", "2"]
        job = forked.start(command, streams, env={**os.environ, "PYTHONPATH": str(ROOT)}, before=APART)
        killed = 0
        while job.exitcode is None and not killed:
            if len(list((tmp_path / "ray").glob("?????.json"))) >= 2:
                assert job.pid is not None
                for task in tasks_of(job.pid)[:1]:
                    os.kill(task, signal.SIGKILL)
                    killed += 1
            time.sleep(0.01)
        job.join()
        assert job.exitcode == 0, (tmp_path / "output").read_text("utf-8")
    assert killed == 1
    assert contents(tmp_path / "ray") == contents(tmp_path / "alone")
