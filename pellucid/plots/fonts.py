"""Fonts for drawings: of those on this machine, as many as it takes to have every character.

Browsers find them by themselves. matplotlib takes a list, brings DejaVu Sans along (Latin, Greek, Cyrillic, Arabic), and
draws boxes for the rest.
"""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import Any

from pellucid.errors import warn

_FIRST = "DejaVu Sans"
_LAST_RESORT = "Last Resort"
"""matplotlib brings along a font that says it has every character and has boxes."""
_SHAPING_SINCE = (3, 11)
"""matplotlib's version that joins Arabic letters and orders Indic vowel signs; earlier ones set characters in a row."""


def fonts_for(text: str) -> list[str]:
    """Names of fonts that together have the characters of ``text``, DejaVu Sans first.

    Warns:
        PellucidWarning: no font has some of them, or this matplotlib does not join the letters of the text's scripts.
    """
    import matplotlib
    from matplotlib import font_manager

    entries = [entry for entry in font_manager.fontManager.ttflist if not entry.name.startswith(_LAST_RESORT)]
    chosen = [_FIRST]
    missing = {char for char in text if char.isprintable()}
    missing -= _characters(font_manager.findfont(_FIRST))
    for entry in sorted(entries, key=_preference) if missing else ():
        found = missing & _characters(entry.fname)
        if found:
            chosen.append(entry.name)
            missing -= found
        if not missing:
            break
    if missing:
        shown = " ".join(sorted(missing)[:12])
        warn(
            f"No font on this machine has {len(missing)} of the picture's characters, which are drawn as boxes: {shown}. "
            "Install fonts that have them (Noto Sans has all scripts), or save as .html."
        )
    version = tuple(int(part) for part in re.findall(r"\d+", matplotlib.__version__)[:2])
    if version < _SHAPING_SINCE and any(_is_joined(char) for char in text):
        warn(
            f"matplotlib {matplotlib.__version__} sets letters of Arabic and Indic scripts apart: install 3.11 or later, "
            "or save as .html."
        )
    return chosen


def _preference(entry: Any) -> tuple[bool, bool, bool, int, bool, str, str]:
    """Upright sans-serif fonts of normal weight first; of Chinese ones the simplified, which BLOOM's corpus is in."""
    name = str(entry.name)
    return (
        entry.style != "normal",
        "Sans" not in name,
        "Mono" in name or "Serif" in name,
        abs(int(entry.weight) - 400) if str(entry.weight).isdigit() else 0,
        "CJK" in name and "SC" not in name,
        name,
        str(entry.fname),
    )


def _characters(file: str | Path) -> frozenset[str]:
    """What a font has; nothing, if it cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(chr(code) for code in FT2Font(str(file)).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


def _is_joined(char: str) -> bool:
    return unicodedata.bidirectional(char) in ("R", "AL") or unicodedata.category(char) == "Mc"
