"""A corpus: documents by label, and the batches that a model is run on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pellucid.arguments import (
    check_choice,
    check_count,
    check_mapping,
    check_text,
    check_texts,
    check_wholes,
)
from pellucid.corpora.batches import CorpusBatch, LabelCount, TokenContext, batch_of
from pellucid.corpora.examples import checked_pairs, contexts_in
from pellucid.corpora.label_rows import LabelRows
from pellucid.corpora.packing import Encoder, Packing, Row, Rules
from pellucid.corpora.sources import (
    LONGEST_DOCUMENT,
    DatasetRows,
    Document,
    DocumentRule,
    Documents,
    JsonLines,
    ParquetFiles,
    Source,
    TextFiles,
    TokenRows,
    as_paths,
)
from pellucid.corpora.tokenizing import (
    Separator,
    check_tokenizer,
    digest,
    need_tokenizer,
    pad_id_of,
    separator_id_of,
    tokenizer_fingerprint,
)
from pellucid.errors import CorpusError, InputError
from pellucid.names import nearest
from pellucid.progress import progress_bar
from pellucid.token_text import tokens_to_text

Paths: TypeAlias = str | Path | Sequence[str | Path]

FORMAT = 1
"""Part of every content hash: counted up when the same settings would give other rows."""


KEPT_BYTES = 2**25
"""What the rows that reading a corpus found may take in memory (24 bytes a token), so that text is not tokenised twice."""


class Corpus:
    """Documents by label, streamed as batches in the order of their source.

    Make one with :meth:`from_text`, :meth:`from_json_lines`, :meth:`from_parquet`, :meth:`from_dataset`,
    :meth:`from_documents` or :meth:`from_tokens`, which have these arguments in common:

    Args:
        sources: documents by label, such as a language.
        tokenizer: Hugging Face's, called without special tokens; ``None`` for token ids.
        context: tokens of a row.
        packing: ``"packed"`` puts documents one after another, as in pre-training, and cuts rows of exactly ``context``
            tokens (attention runs across documents, as it did there); ``"documents"`` gives each document a row of its
            own, padded.
        separator: what stands after each document: a token id, ``"eos"`` (the tokenizer's end-of-sequence token),
            ``"none"``, or ``None`` for ``"eos"`` in packed text and ``"none"`` otherwise.
        tail: what happens to the last tokens of a label that fill no packed row: ``"drop"`` leaves them out and counts
            them in :meth:`count`, ``"keep"`` gives a shorter, padded row.
        long_documents: with one document a row, ``"split"`` puts a document over ``context`` into several rows, its
            positions counting on (no row sees the one before), ``"refuse"`` raises.
        pad_id: id at padding, by default the tokenizer's, or 0.

    Raises:
        InputError: arguments that cannot be.
        CorpusError: a source that cannot be read.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        tokenizer: Any | None,
        context: int = 128,
        packing: Packing = "packed",
        separator: Separator = None,
        tail: Literal["drop", "keep"] = "drop",
        long_documents: Literal["split", "refuse"] = "split",
        pad_id: int | None = None,
    ) -> None:
        _check_labels(sources, "sources")
        check_count("context", context)
        check_tokenizer(tokenizer)
        check_choice("packing", packing, ("packed", "documents"))
        check_choice("tail", tail, ("drop", "keep"))
        check_choice("long_documents", long_documents, ("split", "refuse"))
        self.labels: tuple[str, ...] = tuple(sources)
        self.tokenizer = tokenizer
        self.pad_id = pad_id_of(tokenizer) if pad_id is None else check_count("pad_id", pad_id, at_least=0)
        self.rules = Rules(
            packing,
            context,
            separator_id_of(separator, packing, tokenizer),
            keep_tail=tail == "keep",
            split_long=packing == "packed" or long_documents == "split",
        )
        self._of = {label: LabelRows(label, source, tokenizer, self.rules) for label, source in sources.items()}
        self._tokenizer_hash = tokenizer_fingerprint(tokenizer)

    # -- making one ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_text(
        cls,
        files: Mapping[str, Paths],
        tokenizer: Any,
        context: int = 128,
        document: DocumentRule = "line",
        packing: Packing = "packed",
        separator: Separator = None,
        tail: Literal["drop", "keep"] = "drop",
        long_documents: Literal["split", "refuse"] = "split",
        pad_id: int | None = None,
        longest_document: int = LONGEST_DOCUMENT,
    ) -> Corpus:
        """Text files (UTF-8), one or several a label.

        Args:
            files: paths by label, read in the order given.
            document: what a document is: ``"line"`` (lines of white space are none), ``"paragraph"`` (up to a blank
                line) or ``"file"``.
            longest_document: refuse a document of more bytes before it fills the memory.
        """
        check_choice("document", document, ("line", "paragraph", "file"))
        _check_labels(files, "files")
        check_count("longest_document", longest_document)
        sources = {
            label: TextFiles(as_paths(label, paths), document, longest_document) for label, paths in files.items()
        }
        return cls(sources, need_tokenizer(tokenizer), context, packing, separator, tail, long_documents, pad_id)

    @classmethod
    def from_json_lines(
        cls,
        files: Mapping[str, Paths],
        tokenizer: Any,
        context: int = 128,
        field: str = "text",
        packing: Packing = "packed",
        separator: Separator = None,
        tail: Literal["drop", "keep"] = "drop",
        long_documents: Literal["split", "refuse"] = "split",
        pad_id: int | None = None,
        longest_document: int = LONGEST_DOCUMENT,
    ) -> Corpus:
        """Files with a JSON object a line, whose ``field`` holds a document; ``longest_document`` limits the line."""
        _check_labels(files, "files")
        check_text("field", field)
        check_count("longest_document", longest_document)
        sources = {label: JsonLines(as_paths(label, paths), field, longest_document) for label, paths in files.items()}
        return cls(sources, need_tokenizer(tokenizer), context, packing, separator, tail, long_documents, pad_id)

    @classmethod
    def from_parquet(
        cls,
        files: Mapping[str, Paths],
        tokenizer: Any,
        context: int = 128,
        column: str = "text",
        packing: Packing = "packed",
        separator: Separator = None,
        tail: Literal["drop", "keep"] = "drop",
        long_documents: Literal["split", "refuse"] = "split",
        pad_id: int | None = None,
        longest_document: int = LONGEST_DOCUMENT,
    ) -> Corpus:
        """Parquet files, a document a row. Needs pyarrow (extra ``datasets``)."""
        _check_labels(files, "files")
        check_text("column", column)
        check_count("longest_document", longest_document)
        sources = {
            label: ParquetFiles(as_paths(label, paths), column, longest_document) for label, paths in files.items()
        }
        return cls(sources, need_tokenizer(tokenizer), context, packing, separator, tail, long_documents, pad_id)

    @classmethod
    def from_dataset(
        cls,
        datasets: Mapping[str, Any],
        tokenizer: Any,
        context: int = 128,
        column: str = "text",
        packing: Packing = "packed",
        separator: Separator = None,
        tail: Literal["drop", "keep"] = "drop",
        long_documents: Literal["split", "refuse"] = "split",
        pad_id: int | None = None,
        longest_document: int = LONGEST_DOCUMENT,
    ) -> Corpus:
        """Hugging Face data sets by label, streamed ones too; a document a row. A streamed one is read anew each time."""
        _check_labels(datasets, "datasets")
        check_text("column", column)
        check_count("longest_document", longest_document)
        sources = {label: DatasetRows(label, given, column, longest_document) for label, given in datasets.items()}
        return cls(sources, need_tokenizer(tokenizer), context, packing, separator, tail, long_documents, pad_id)

    @classmethod
    def from_documents(
        cls,
        documents: Mapping[str, Sequence[str]],
        tokenizer: Any,
        context: int = 128,
        packing: Packing = "packed",
        separator: Separator = None,
        tail: Literal["drop", "keep"] = "drop",
        long_documents: Literal["split", "refuse"] = "split",
        pad_id: int | None = None,
        longest_document: int = LONGEST_DOCUMENT,
    ) -> Corpus:
        """Lists of strings by label, a document each."""
        _check_labels(documents, "documents")
        check_count("longest_document", longest_document)
        sources = {label: Documents(label, texts, longest_document) for label, texts in documents.items()}
        return cls(sources, need_tokenizer(tokenizer), context, packing, separator, tail, long_documents, pad_id)

    @classmethod
    def from_tokens(
        cls,
        tokens: Mapping[str, Any],
        tokenizer: Any | None = None,
        context: int = 128,
        packing: Packing = "packed",
        separator: Separator = "none",
        tail: Literal["drop", "keep"] = "drop",
        long_documents: Literal["split", "refuse"] = "split",
        pad_id: int | None = None,
    ) -> Corpus:
        """Token ids by label: a long row ``[pos]``, rows ``[document, pos]``, or a list of rows of any length.

        Args:
            tokens: tensors, arrays (memory-mapped ones are read piece by piece) or lists of ids; no padding in them.
            tokenizer: for the text of examples, and ``separator="eos"``.
        """
        _check_labels(tokens, "tokens")
        sources = {label: TokenRows(label, given) for label, given in tokens.items()}
        return cls(sources, tokenizer, context, packing, separator, tail, long_documents, pad_id)

    # -- batches -------------------------------------------------------------------------------------------------------

    def batches(
        self,
        batch_size: int,
        *,
        labels: str | Sequence[str] | None = None,
        start_row: int = 0,
        stop_row: int | None = None,
        padding_side: Literal["left", "right"] = "right",
        pad_to_context: bool = False,
    ) -> Iterator[CorpusBatch]:
        """Rows ``[start_row, stop_row)`` of each label, label after label, in the order of the source.

        Args:
            batch_size: rows of a batch; the last of a label may have fewer.
            labels: of these labels only, in this order.
            start_row: first row of each label; of a label with fewer rows there is none. Beginning late is quick once the
                corpus has been indexed.
            stop_row: the row after the last; ``None``, or more than there are, reads to the end.
            padding_side: of rows shorter than the batch.
            pad_to_context: pad every batch to ``context``, not to its longest row.

        Raises:
            InputError: an unknown label, no whole number of rows.
            CorpusError: at the place where the source cannot be read; a label without a row.
        """
        chosen = self.chosen(labels)
        check_count("batch_size", batch_size)
        check_count("start_row", start_row, at_least=0)
        if stop_row is not None:
            check_count("stop_row", stop_row, at_least=start_row)
        check_choice("padding_side", padding_side, ("left", "right"))
        length = self.rules.context if pad_to_context else None
        return self._batches(chosen, batch_size, start_row, stop_row, padding_side, length)

    def _batches(
        self,
        labels: Sequence[str],
        batch_size: int,
        start: int,
        stop: int | None,
        side: Literal["left", "right"],
        length: int | None,
    ) -> Iterator[CorpusBatch]:
        for label in labels:
            held: list[Row] = []
            at = start
            for row in self._of[label].rows(start):
                if stop is not None and at + len(held) >= stop:
                    break
                held.append(row)
                if len(held) == batch_size:
                    yield batch_of(label, held, at, side, length, self.pad_id)
                    at += len(held)
                    held = []
            if held:
                yield batch_of(label, held, at, side, length, self.pad_id)
            elif at == 0 and stop != 0:
                raise CorpusError(self._of[label].too_short())

    def chosen(self, labels: str | Sequence[str] | None) -> tuple[str, ...]:
        """The labels asked for, ``None`` being all.

        Raises:
            InputError: one that the corpus does not have, or none at all.
        """
        if labels is None:
            return self.labels
        given = (labels,) if isinstance(labels, str) else tuple(check_texts("labels", labels))
        for label in given:
            self._need_label(label)
        if len(set(given)) < len(given):
            raise InputError(f"A label stands twice in labels={list(given)}.")
        return given

    def _need_label(self, label: str) -> None:
        if check_text("label", label) not in self._of:
            near = nearest(str(label), self.labels)
            raise InputError(f"The corpus has no label {label!r}. Nearest: {', '.join(map(repr, near))}.")

    # -- what there is -------------------------------------------------------------------------------------------------

    def index(self, labels: str | Sequence[str] | None = None, progress: bool | None = None) -> dict[str, LabelCount]:
        """Read labels once, from end to end: counts, hashes, and places to begin again.

        What cannot be read is found here, before anything expensive runs. Labels that were read before are not read
        again; :meth:`index_state` keeps the outcome for other processes.

        Args:
            labels: which, by default all.
            progress: show a bar; ``None`` shows it on a terminal only.

        Raises:
            CorpusError: what cannot be read; a label without a row.
        """
        chosen = self.chosen(labels)
        missing = [label for label in chosen if self._of[label].counted is None]
        if missing:
            with progress_bar(desc="reading the corpus", unit=" tokens", show=progress) as bar:
                for label in missing:
                    kept = sum(each.kept_bytes for each in self._of.values())
                    self._of[label].read(bar.update, KEPT_BYTES - kept)
        return {label: found for label in chosen if (found := self._of[label].counted) is not None}

    def count(self, label: str) -> LabelCount:
        """Rows, tokens and documents of a label; reads it once."""
        self._need_label(label)
        return self.index(label)[label]

    def rows(self, label: str) -> int:
        """Number of rows of a label; reads it once."""
        return self.count(label).rows

    def tokens(self, label: str) -> int:
        """Number of tokens in the rows of a label, separators among them; reads it once."""
        return self.count(label).tokens

    @property
    def content_hash(self) -> str:
        """SHA-256 over the documents, the tokenizer and the settings: other tokens or other rows, another hash.

        Reads every label once.
        """
        return digest(self._settings() | {"labels": [[label, self.count(label).sha256] for label in self.labels]})

    def _settings(self) -> dict[str, Any]:
        return {"format": FORMAT, "rules": asdict(self.rules), "tokenizer": self._tokenizer_hash, "pad_id": self.pad_id}

    def describe(self) -> dict[str, Any]:
        """Settings, counts and hash, for a manifest (JSON). Reads every label once."""
        labels = {label: self._of[label].source.describe() | asdict(self.count(label)) for label in self.labels}
        return self._settings() | {"labels": labels, "content_hash": self.content_hash}

    def __repr__(self) -> str:
        return f"Corpus({', '.join(self.labels)}; {self.rules.packing}, rows of {self.rules.context} tokens)"

    # -- the index, for other processes --------------------------------------------------------------------------------

    def index_state(self) -> dict[str, Any]:
        """Counts and places of every label that was read (JSON); for :meth:`restore_index`."""
        return {
            "settings": digest(self._settings()),
            "labels": {label: each.state() for label, each in self._of.items() if each.counted is not None},
        }

    def restore_index(self, state: Mapping[str, Any]) -> None:
        """Take over what another process has read of the same corpus, so that nothing is read twice.

        Files are recognised by size and time of change.

        Raises:
            CorpusError: the index is of another corpus, other settings, or files that have changed since.
        """
        check_mapping("state", state, "what index_state gave")
        if state.get("settings") != digest(self._settings()):
            raise CorpusError(
                "The index is of a corpus with another tokenizer or other settings: read the corpus anew."
            )
        for label, found in state["labels"].items():
            self._need_label(label)
            self._of[label].check_stamp(found["stamp"])
        for label, found in state["labels"].items():
            self._of[label].restore(found)

    # -- text of examples ----------------------------------------------------------------------------------------------

    def documents(self, label: str, numbers: Sequence[int]) -> dict[int, Document]:
        """Documents by number, as the source has them: text, or ids. One pass from the nearest known place.

        Raises:
            InputError: a number that the label does not have.
        """
        self._need_label(label)
        return self._of[label].documents(check_wholes("numbers", numbers, empty=True))

    def text_of(self, label: str, document: int) -> str:
        """The text of a document.

        Raises:
            InputError: no such document; one of token ids, without a tokenizer.
        """
        check_count("document", document, at_least=0)
        found = self.documents(label, [document])[document]
        return found if isinstance(found, str) else tokens_to_text(need_tokenizer(self.tokenizer), found.tolist())

    def contexts(
        self, label: str, places: Sequence[tuple[int, int]], before: int = 12, after: int = 6
    ) -> list[TokenContext]:
        """Tokens with the text around them, for showing examples.

        Args:
            label: whose documents.
            places: ``(document, position)`` of each token.
            before: tokens shown before it, of its document.
            after: tokens shown after it.

        Raises:
            InputError: a place that does not exist; no tokenizer.
        """
        tokenizer = need_tokenizer(self.tokenizer)
        check_count("before", before, at_least=0)
        check_count("after", after, at_least=0)
        pairs = checked_pairs(places)
        found = self.documents(label, [document for document, _ in pairs])
        encoded = dict(zip(found, Encoder(label, tokenizer)(list(found.values())), strict=True))
        return contexts_in(encoded, label, pairs, tokenizer, self.rules.separator, before, after)


# -- small helpers -----------------------------------------------------------------------------------------------------


def _check_labels(given: Any, argument: str) -> None:
    if not isinstance(given, Mapping) or not given:
        raise InputError(
            f"{argument} is a dictionary from labels to documents, such as {{'en': ...}}; found {type(given).__name__}"
            f"{' without a label' if isinstance(given, Mapping) else ''}."
        )
    for label in given:
        check_text(f"a label of {argument}", label)
