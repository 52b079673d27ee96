"""Text around chosen tokens: documents read again by number, and the words beside a position."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pellucid.arguments import check_count, check_list
from pellucid.corpora.batches import TokenContext
from pellucid.corpora.sources import Document, Source
from pellucid.errors import InputError
from pellucid.token_text import tokens_to_text


def read_documents(
    source: Source, label: str, marks: Sequence[tuple[int, list[int]]], numbers: Sequence[int]
) -> dict[int, Document]:
    """Documents by number, in one pass from the nearest place that is known.

    Args:
        source: of the label.
        label: for errors.
        marks: ``(document, cursor)``: where reading may begin, the first of them at document 0.
        numbers: of the documents.

    Raises:
        InputError: a number that the label does not have.
    """
    wanted = sorted(set(numbers))
    found: dict[int, Document] = {}
    reader: Iterator[tuple[Document, list[int]]] = iter(())
    at = -1
    for number in wanted:
        mark = next(((start, cursor) for start, cursor in reversed(marks) if start <= number), None)
        if mark is None:
            break
        if at < mark[0]:
            at, reader = mark[0], source.read(mark[1])
        for document, _ in reader:
            at += 1
            if at > number:
                found[number] = document
                break
    missing = [number for number in wanted if number not in found]
    if missing:
        raise InputError(f"The label {label!r} has no document {missing[0]}.")
    return found


def contexts_in(
    encoded: Mapping[int, Sequence[int]],
    label: str,
    places: Sequence[tuple[int, int]],
    tokenizer: Any,
    separator: int | None,
    before: int,
    after: int,
) -> list[TokenContext]:
    """Tokens with the text around them.

    Args:
        encoded: ids of each document, by its number.
        label: for errors.
        places: ``(document, position)`` of each token.
        tokenizer: Hugging Face's.
        separator: the id that ends a document, or ``None``.
        before: tokens shown before a token, of its document.
        after: tokens shown after it.

    Raises:
        InputError: a place that does not exist.
    """
    contexts = []
    for document, position in places:
        ids = [*map(int, encoded[document])]
        ids += [] if separator is None else [separator]
        if not 0 <= position < len(ids):
            raise InputError(f"Document {document} of {label!r} has {len(ids)} tokens; asked for {position}.")
        parts = (ids[max(0, position - before) : position], ids[position : position + 1])
        rest = ids[position + 1 : position + 1 + after]
        contexts.append(TokenContext(*(tokens_to_text(tokenizer, part) for part in (*parts, rest))))
    return contexts


def checked_pairs(places: Any) -> list[tuple[int, int]]:
    """``(document, position)`` pairs; of none there are no contexts.

    Raises:
        InputError: something else in the list.
    """
    pairs = []
    for place in check_list("places", places, "(document, position) pairs", empty=True):
        if not isinstance(place, Sequence) or len(place) != 2:
            raise InputError(f"places is a list of (document, position) pairs; found {place!r} in it.")
        document, position = (check_count("an entry of places", part, at_least=0) for part in place)
        pairs.append((document, position))
    return pairs
