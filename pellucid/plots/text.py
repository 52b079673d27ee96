"""Text in pictures: what cannot be seen is written out, long labels are cut, and nothing is read as markup.

Plotly reads a small HTML in every label (``<b>``, ``<a href>``, ``&lt;``), drops tags it does not know (``<s>`` leaves an
empty label) and, where MathJax is on the page, reads ``$...$`` as a formula.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable

FONTS = (
    "system-ui, 'Segoe UI', 'Noto Sans', 'Noto Sans Arabic', 'Noto Sans Devanagari', 'Nirmala UI', "
    "'Noto Sans CJK SC', 'PingFang SC', 'Microsoft YaHei', 'DejaVu Sans', sans-serif"
)
"""Fonts of the reader's own machine; browsers take each script's characters from the first that has them."""

LONGEST_LABEL = 24
"""Characters of a tick's text; the hover text has all of them."""

_LINE_BREAK = "<br>"
_ISOLATE, _END_ISOLATE = "\u2068", "\u2069"
_TAGS = re.compile(r"</?(?:b|i|em|strong|span|sub|sup)(?:\s[^<>]*)?>")
_JOINERS = "\u200c\u200d"
"""Zero-width characters that many scripts spell words with: kept where they are between two characters."""


def visible(text: str) -> str:
    """``text`` in one line, with every character that cannot be seen written as ``⟨U+FEFF⟩``, the line feed as ``⏎``."""
    shown = []
    for place, char in enumerate(text):
        if char == "\n":
            shown.append("⏎")
        elif char.isprintable() or (char in _JOINERS and 0 < place < len(text) - 1):
            shown.append(char)
        else:
            shown.append(f"⟨U+{ord(char):04X}⟩")
    return "".join(shown)


def cut(text: str, longest: int = LONGEST_LABEL) -> str:
    """``text``, or its beginning and an ellipsis; no combining mark is parted from its letter."""
    if len(text) <= longest:
        return text
    end = longest - 1
    while end > 1 and unicodedata.category(text[end]).startswith("M"):
        end -= 1
    return text[:end] + "…"


def escaped(text: str) -> str:
    """``text`` as Plotly has to be given it in order to show it."""
    return html.escape(text, quote=False).replace("$", "&#36;")


def isolated(text: str) -> str:
    """``text`` that does not change the direction of what stands around it in a line."""
    return f"{_ISOLATE}{text}{_END_ISOLATE}"


def lines(texts: Iterable[str]) -> str:
    """Lines of escaped text, as one label."""
    return _LINE_BREAK.join(texts)


def plain(markup: str) -> str:
    """What Plotly shows for a label, as plain text with line feeds."""
    text = _TAGS.sub("", re.sub(r"<br\s*/?>", "\n", markup))
    return html.unescape(text).replace(_ISOLATE, "").replace(_END_ISOLATE, "")


def width(text: str, size: float = 12.0) -> float:
    """A guess at the pixels that ``text`` is wide at a font size in pixels; wide scripts count double."""
    units = 0.0
    for char in text:
        if unicodedata.category(char) in ("Mn", "Me", "Cf"):
            continue
        units += 1.05 if unicodedata.east_asian_width(char) in ("W", "F") else 0.6
    return units * size


def paragraphs(subtitle: str | None) -> list[str]:
    """A subtitle's paragraphs: a line break in it begins another one."""
    return [] if subtitle is None else subtitle.split("\n")


def wrapped(text: str, pixels: float, size: float = 12.0) -> list[str]:
    """``text`` in lines of about ``pixels`` at most, broken at spaces, and before the ``·`` that shows one."""
    done, line = [], ""
    parts = [(place, part) for word in text.split(" ") for place, part in enumerate(re.split("(?<=.)(?=·)", word))]
    for place, word in parts:
        longer = f"{line}{'' if place else ' '}{word}" if line else word
        if line and width(longer, size) > pixels:
            done.append(line)
            longer = word
        while width(longer, size) > pixels and len(longer) > 1:
            end = max(1, int(len(longer) * pixels / width(longer, size)))
            done.append(longer[:end])
            longer = longer[end:]
        line = longer
    return [*done, line]
