"""Greater-than (Hanna et al. 2023, arXiv 2305.00586): a year by which something ended is later than that of its beginning.

``The war lasted from the year 1741 to the year 17`` is followed by two digits above 41: the answer is a set of tokens, and
so is what it is compared with. The corrupted prompt begins in the year 1701, after which nearly anything is later.

Where the last two digits of a year are one token, the sets are of two-digit tokens. Many tokenizers read each digit alone;
then the next token is a decade, years begin with the last year of theirs (1749, so that only a later decade is right), and
the corrupted prompt begins in 1709.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pellucid.corpora.pairs import PromptPairs, Word
from pellucid.corpora.single_tokens import (
    check_one_token_differs,
    checked_tokenizer,
    drawn,
    ids_of,
    next_token,
    text_or_id,
)
from pellucid.errors import InputError

NOUNS = (
    *("war", "journey", "siege", "dispute", "expedition", "project", "campaign", "treaty", "trial", "study", "reign"),
    *("rebellion", "famine", "alliance", "contract", "pilgrimage", "conflict", "negotiation", "construction", "voyage"),
)
CENTURIES = tuple(range(11, 20))
PROMPT = "The {noun} lasted from the year {begin} to the year {century}"
FEWEST = 5
"""Endings of a century that have to be one token: of its 100, or of the ten decades."""


@dataclass(frozen=True)
class Endings:
    """How a tokenizer reads the years of a century.

    Attributes:
        century: its first two digits.
        words: by number, the token that may come next: 0 to 99, or the decades 0 to 9.
        begins: by number, the year with which the prompt may begin.
        corrupted: the year with which the corrupted prompt begins.
    """

    century: int
    words: Mapping[int, Word]
    begins: Mapping[int, int]
    corrupted: int


def greater_than_pairs(tokenizer: Any, n: int = 100, seed: int = 0) -> PromptPairs:
    """Pairs of prompts after which a later year is to follow.

    Args:
        tokenizer: Hugging Face's, as ``bridge.tokenizer`` is.
        n: rows, all different.
        seed: of the draw.

    Returns:
        ``n`` rows; ``answer`` is the set of tokens of later years (or decades), ``foil`` that of the others, for
        :class:`~pellucid.sweep.ProbabilityDifference`; labels ``noun``, ``begin`` (a year) and ``digits`` (of a token: 2 or
        1).

    Raises:
        InputError: a tokenizer in which neither two digits nor one are a token; more rows than there are different prompts.
    """
    tokenizer = checked_tokenizer(tokenizer)
    digits, found = 2, _endings(tokenizer, 2)
    if not found:
        digits, found = 1, _endings(tokenizer, 1)
    if not found:
        pieces = [tokenizer.decode([token]) for token in ids_of(tokenizer, "the year 1741")]
        raise InputError(
            "greater_than_pairs needs years whose last two digits are one token, or whose digits are a token each, and "
            f"this tokenizer reads 'the year 1741' as {pieces}. Make prompts of your own: PromptPairs(clean, corrupted, "
            "answer=[[...], ...], foil=[[...], ...])."
        )
    begins = [(each, number) for each in found for number in each.begins]
    rows: list[dict[str, Any]] = []
    for row in drawn({"noun": len(NOUNS), "begin": len(begins)}, n, seed, "greater_than_pairs"):
        of, number = begins[row["begin"]]
        texts = {
            prompt: PROMPT.format(noun=NOUNS[row["noun"]], begin=year, century=of.century)
            for prompt, year in (("clean", of.begins[number]), ("corrupted", of.corrupted))
        }
        check_one_token_differs(tokenizer, texts["clean"], texts["corrupted"], f"greater than, row {len(rows)}")
        rows.append(
            {
                **texts,
                "answer": [word for other, word in of.words.items() if other > number],
                "foil": [word for other, word in of.words.items() if other <= number],
                "noun": NOUNS[row["noun"]],
                "begin": of.begins[number],
                "digits": digits,
            }
        )
    return PromptPairs.from_rows(rows, "greater than")


def _endings(tokenizer: Any, digits: int) -> list[Endings]:
    """Of each century whose years a tokenizer reads as is needed, how."""
    found = []
    for century in CENTURIES:
        corrupted = century * 100 + (1 if digits == 2 else 9)
        if not _read_alike(tokenizer, corrupted, digits):
            continue
        prompt = PROMPT.format(noun="war", begin=corrupted, century=century)
        words: dict[int, Word] = {}
        for number in range(10**digits):
            token = next_token(tokenizer, prompt, f"{number:0{digits}}")
            if token is not None:
                words[number] = text_or_id(tokenizer, f"{number:0{digits}}", token[1])
        plain = 1 if digits == 2 else 0
        years = {
            number: century * 100 + (number if digits == 2 else 10 * number + 9)
            for number in words
            if plain < number < max(words)
        }
        if len(words) >= FEWEST:
            begins = {number: year for number, year in years.items() if _read_alike(tokenizer, year, digits)}
            found.append(Endings(century, words, begins, corrupted))
    return [each for each in found if each.begins]


def _read_alike(tokenizer: Any, year: int, digits: int) -> bool:
    """Whether a year is its century, and then tokens of so many digits."""
    century = ids_of(tokenizer, f"the year {year // 100}")
    ids = ids_of(tokenizer, f"the year {year}")
    return ids[: len(century)] == century and len(ids) == len(century) + 2 // digits
