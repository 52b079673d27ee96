"""What reaches a terminal: no character that it would obey, but those that give our own words their style.

Arguments, file names, corpora, checkpoints and what a model writes are text from outside. A terminal sequence in it would
colour, move, erase or rename what the person reads; an override of direction shows another name than the one that is
there. Whatever a command prints goes through one of these consoles, or, where somebody else prints it (the command
line's parser, a library's log, a traceback), through ``visible`` of :mod:`pellucid.tables`. JSON writes them as escapes.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from pellucid.cli.options import Format
from pellucid.tables import CONTROL, visible

PIPE_WIDTH = 240
"""Columns where nobody's window says how many: wide enough that no row is broken."""


class SafeConsole(Console):
    """A console that shows control characters, and whose reader may go away.

    That is raised, not turned into exit code 1, which says that a check failed.
    """

    def render_str(self, text: str, **keywords: Any) -> Text:
        """A string as text: what is printed, a cell, a heading."""
        return super().render_str(visible(text), **keywords)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Whatever is shown, on its own or in a table's cell; text that was made with a style too."""
        return super().render(_visible_text(renderable) if isinstance(renderable, Text) else renderable, options)

    def on_broken_pipe(self) -> None:
        """Nobody reads on."""
        raise BrokenPipeError


def _visible_text(text: Text) -> Text:
    found = list(CONTROL.finditer(text.plain))
    if not found:
        return text
    parts = text.divide(sorted({place for match in found for place in match.span()}))
    whole = text.blank_copy()
    for part in parts:
        shown = visible(part.plain)
        whole.append_text(part if shown == part.plain else Text(shown, part.style))
    return whole


def results(format: Format) -> SafeConsole:
    """Where tables go. Nothing is read as markup: ``[bold]`` and ``:smile:`` are text, whoever typed them."""
    watched = sys.stdout.isatty() or "COLUMNS" in os.environ
    return SafeConsole(
        markup=False,
        emoji=False,
        highlight=False,
        force_terminal=True if format is Format.human else None,
        width=None if watched else PIPE_WIDTH,
    )


def messages() -> SafeConsole:
    """Where bars and messages go: standard error, no line broken."""
    return SafeConsole(stderr=True, markup=False, emoji=False, highlight=False, soft_wrap=True)


LIBRARIES = ("transformers", "huggingface_hub")
"""Whose messages are shown as ours are."""

SHOWN = -1
"""The level of a record that was shown: below every handler's, so that the library's own does not write it again."""


@contextmanager
def visible_logs() -> Iterator[None]:
    """Show what libraries log inside, with its control characters visible: they quote a checkpoint's files.

    What Hugging Face's libraries say is shown as our own messages are, each once: a request that is tried again says the
    same every time, but for its numbers.
    """
    make = logging.getLogRecordFactory()
    said: set[str] = set()

    def record(*arguments: Any, **keywords: Any) -> logging.LogRecord:
        made = make(*arguments, **keywords)
        made.msg, made.args = visible(made.getMessage()), ()
        if made.name.partition(".")[0] in LIBRARIES:
            alike = re.sub(r"\d+", "", made.msg)
            if alike not in said:
                said.add(alike)
                word = "warning: " if made.levelno >= logging.WARNING else "note: "
                messages().print(Text.assemble((word, "yellow"), " ".join(made.msg.split())))
            made.levelno = SHOWN
        return made

    logging.setLogRecordFactory(record)
    try:
        yield
    finally:
        logging.setLogRecordFactory(make)
