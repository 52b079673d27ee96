"""Errors as the person at the keyboard sees them: what is wrong and what to do, on standard error, and exit code 2.

Only errors that say something to a user are caught (Pellucid's own, and the operating system's: no such file, no network,
disk full). Anything else is a fault of ours and keeps its traceback.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import typer
from rich.console import Console
from rich.text import Text

from pellucid.cli.files import kept_of_nothing
from pellucid.errors import PellucidError

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Terminal sequences begin with these (C0, DEL, C1); the last two ranges turn the direction of what follows."""

READER_GONE = 141
"""The exit code of a program that a closed pipe ends, so that ``| head`` is not taken for a check that failed."""


INTERRUPTED = 130
"""The exit code of a program that Ctrl-C ends."""


@contextmanager
def told_to_a_person(debug: bool, kept: Callable[[], str] = kept_of_nothing) -> Iterator[None]:
    """Print errors and warnings raised inside as messages; with ``debug``, errors after their traceback.

    Args:
        debug: show tracebacks.
        kept: says, after an interrupt, what of the work was kept and how to go on.
    """
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            yield
        except KeyboardInterrupt:
            _say("interrupted", "bold red", kept())
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
            raise typer.Exit(READER_GONE) from None
        except (PellucidError, OSError) as error:
            if debug:
                traceback.print_exc()
            _say("error", "bold red", str(error) or type(error).__name__)
            raise typer.Exit(2) from None


def note(message: str) -> None:
    """Say something that is worth knowing and no mistake."""
    _say("note", "cyan", message)


def _say(word: str, style: str, message: str) -> None:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(Text.assemble((f"{word}: ", style), visible(message)))


def visible(message: str) -> str:
    """Control characters as their escapes, line breaks and tabs apart: a message may quote what it was given.

    A file name or an argument with terminal sequences in it would otherwise colour, move or erase what the person reads.
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), message)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
    **_: Any,
) -> None:
    _say("warning", "yellow", str(message))


def say_note(message: str) -> None:
    """Something the person should know, on standard error."""
    _say("note", "yellow", message)
