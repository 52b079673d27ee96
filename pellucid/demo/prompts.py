"""One beginning of a sentence in each language the embedded model knows: sentences of the Universal Declaration."""

from __future__ import annotations

from collections.abc import Mapping

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
