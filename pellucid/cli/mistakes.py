"""Errors as the person at the keyboard sees them: what is wrong and what to do, on standard error, and exit code 2.

Only errors that say something to a user are caught (Pellucid's own, and the operating system's: no such file, no network,
disk full). Anything else is a fault of ours and keeps its traceback.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import typer
from rich.text import Text
from typer.core import TyperGroup

from pellucid.cli.files import kept_of_nothing
from pellucid.cli.terminal import messages, visible_logs
from pellucid.errors import PellucidError
from pellucid.tables import visible

UsageMistake: Any = typer.BadParameter.__mro__[2]
"""What every mistake of a command line is to its parser. typer exports its children only, and has moved it."""

READER_GONE = 141
"""The exit code of a program that a closed pipe ends, so that ``| head`` is not taken for a check that failed."""


INTERRUPTED = 130
"""The exit code of a program that Ctrl-C ends."""


@contextmanager
def report_errors(debug: bool, kept: Callable[[], str] = kept_of_nothing) -> Iterator[None]:
    """Print errors and warnings raised inside as messages; with ``debug``, errors after their traceback.

    Args:
        debug: show tracebacks.
        kept: says, after an interrupt, what of the work was kept and how to go on.
    """
    with warnings.catch_warnings(), visible_logs():
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
                tell_traceback()
            _say("error", "bold red", str(error) or type(error).__name__)
            raise typer.Exit(2) from None


def note(message: str) -> None:
    """Say something that is worth knowing and no mistake."""
    _say("note", "cyan", message)


def _say(word: str, style: str, message: str) -> None:
    messages().print(Text.assemble((f"{word}: ", style), visible(message)))


def tell_traceback() -> None:
    """Print the traceback of the exception that is being handled: its message may quote what it was given."""
    sys.stderr.write(visible(traceback.format_exc()))


class Commands(TyperGroup):
    """The commands. What their parser says of a mistake quotes what was typed."""

    def make_context(self, *arguments: Any, **keywords: Any) -> Any:
        """Read the options before the command."""
        with _quoted_visibly():
            return super().make_context(*arguments, **keywords)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command, its name and its arguments; an option that is given nothing is refused.

        An empty path would mean the folder one is in, and an empty word the default.
        """
        try:
            name, command, left = super().resolve_command(ctx, args)
        except UsageMistake as mistake:
            mistake.message += f" The commands are {', '.join(self.commands)}."
            raise
        assert command is not None  # an unknown name was refused
        of_values = {word for option in command.params if not getattr(option, "is_flag", True) for word in option.opts}
        for given, value in zip(left, [*left[1:], None], strict=False):
            option, equals, beside = given.partition("=")
            if option in of_values and (beside if equals else value) == "":
                raise typer.BadParameter(f"{option} is empty: give it a value, or leave it out.")
        return name, command, left

    def invoke(self, ctx: Any) -> Any:
        """Read the command's own arguments and run it."""
        with _quoted_visibly():
            return super().invoke(ctx)


@contextmanager
def _quoted_visibly() -> Iterator[None]:
    try:
        yield
    except UsageMistake as mistake:
        mistake.message = visible(mistake.message)
        raise


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
