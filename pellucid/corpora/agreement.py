"""Agreement of subject and verb in number (Linzen et al. 2016; Marvin and Linzen 2018), with a noun between them.

``The books near the table`` is followed by ``are``. The corrupted prompt has the subject in the other number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pellucid.arguments import check_list, check_text
from pellucid.corpora.pairs import PromptPairs
from pellucid.corpora.single_tokens import checked_tokenizer, different, drawn, pairs_of, single_tokens
from pellucid.errors import InputError

NOUNS = (
    *(("boy", "boys"), ("girl", "girls"), ("friend", "friends"), ("teacher", "teachers"), ("doctor", "doctors")),
    *(("student", "students"), ("child", "children"), ("woman", "women"), ("man", "men"), ("parent", "parents")),
    *(("book", "books"), ("car", "cars"), ("house", "houses"), ("picture", "pictures"), ("key", "keys")),
    *(("person", "persons"), ("right", "rights"), ("law", "laws"), ("country", "countries"), ("member", "members")),
    *(("state", "states"), ("nation", "nations"), ("limitation", "limitations"), ("freedom", "freedoms")),
)
"""Singular and plural."""

VERBS = (("is", "are"), ("was", "were"), ("has", "have"), ("does", "do"))
BETWEEN = ("near", "behind", "beside", "with", "of", "for")


def agreement_pairs(
    tokenizer: Any,
    n: int = 100,
    seed: int = 0,
    *,
    nouns: Sequence[tuple[str, str]] = NOUNS,
    verbs: Sequence[tuple[str, str]] = VERBS,
) -> PromptPairs:
    """Pairs of prompts after which a verb is to agree with the subject, and not with the noun that stands before it.

    Args:
        tokenizer: Hugging Face's, as ``bridge.tokenizer`` is.
        n: rows, all different.
        seed: of the draw.
        nouns: (singular, plural), without a space; pairs of which both are one token are used.
        verbs: (singular, plural), likewise.

    Returns:
        ``n`` rows; ``answer`` is the verb in the subject's number, ``foil`` in the other; labels ``subject`` and ``between``
        (``"singular"`` or ``"plural"``).

    Raises:
        InputError: fewer than two nouns or no verb are one token in both numbers; more rows than there are prompts.
    """
    tokenizer = checked_tokenizer(tokenizer)
    known, said = _in_both(tokenizer, nouns, 2, "nouns"), _in_both(tokenizer, verbs, 1, "verbs")
    between = single_tokens(tokenizer, BETWEEN) or list(BETWEEN)
    sizes = {
        "subject": len(known),
        "noun": len(known) - 1,
        "number": 2,
        "other": 2,
        "verb": len(said),
        "between": len(between),
    }
    rows = []
    for row in drawn(sizes, n, seed, "agreement_pairs"):
        subject, noun = (known[place] for place in different((row["subject"], row["noun"])))
        number, verb = row["number"], said[row["verb"]]
        end = f"{between[row['between']]} the {noun[row['other']]}"
        rows.append(
            {
                "clean": f"The {subject[number]} {end}",
                "corrupted": f"The {subject[1 - number]} {end}",
                "answer": f" {verb[number]}",
                "foil": f" {verb[1 - number]}",
                "subject": ("singular", "plural")[number],
                "between": ("singular", "plural")[row["other"]],
            }
        )
    return pairs_of(tokenizer, rows, "agreement")


def _in_both(tokenizer: Any, words: Sequence[tuple[str, str]], at_least: int, argument: str) -> list[tuple[str, str]]:
    """Those of which singular and plural are one token.

    Raises:
        InputError: too few; entries that are no pairs of words.
    """
    listed = []
    for entry in check_list(argument, words, "(singular, plural) pairs of words"):
        if not isinstance(entry, tuple | list) or len(entry) != 2 or entry[0] == entry[1]:
            raise InputError(f"{argument} is a list of (singular, plural) pairs of words; found {entry!r} in it.")
        listed.append(
            (check_text(f"an entry of {argument}", entry[0]), check_text(f"an entry of {argument}", entry[1]))
        )
    known = set(single_tokens(tokenizer, [word for entry in listed for word in entry]))
    found = [entry for entry in dict.fromkeys(listed) if known >= set(entry)]
    if len(found) < at_least:
        raise InputError(
            f"agreement_pairs needs {at_least} {argument} that are one token after a space in both numbers, and this "
            f"tokenizer has {len(found)} of the {len(listed)} given ({', '.join('/'.join(each) for each in found) or 'none'}"
            f"). Give {argument}=[(singular, plural), ...]; pellucid.corpora.single_tokens(tokenizer, words) says which "
            "words are one token."
        )
    return found
