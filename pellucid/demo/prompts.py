"""One beginning of a sentence in each language the embedded model knows: sentences of the Universal Declaration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

LANGUAGES: Mapping[str, str] = {
    "en": "English",
    "fr": "French",
    "es": "Spanish",
    "id": "Indonesian",
    "vi": "Vietnamese",
    "zh": "Chinese",
}

PROMPTS: Mapping[str, str] = {
    "en": "Everyone has the right to",
    "fr": "Toute personne a droit",
    "es": "Toda persona tiene derecho",
    "id": "Setiap orang berhak",
    "vi": "Mọi người đều có quyền",
    "zh": "人人有权",
}


class PatchingPair(NamedTuple):
    """Two prompts that differ in one token, and the tokens that the model expects after each."""

    clean: str
    corrupted: str
    answer: str
    foil: str


PATCHING_PAIR = PatchingPair(
    clean="Everyone has the right to religion and work. Everyone has the right to religion and",
    corrupted="Everyone has the right to religion and freedom. Everyone has the right to religion and",
    answer=" work",
    foil=" freedom",
)
"""The embedded model goes on as the sentence did before: its logit difference is +3.9 on one and -15.4 on the other."""
