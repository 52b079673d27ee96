"""Repeated sequences: what followed a word before follows it again (induction; Olsson et al. 2022, arXiv 2209.11895).

``north table river glass stone table river`` is followed by ``glass``. The corrupted prompt has another word where the
answer stood. In a docstring (Heimersheim and Janiak 2023) the arguments of a function are repeated with words between.
The words are those that a tokenizer has as one token, unless others are given, so there are pairs for every tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pellucid.arguments import check_count
from pellucid.corpora.pairs import PromptPairs
from pellucid.corpora.single_tokens import (
    checked_tokenizer,
    different,
    drawn,
    pairs_of,
    vocabulary_words,
    words_needed,
)

DOCSTRING = '''def {name}(self, {args}):
    """{about}

    :param {first}: {first_about}
    :param {second}: {second_about}
    :param'''
DOCSTRING_WORDS = 11
"""A name, four arguments, a foil and five words of text."""


def induction_pairs(
    tokenizer: Any, n: int = 100, seed: int = 0, *, length: int = 8, words: Sequence[str] | None = None
) -> PromptPairs:
    """Pairs of prompts in which a sequence of words is repeated.

    Args:
        tokenizer: Hugging Face's, as ``bridge.tokenizer`` is.
        n: rows, all different.
        seed: of the draw.
        length: words of the sequence, no two alike: the first stands once, the second to the last but one are repeated,
            and the last one is the answer.
        words: without a space; those that are one token are used. By default the tokenizer's own.

    Returns:
        ``n`` rows; ``answer`` is what followed before, ``foil`` what stands there in the corrupted prompt.

    Raises:
        InputError: too few words are one token; more rows than there are different prompts.
    """
    check_count("length", length, at_least=3)
    tokenizer = checked_tokenizer(tokenizer)
    known = _words(tokenizer, words, length + 1, "induction_pairs")
    rows = []
    for chosen in _chosen(known, length + 1, n, seed, "induction_pairs"):
        *sequence, answer, foil = chosen
        again = " ".join(sequence[1:])
        texts = {
            prompt: f"{' '.join([*sequence, word])} {again}"
            for prompt, word in (("clean", answer), ("corrupted", foil))
        }
        rows.append({**texts, "answer": f" {answer}", "foil": f" {foil}"})
    return pairs_of(tokenizer, rows, "induction")


def docstring_pairs(tokenizer: Any, n: int = 100, seed: int = 0, *, words: Sequence[str] | None = None) -> PromptPairs:
    """Pairs of prompts in which the third argument of a Python function is to be documented.

    Args:
        tokenizer: Hugging Face's, as ``bridge.tokenizer`` is.
        n: rows, all different.
        seed: of the draw.
        words: without a space; those that are one token are used. By default the tokenizer's own.

    Returns:
        ``n`` rows; ``answer`` is the third argument, ``foil`` what is the third argument in the corrupted prompt.

    Raises:
        InputError: too few words are one token; more rows than there are different prompts.
    """
    tokenizer = checked_tokenizer(tokenizer)
    known = _words(tokenizer, words, DOCSTRING_WORDS, "docstring_pairs")
    rows = []
    for chosen in _chosen(known, DOCSTRING_WORDS, n, seed, "docstring_pairs"):
        name, first, second, answer, last, foil, *text = chosen
        texts = {
            prompt: DOCSTRING.format(
                name=name,
                args=", ".join((first, second, third, last)),
                about=text[0],
                first=first,
                first_about=" ".join(text[1:3]),
                second=second,
                second_about=" ".join(text[3:5]),
            )
            for prompt, third in (("clean", answer), ("corrupted", foil))
        }
        rows.append({**texts, "answer": f" {answer}", "foil": f" {foil}"})
    return pairs_of(tokenizer, rows, "docstrings")


def _words(tokenizer: Any, words: Sequence[str] | None, at_least: int, what: str) -> list[str]:
    return words_needed(
        tokenizer, vocabulary_words(tokenizer) or ["a"] if words is None else words, at_least, "words", what
    )


def _chosen(known: Sequence[str], size: int, n: int, seed: int, what: str) -> list[list[str]]:
    """Of each row, ``size`` different words."""
    sizes = {str(place): len(known) - place for place in range(size)}
    return [[known[place] for place in different(row.values())] for row in drawn(sizes, n, seed, what)]
