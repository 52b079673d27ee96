"""Which words are one token for a tokenizer, and pairs of prompts made of such words.

A template that fits every tokenizer does not exist: a name that is one token here is three elsewhere, and a space is a part
of the next word's token, or a token of its own. So each set of pairs asks the tokenizer: which of its words are one token
after a space, where a prompt ends so that the answer is the next token, and whether the two prompts of a row differ in one
token and are equally long.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pellucid.arguments import check_count, check_texts
from pellucid.corpora.pairs import PromptPairs, Word
from pellucid.corpora.tokenizing import need_tokenizer
from pellucid.errors import InputError

SHORTEST, FEWEST = 3, 20
"""Of a tokenizer's own words: letters that each has; where fewer words than this have them, shorter ones do too."""

CHUNK = 4096
"""Ids that are read at a time."""


def single_tokens(tokenizer: Any, words: Sequence[str]) -> list[str]:
    """Those of the words that are one token after a space, each once, in their order.

    Args:
        tokenizer: Hugging Face's.
        words: without a space before them.

    Raises:
        InputError: no tokenizer; words that are no list of strings.
    """
    need = checked_tokenizer(tokenizer)
    # One rule for a tokenizer: where it joins a letter to its space, a word that it parts from its space is no whole word.
    start = "a" if len(ids_of(need, "a a")) == len(ids_of(need, "a")) + 1 else "a "
    found = {word: next_token(need, "a", f" {word}") for word in check_texts("words", words)}
    return [word for word, ends in found.items() if ends is not None and ends[0] == start]


def vocabulary_words(tokenizer: Any, most: int = 1000) -> list[str]:
    """A tokenizer's own words: of small English letters, one token after a space, in the order of their ids.

    Words of three letters or more; where there are fewer than 20 of them, shorter ones too.

    Args:
        tokenizer: Hugging Face's.
        most: how many at most; ids are in the order of frequency in most tokenizers.

    Raises:
        InputError: no tokenizer.
    """
    need, found = checked_tokenizer(tokenizer), list[str]()
    check_count("most", most)
    for start in range(0, len(need), CHUNK):
        ids = range(start, min(start + CHUNK, len(need)))
        texts = dict.fromkeys(need.decode([token]).strip() for token in ids)
        words = [text for text in texts if text.isascii() and text.isalpha() and text.islower()]
        found += single_tokens(need, words) if words else []
        if sum(len(word) >= SHORTEST for word in found) >= most:
            break
    found = list(dict.fromkeys(found))
    long = [word for word in found if len(word) >= SHORTEST]
    return (long if len(long) >= FEWEST else found)[:most]


