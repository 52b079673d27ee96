"""Text of the embedded model's languages: some to find neurons on, and other text to measure on.

``written.json`` is what the embedded model wrote itself (``scripts/write_demo_text.py``): it needs no training text, and
holds both kinds of text the model knows. Some of it goes on from the first tokens of held-out paragraphs, so measurements
are made on the others: the model was not trained on those, and nothing was written from them.
"""

from __future__ import annotations

import json
from pathlib import Path

from pellucid.demo import MODEL_FOLDER

WRITTEN_FILE = Path(__file__).parent / "written.json"


def written_text() -> dict[str, list[str]]:
    """By language, paragraphs that the embedded model wrote."""
    held: dict[str, list[str]] = json.loads(WRITTEN_FILE.read_text("utf-8"))
    return held


def held_out_halves() -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """By language, every second paragraph that the model was not trained on, and the others.

    The first half lent its beginnings to :func:`written_text`; measure on the second.
    """
    held = json.loads((MODEL_FOLDER / "held_out.json").read_text("utf-8"))
    every = {language: text["declaration"] + text["sampled"] for language, text in held.items()}
    return (
        {language: paragraphs[0::2] for language, paragraphs in every.items()},
        {language: paragraphs[1::2] for language, paragraphs in every.items()},
    )
