"""Sets of pairs from templates: for the embedded model's tokenizer and tiny ones, each row is what it says it is."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pellucid import TransformerBridge
from pellucid.corpora import (
    PromptPairs,
    agreement_pairs,
    docstring_pairs,
    greater_than_pairs,
    indirect_object_pairs,
    induction_pairs,
    single_tokens,
    vocabulary_words,
)
from pellucid.corpora.single_tokens import check_one_token_differs
from pellucid.errors import InputError
from pellucid.experiments.pairs import pair_batches
from tests.tiny_tokenizers import byte_level, metaspace

LETTERS = list("ABCDEFGHJK")
ONE_OF_EACH: dict[str, tuple[Callable[..., PromptPairs], dict[str, Any]]] = {
    "indirect objects": (indirect_object_pairs, {"names": LETTERS}),
    "greater than": (greater_than_pairs, {}),
    "induction": (induction_pairs, {}),
    "docstrings": (docstring_pairs, {}),
    "agreement": (
        agreement_pairs,
        {"nouns": [("A", "B"), ("C", "D"), ("long", "longer")], "verbs": [("E", "F"), ("is", "are")]},
    ),
}
TOKENIZERS: dict[str, Callable[[], Any]] = {
    "bytes": byte_level,
    "bytes, bos": lambda: byte_level("bos"),
    "metaspace": metaspace,
}


def ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


@pytest.mark.parametrize("which", TOKENIZERS)
@pytest.mark.parametrize("what", ONE_OF_EACH)
def test_each_row_is_a_pair_for_its_tokenizer(what: str, which: str) -> None:
    tokenizer = TOKENIZERS[which]()
    make, given = ONE_OF_EACH[what]
    pairs = make(tokenizer, 20, **given)
    assert len(pairs) == 20 == len(set(pairs.clean))
    assert list(pairs.rows()) == list(make(tokenizer, 20, seed=0, **given).rows())
    assert list(pairs.rows()) != list(make(tokenizer, 20, seed=1, **given).rows())
    for row in pairs.rows():
        clean, corrupted = ids(tokenizer, row["clean"]), ids(tokenizer, row["corrupted"])
        assert len(clean) == len(corrupted)
        assert sum(a != b for a, b in zip(clean, corrupted, strict=True)) == 1
        for word in [row["answer"]] if what != "greater than" else row["answer"]:
            token = word if isinstance(word, int) else ids(tokenizer, word)[0]
            text = row["clean"] + tokenizer.decode([token]).strip()
            assert ids(tokenizer, text) == [*clean, token]  # what a model is to predict after what it was given


def test_indirect_objects_name_one_twice() -> None:
    pairs = indirect_object_pairs(byte_level(), 200, names=LETTERS)
    assert {row["order"] for row in pairs.rows()} == {"ABBA", "BABA"}
    for row in pairs.rows():
        named = [word for word in row["clean"].replace(",", " ").split() if word in LETTERS]
        once, twice = row["answer"], row["foil"]
        assert once != twice
        assert sorted(named) == sorted([once, twice, twice])
        assert [name == twice for name in named] == (
            [False, True, True] if row["order"] == "ABBA" else [True, False, True]
        )
        replaced = row["clean"][::-1].replace(twice, once, 1)[::-1]
        assert row["corrupted"] == replaced


def test_later_years_are_the_answer() -> None:
    """Of a tokenizer that reads single digits: only decades after the one whose last year it is."""
    for row in greater_than_pairs(byte_level(), 50).rows():
        begin, century = re.search(r"year (\d+) to the year (\d\d)$", row["clean"]).groups()  # type: ignore[union-attr]
        assert begin.startswith(century)
        for decade in range(10):
            last, first = int(f"{century}{decade}9"), int(f"{century}{decade}0")
            assert (str(decade) in row["answer"]) == (first > int(begin))
            assert (str(decade) in row["foil"]) == (last <= int(begin))
        assert f"year {century}09 to" in row["corrupted"]


def test_years_of_two_digits_a_token_are_sets_of_those() -> None:
    from tokenizers import Regex, Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = [*"The lasted from the year to a war".split(), " ", "[?]", *(f"{number:02}" for number in range(100))]
    words.remove("57")  # no year of this number can be written
    made = Tokenizer(WordLevel({word: place for place, word in enumerate(dict.fromkeys(words))}, "[?]"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d\d| |[a-zA-Z]+"), "isolated")
    pairs = greater_than_pairs(PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[?]"), 300)
    for row in pairs.rows():
        ending = row["begin"] % 100
        assert [int(word) for word in row["foil"]] == [
            number for number in range(100) if number <= ending and number != 57
        ]
        assert [int(word) for word in row["answer"]] == [
            number for number in range(100) if number > ending and number != 57
        ]
        assert row["digits"] == 2
    assert "57" not in {clean[-8:-6] for clean in pairs.clean}


def test_no_word_stands_twice_in_a_sequence() -> None:
    for row in induction_pairs(byte_level(), 50, length=5).rows():
        words = row["clean"].split()
        assert words[1:5] == [*words[5:], row["answer"]]
        assert len({*words[:5], row["foil"]}) == 6
        assert row["corrupted"].split() == [*words[:4], row["foil"], *words[5:]]
    for row in docstring_pairs(byte_level(), 50).rows():
        arguments = re.search(r"self, (\w), (\w), (\w), (\w)\)", row["clean"]).groups()  # type: ignore[union-attr]
        assert row["answer"] == arguments[2]
        assert len({*arguments, row["foil"]}) == 5


def test_verbs_agree_with_the_subject() -> None:
    nouns, verbs = [("A", "B"), ("C", "D")], [("E", "F")]
    for row in agreement_pairs(byte_level(), 8, nouns=nouns, verbs=verbs).rows():
        subject = row["clean"].split()[1]
        assert row["subject"] == ("singular" if subject in "AC" else "plural")
        assert row["answer"] == ("E" if subject in "AC" else "F")
        assert row["corrupted"].split()[1] == {"A": "B", "B": "A", "C": "D", "D": "C"}[subject]
        assert row["clean"].split()[-1] not in ("AB" if subject in "AB" else "CD")


def test_words_that_are_one_token(demo: TransformerBridge) -> None:
    assert single_tokens(demo.tokenizer, ["right", "Mary", "right", "person"]) == ["right", "person"]
    assert single_tokens(byte_level(), ["a", "ab"]) == ["a"]
    own = vocabulary_words(demo.tokenizer)
    assert {"right", "person", "freedom"} <= set(own)
    assert all(len(word) >= 3 for word in own)
    assert own == single_tokens(demo.tokenizer, own)
    assert vocabulary_words(demo.tokenizer, 5) == own[:5]
    assert vocabulary_words(byte_level()) == list("abcdefghijklmnopqrstuvwxyz")


def test_the_embedded_model_repeats_and_does_nothing_else(demo: TransformerBridge) -> None:
    """Measured: its induction is right in every row; agreement, docstrings and years are no behaviour of its."""

    def right(pairs: PromptPairs) -> float:
        scores = []
        for batch in pair_batches(demo, pairs):
            with torch.no_grad():
                logits = demo(batch.clean.tokens)
            reads = batch.metric.reads(batch.clean.tokens, None)  # type: ignore[union-attr]
            rows = torch.arange(len(logits))
            cells = logits[rows, -1][None, :, None]
            if reads.tokens is not None:  # type: ignore[union-attr]
                cells = cells[..., list(reads.tokens)]  # type: ignore[union-attr]
            scores.append(batch.metric.score(cells, reads)[0] > 0)  # type: ignore[union-attr]
        return float(torch.cat(scores).float().mean())

    assert right(induction_pairs(demo.tokenizer, 24)) == 1.0
    assert right(docstring_pairs(demo.tokenizer, 24)) < 0.7
    assert right(greater_than_pairs(demo.tokenizer, 24)) < 0.5
    assert right(agreement_pairs(demo.tokenizer, 24)) < 0.7
    with pytest.raises(InputError, match="needs 2 names .* has 0 of the 38 given .*'Mary' is read as"):
        indirect_object_pairs(demo.tokenizer)


@pytest.mark.parametrize(
    ("make", "given", "said"),
    [
        (indirect_object_pairs, {}, r"needs 2 names .*has 0 of the 38 given \(none\).*Give names="),
        (agreement_pairs, {}, "needs 2 nouns .*in both numbers.*has 0 of the 24 given.*Give nouns="),
        (agreement_pairs, {"nouns": [("A", "B"), ("C", "D")]}, "needs 1 verbs .*Give verbs="),
        (induction_pairs, {"words": list("abc")}, "needs 9 words .*has 3 of the 3 given"),
        (induction_pairs, {"length": 3, "n": 25, "words": list("abcd")}, "has 24 different prompts"),
        (greater_than_pairs, {"n": 10_000}, "different prompts with these words"),
        (agreement_pairs, {"nouns": ["ab"]}, "nouns is a list of .singular, plural. pairs"),
    ],
)
def test_too_few_words_are_told(make: Callable[..., PromptPairs], given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        make(byte_level(), **given)


@pytest.mark.parametrize(("clean", "corrupted"), [("ab", "abc"), ("ab", "ab"), ("abcd", "aXXd")])
def test_prompts_of_a_pair_are_equally_long_and_differ_in_one_token(clean: str, corrupted: str) -> None:
    check_one_token_differs(byte_level(), "abc", "aXc", "here")
    with pytest.raises(InputError, match="here: the two prompts are .* and differ in"):
        check_one_token_differs(byte_level(), clean, corrupted, "here")


def test_a_tokenizer_without_years_is_told() -> None:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(WordLevel({"[?]": 0, "the": 1, "year": 2, "1741": 3}, "[?]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(InputError, match=r"reads 'the year 1741' as \['the', 'year', '1741'\]"):
        greater_than_pairs(PreTrainedTokenizerFast(tokenizer_object=made))
