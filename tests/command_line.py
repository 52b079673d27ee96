"""The command line in this process: its commands are made once, where typer's own runner makes them for every call."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

from typer.main import get_command
from typer.testing import CliRunner

from pellucid.cli.app import app

GROUP: Any = get_command(app)
"""All commands, as they are parsed: 40 ms to make, for a call that is refused in one."""


def invoke(*arguments: str | Path, **settings: Any) -> Any:
    """What ``pellucid arguments`` ends with; ``settings`` are those of ``CliRunner.invoke``."""
    with mock.patch("typer.testing._get_command", return_value=GROUP):
        return CliRunner().invoke(app, [str(argument) for argument in arguments], **settings)
