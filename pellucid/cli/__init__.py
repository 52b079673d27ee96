"""The command line: ``pellucid``, or ``python -m pellucid``.

Results go to standard output, bars and messages to standard error. Exit codes: 0 done; 1 a check does not hold; 2 the
command cannot be carried out as it was given, with the reason; 130 interrupted.
"""

from __future__ import annotations

import io
import sys


def main() -> None:
    """Run the command line of this process."""
    from pellucid.cli.app import app
    from pellucid.cli.mistakes import tell_traceback

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a pipe may not know every character
    try:
        app(prog_name="pellucid")
    except Exception:
        tell_traceback()
        sys.exit(1)