def checked_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer.

    Raises:
        InputError: there is none, or it is something else.
    """
    need = need_tokenizer(tokenizer)
    if not callable(need) or not hasattr(need, "decode"):
        raise InputError(f"tokenizer is Hugging Face's, as bridge.tokenizer is; found {need!r}.")
    return need


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text, without what a tokenizer puts around it."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def next_token(tokenizer: Any, prompt: str, word: str) -> tuple[str, int] | None:
    """Where a prompt ends and which token comes next, for a word to follow it; ``None`` if that takes several tokens,
    or one that stands for any unknown word.

    Args:
        tokenizer: Hugging Face's.
        prompt: without a space at its end.
        word: with the space before it, if it has one. Where that is a token of its own, it is the end of the prompt.
    """
    full = ids_of(tokenizer, prompt + word)
    if full[-1:] == [tokenizer.unk_token_id]:
        return None
    for start in dict.fromkeys((prompt, prompt + word[: len(word) - len(word.lstrip(" "))])):
        if full[:-1] == ids_of(tokenizer, start):
            return start, full[-1]
    return None


def words_needed(tokenizer: Any, words: Sequence[str], at_least: int, argument: str, what: str) -> list[str]:
    """Those that are one token.

    Raises:
        InputError: there are too few.
    """
    found = single_tokens(tokenizer, check_texts(argument, words))
    if len(found) < at_least:
        split = next((word for word in words if word not in found), "")
        pieces = [tokenizer.decode([token]) for token in ids_of(tokenizer, f"a {split}")]
        example = f": after 'a', {split!r} is read as {pieces}" if split else ""
        raise InputError(
            f"{what} needs {at_least} {argument} that are one token after a space, and this tokenizer has "
            f"{len(found)} of the {len(words)} given ({', '.join(found[:8]) or 'none'}){example}. Give {argument}= words "
            "that are one token; pellucid.corpora.vocabulary_words(tokenizer) lists some."
        )
    return found


def drawn(sizes: Mapping[str, int], n: int, seed: int, what: str) -> list[dict[str, int]]:
    """``n`` different combinations of choices, drawn at random: of each row, by choice, its number.

    Args:
        sizes: of each choice, how many there are.
        n: combinations.
        seed: of the draw.
        what: is made, for the error.

    Raises:
        InputError: more than there are.
    """
    check_count("n", n)
    check_count("seed", seed, at_least=0)
    total = 1
    for size in sizes.values():
        total *= size
    if n > total:
        raise InputError(
            f"n={n}: {what} has {total} different prompts with these words. Give a smaller n, or more words."
        )
    rows = []
    for number in _numbers(random.Random(seed), total, n):
        row = {}
        for name, size in sizes.items():
            number, row[name] = divmod(number, size)
        rows.append(row)
    return rows


def _numbers(source: random.Random, total: int, n: int) -> list[int]:
    """``n`` different numbers below ``total``, which may be more than a list can have entries."""
    if total <= 2**31:
        return source.sample(range(total), n)
    found: dict[int, None] = {}
    while len(found) < n:
        found[source.randrange(total)] = None
    return list(found)


def different(numbers: Iterable[int]) -> list[int]:
    """Places in a list, no two of them equal: each number is a place among those that are left, in ascending order."""
    taken: list[int] = []
    for number in numbers:
        for place in sorted(taken):
            number += place <= number
        taken.append(number)
    return taken


def pairs_of(tokenizer: Any, rows: Sequence[Mapping[str, Any]], name: str) -> PromptPairs:
    """Pairs from rows of texts, each checked with the tokenizer.

    Args:
        tokenizer: Hugging Face's.
        rows: ``clean``, ``corrupted``, and the words ``answer`` and ``foil`` with the space before them; labels.
        name: of the set.

    Returns:
        pairs whose answers are the texts that are their token, or ids where no text is.

    Raises:
        InputError: a row whose prompts do not differ in exactly one token, or an answer that is not one token there.
    """
    made = []
    for place, row in enumerate(rows):
        ends = {}
        for prompt in ("clean", "corrupted"):
            for word in ("answer", "foil"):
                found = next_token(tokenizer, row[prompt], row[word])
                if found is None:
                    raise InputError(
                        f"{name}, row {place}: {row[word]!r} is not one token after {row[prompt]!r}: leave it out of the "
                        "words."
                    )
                ends[prompt, word] = found
        starts = {prompt: {ends[prompt, word][0] for word in ("answer", "foil")} for prompt in ("clean", "corrupted")}
        if any(len(each) > 1 for each in starts.values()):
            raise InputError(
                f"{name}, row {place}: {row['answer']!r} and {row['foil']!r} do not begin at the same token after "
                f"{row['clean']!r}: give words that do."
            )
        prompts = {prompt: each.pop() for prompt, each in starts.items()}
        check_one_token_differs(tokenizer, prompts["clean"], prompts["corrupted"], f"{name}, row {place}")
        words = {word: text_or_id(tokenizer, row[word], ends["clean", word][1]) for word in ("answer", "foil")}
        made.append({**row, **prompts, **words})
    return PromptPairs.from_rows(made, name)


def check_one_token_differs(tokenizer: Any, clean: str, corrupted: str, what: str) -> None:
    """Refuse prompts that are not equally long, or differ in another number of tokens than one.

    Raises:
        InputError: so they do.
    """
    one, other = ids_of(tokenizer, clean), ids_of(tokenizer, corrupted)
    differ = sum(a != b for a, b in zip(one, other, strict=False)) + abs(len(one) - len(other))
    if len(one) != len(other) or differ != 1:
        raise InputError(
            f"{what}: the two prompts are {len(one)} and {len(other)} tokens and differ in {differ}; they are to be equally "
            f"long and to differ in one: {clean!r}, {corrupted!r}. Leave out the word that differs."
        )


def text_or_id(tokenizer: Any, word: str, token: int) -> Word:
    """The text that is the token, with its space or without; its id where neither is."""
    return next((text for text in (word, word.lstrip(" ")) if ids_of(tokenizer, text) == [token]), token)
