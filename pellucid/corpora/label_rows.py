"""The rows of one label: read from its source, counted once, and begun again at any row that a checkpoint leads to.

Reading a label from end to end (:meth:`LabelRows.read`) gives its counts, its hash and places to begin again. Text is not
tokenised twice where its rows fit in what may be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pellucid.corpora.batches import LabelCount
from pellucid.corpora.examples import read_documents
from pellucid.corpora.packing import Checkpoint, Encoder, Row, Rules, Tally, chunks, rows
from pellucid.corpora.sources import Document, Source
from pellucid.errors import CorpusError


class LabelRows:
    """A label's source as rows of tokens.

    Args:
        label: its name.
        source: of its documents.
        tokenizer: Hugging Face's; ``None`` for token ids.
        rules: how documents become rows.
    """

    def __init__(self, label: str, source: Source, tokenizer: Any | None, rules: Rules) -> None:
        self.label, self.source = label, source
        self._tokenizer, self._rules = tokenizer, rules
        self.counted: LabelCount | None = None
        self._checkpoints: list[Checkpoint] = []
        self._stamp: list[list[int]] | None = None
        self.kept: list[Row] | None = None

    @property
    def _begin(self) -> Checkpoint:
        return Checkpoint(0, 0, 0, self.source.start)

    @property
    def kept_bytes(self) -> int:
        """Memory of the rows that are kept."""
        return _bytes_of(self.kept or ())

    def rows(self, start: int) -> Iterator[Row]:
        """Rows from ``start`` on, from the nearest place that is known.

        Raises:
            CorpusError: the files have changed since they were read; what cannot be read.
        """
        begin = next(mark for mark in reversed([self._begin, *self._checkpoints]) if mark.row <= start)
        if self._stamp is not None:
            self.check_stamp(self._stamp)
        if self.kept is not None:
            yield from self.kept[start:]
            return
        encode = Encoder(self.label, self._tokenizer)
        stream = chunks(self.source, encode, self._rules, begin.cursor, begin.document)
        for number, row in enumerate(rows(stream, self._rules, begin), begin.row):
            if number >= start:
                yield row

    def read(self, tell: Callable[[int], Any], may_keep: int) -> None:
        """Read the label from end to end.

        Args:
            tell: is given the tokens of each row, for a progress bar.
            may_keep: bytes that its rows may take; of more, none is kept.

        Raises:
            CorpusError: what cannot be read; a label without a row.
        """
        tally, stamp = Tally(), self.source.stamp()
        stream = chunks(self.source, Encoder(self.label, self._tokenizer), self._rules, self.source.start, 0, tally)
        # Files only: they are known by their stamp, and a streamed data set is read anew each time.
        left = may_keep if stamp else 0
        kept: list[Row] | None = []
        for row in rows(stream, self._rules, self._begin, tally):
            tell(len(row.ids))
            if kept is not None:
                kept.append(row)
                left -= _bytes_of([row])
                kept = kept if left >= 0 else None
        if tally.rows == 0:
            raise CorpusError(self.too_short())
        self.check_stamp(stamp)
        self._stamp, self._checkpoints, self.kept = stamp, tally.checkpoints, kept
        self.counted = LabelCount(
            tally.rows,
            tally.tokens,
            tally.documents,
            tally.empty_documents,
            tally.dropped_tokens,
            tally.digest.hexdigest(),
        )

    def too_short(self) -> str:
        """What to say of a label without a row."""
        if self._rules.packing == "documents":
            return f"The label {self.label!r} has no tokens: its documents are empty."
        return (
            f"The label {self.label!r} has no row: its text has fewer than {self._rules.context} tokens. Give more text, "
            'a smaller context=, or tail="keep".'
        )

    def documents(self, numbers: Sequence[int]) -> dict[int, Document]:
        """Documents by number, as the source has them: text, or ids. One pass from the nearest known place.

        Raises:
            InputError: a number that the label does not have.
        """
        marks = [(mark.document, mark.cursor) for mark in (self._begin, *self._checkpoints)]
        return read_documents(self.source, self.label, marks, numbers)

    # -- for other processes -------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What reading found (JSON), for :meth:`restore`."""
        assert self.counted is not None
        return {
            "count": asdict(self.counted),
            "stamp": self._stamp,
            "checkpoints": [asdict(mark) for mark in self._checkpoints],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what another process found."""
        self.counted, self._stamp = LabelCount(**state["count"]), state["stamp"]
        self._checkpoints = [Checkpoint(**mark) for mark in state["checkpoints"]]

    def check_stamp(self, stamp: list[list[int]]) -> None:
        """See that the files are the ones of a stamp.

        Raises:
            CorpusError: they have changed.
        """
        if self.source.stamp() != stamp:
            raise CorpusError(
                f"The files of {self.label!r} have changed since they were read (size or time): make the corpus anew."
            )


def _bytes_of(kept: Sequence[Row]) -> int:
    return sum(array.nbytes for row in kept for array in (row.ids, row.documents, row.positions))
