"""From documents to rows: tokenising in chunks, separators, and the cut into rows.

A *stream* is the tokens of a label in order, each with its document and its position there. Packed rows are the stream cut
every ``context`` tokens; with one document a row, a row begins wherever ``position % context == 0``. Both can begin in the
middle: a :class:`Checkpoint` says where in the source a chunk begins and how many tokens from there the next row does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np

from pellucid.corpora.sources import Cursor, Document, Source
from pellucid.errors import CorpusError

Packing = Literal["packed", "documents"]
Integers: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]

CHUNK_BYTES = 2**20
CHUNK_DOCUMENTS = 1024
CHUNK_TOKENS = 2**18
"""What is tokenised at a time, and how much of a row of ids is taken at a time."""


@dataclass(frozen=True)
class Rules:
    """How documents become rows; see :class:`~pellucid.corpora.Corpus` for what each means."""

    packing: Packing
    context: int
    separator: int | None
    keep_tail: bool
    split_long: bool


@dataclass(frozen=True)
class Checkpoint:
    """Where reading can begin again: row ``row`` begins ``offset`` tokens after the start of document ``document``."""

    row: int
    offset: int
    document: int
    cursor: Cursor


@dataclass
class Chunk:
    """Tokens that follow one another.

    Attributes:
        ids, documents, positions: ``[token]``.
        document: number of the first document.
        cursor: where the source has it.
        lead: tokens of that document before this chunk.
    """

    ids: Integers
    documents: Integers
    positions: Integers
    document: int
    cursor: Cursor
    lead: int


@dataclass
class Row:
    """One row: ids, documents and positions ``[pos]``, no padding."""

    ids: Integers
    documents: Integers
    positions: Integers


@dataclass
class Tally:
    """What a walk over a whole label found."""

    rows: int = 0
    tokens: int = 0
    dropped_tokens: int = 0
    documents: int = 0
    empty_documents: int = 0
    checkpoints: list[Checkpoint] = field(default_factory=list)
    digest: Any = field(default_factory=hashlib.sha256)

    def see(self, document: Document) -> None:
        """Take a document into the count and the hash."""
        self.documents += 1
        kind, data = (b"t", document.encode()) if isinstance(document, str) else (b"i", document.tobytes())
        self.digest.update(kind + len(data).to_bytes(8, "little"))
        self.digest.update(data)


class Encoder:
    """A tokenizer as a corpus uses it: nothing added, nothing cut, many texts at a time."""

    def __init__(self, label: str, tokenizer: Any | None) -> None:
        self._label, self._tokenizer = label, tokenizer

    def __call__(self, documents: Sequence[Document]) -> list[Any]:
        """Ids of each document."""
        texts = [document for document in documents if isinstance(document, str)]
        if not texts:
            return list(documents)
        if self._tokenizer is None:
            raise CorpusError(f"The label {self._label!r} has text, and there is no tokenizer.")
        found = self._tokenizer(
            texts,
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            verbose=False,  # text longer than a model's context is cut into rows here
        )["input_ids"]
        ids = iter(found)
        return [next(ids) if isinstance(document, str) else document for document in documents]


def chunks(
    source: Source, encode: Encoder, rules: Rules, cursor: Cursor, document: int, tally: Tally | None = None
) -> Iterator[Chunk]:
    """The stream of a source from the document ``document`` at ``cursor`` on.

    Raises:
        CorpusError: what cannot be read; a document over ``context`` where such are refused.
    """
    held: list[Document] = []
    size, first, first_cursor = 0, document, cursor
    for entry, after in source.read(cursor):
        if tally is not None:
            tally.see(entry)
        held.append(entry)
        size += len(entry) if isinstance(entry, str) else 8 * len(entry)
        if size >= CHUNK_BYTES or len(held) >= CHUNK_DOCUMENTS:
            yield from _pieces(held, encode, rules, first, first_cursor, tally)
            first, first_cursor = first + len(held), after
            held, size = [], 0
    if held:
        yield from _pieces(held, encode, rules, first, first_cursor, tally)


def _pieces(
    held: Sequence[Document], encode: Encoder, rules: Rules, first: int, cursor: Cursor, tally: Tally | None
) -> Iterator[Chunk]:
    encoded = encode(held)
    if tally is not None:
        tally.empty_documents += sum(len(ids) == 0 for ids in encoded)
    if not rules.split_long:
        extra = rules.separator is not None
        for index, ids in enumerate(encoded):
            if len(ids) + extra > rules.context:
                raise CorpusError(
                    f"Document {first + index} has {len(ids)} tokens{' and a separator' if extra else ''}, over one row "
                    f'of {rules.context}. long_documents="split" spreads it over several rows; or take a larger context.'
                )
    end = [] if rules.separator is None else [rules.separator]
    lengths = np.array([len(ids) + len(end) if len(ids) else 0 for ids in encoded], dtype=np.int64)
    total = int(lengths.sum())
    if total == 0:
        return
    if all(isinstance(ids, list) for ids in encoded):
        flat = np.fromiter((token for ids in encoded if ids for token in (*ids, *end)), np.int64, total)
    else:
        flat = np.concatenate([np.asarray([*part], np.int64) if isinstance(part, list) else part
                               for ids in encoded if len(ids) for part in (ids, end)])  # fmt: skip
    documents = np.repeat(np.arange(first, first + len(encoded)), lengths)
    positions = np.arange(total) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    for begin in range(0, total, CHUNK_TOKENS):
        part = slice(begin, begin + CHUNK_TOKENS)
        yield Chunk(flat[part], documents[part], positions[part], first, cursor, begin)


def rows(stream: Iterator[Chunk], rules: Rules, begin: Checkpoint, tally: Tally | None = None) -> Iterator[Row]:
    """The rows of a stream that was opened at ``begin``, the first being row ``begin.row``."""
    carry: tuple[Integers, ...] = (np.empty(0, np.int64),) * 3
    row, skip = begin.row, begin.offset
    for chunk in stream:
        if skip >= len(chunk.ids):
            skip -= len(chunk.ids)
            continue
        arrays: tuple[Integers, ...] = (chunk.ids[skip:], chunk.documents[skip:], chunk.positions[skip:])
        held = len(carry[0])
        arrays = tuple(np.concatenate(pair) for pair in zip(carry, arrays, strict=True)) if held else arrays
        bounds = _bounds(arrays[2], rules)
        if tally is not None:
            in_chunk = bounds[bounds >= held]
            if in_chunk.size and int(in_chunk[0]) < len(arrays[0]):
                offset = chunk.lead + skip + int(in_chunk[0]) - held
                tally.checkpoints.append(Checkpoint(row + (held > 0), offset, chunk.document, chunk.cursor))
        skip = 0
        for low, high in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            row += 1
            yield _count(Row(*(array[low:high] for array in arrays)), tally)
        carry = tuple(array[int(bounds[-1]) :] for array in arrays)
    if len(carry[0]) == 0:
        return
    if rules.packing == "documents" or rules.keep_tail or len(carry[0]) == rules.context:
        yield _count(Row(*carry), tally)
    elif tally is not None:
        tally.dropped_tokens += len(carry[0])


def _bounds(positions: Integers, rules: Rules) -> Integers:
    """Where rows begin; what follows the last one may go on in the next chunk."""
    if rules.packing == "packed":
        return np.arange(0, len(positions) + 1, rules.context)
    return np.flatnonzero(positions % rules.context == 0)


def _count(row: Row, tally: Tally | None) -> Row:
    if tally is not None:
        tally.rows += 1
        tally.tokens += len(row.ids)
    return row
