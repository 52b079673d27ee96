"""Indirect objects (IOI; Wang et al. 2023, arXiv 2211.00593): two names, one of them twice; the other one receives.

``When Mary and John went to the store, John gave a drink to`` is followed by ``Mary``. The corrupted prompt exchanges the
repeated name: ``... Mary gave a drink to`` is followed by ``John``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pellucid.corpora.pairs import PromptPairs
from pellucid.corpora.single_tokens import checked_tokenizer, different, drawn, pairs_of, words_needed

NAMES = (
    *("Mary", "John", "Tom", "James", "Anna", "Paul", "Sarah", "Peter", "Michael", "David", "Robert", "Laura", "Simon"),
    *("Mark", "Daniel", "Emma", "Alice", "Jack", "George", "Henry", "William", "Charles", "Thomas", "Kate", "Jane"),
    *("Martin", "Adam", "Lucy", "Julia", "Maria", "Steven", "Kevin", "Brian", "Jason", "Eric", "Alex", "Sam", "Ben"),
)
"""Given names; which of them are one token, :func:`~pellucid.corpora.single_tokens` says."""

PLACES = ("store", "park", "school", "station", "office", "garden", "hospital", "restaurant")
OBJECTS = ("drink", "book", "letter", "ring", "computer", "basketball", "kiss", "bone")

TEMPLATES = (
    "When {first} and {second} went to the {place}, {giver} gave a {object} to",
    "Then, {first} and {second} were at the {place}. {giver} decided to give a {object} to",
    "After {first} and {second} met at the {place}, {giver} handed a {object} to",
    "{first} and {second} had a long talk at the {place}. At the end, {giver} offered a {object} to",
)


def indirect_object_pairs(tokenizer: Any, n: int = 100, seed: int = 0, *, names: Sequence[str] = NAMES) -> PromptPairs:
    """Pairs of prompts in which a name is to be found that occurred once.

    Args:
        tokenizer: Hugging Face's, as ``bridge.tokenizer`` is.
        n: rows, all different.
        seed: of the draw.
        names: without a space; those that are one token are used.

    Returns:
        ``n`` rows; ``answer`` is the name that occurs once, ``foil`` the repeated one; labels ``order`` (``"ABBA"``: the
        repeated name is second where both are named), ``template``, ``place``, ``object``.

    Raises:
        InputError: fewer than two names are one token; more rows than there are different prompts.
    """
    tokenizer = checked_tokenizer(tokenizer)
    known = words_needed(tokenizer, names, 2, "names", "indirect_object_pairs")
    sizes = {
        "order": 2,
        "template": len(TEMPLATES),
        "once": len(known),
        "twice": len(known) - 1,
        "place": len(PLACES),
        "object": len(OBJECTS),
    }
    rows = []
    for row in drawn(sizes, n, seed, "indirect_object_pairs"):
        once, twice = (known[place] for place in different((row["once"], row["twice"])))
        order = ("ABBA", "BABA")[row["order"]]
        first, second = (once, twice) if order == "ABBA" else (twice, once)
        words = {"place": PLACES[row["place"]], "object": OBJECTS[row["object"]]}
        texts = {
            prompt: TEMPLATES[row["template"]].format(first=first, second=second, giver=giver, **words)
            for prompt, giver in (("clean", twice), ("corrupted", once))
        }
        rows.append(
            {**texts, "answer": f" {once}", "foil": f" {twice}", "order": order, "template": row["template"], **words}
        )
    return pairs_of(tokenizer, rows, "indirect objects")
