"""From the corpus options of a command line to a corpus."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pellucid.cli.files import labelled_files
from pellucid.corpora import Corpus
from pellucid.errors import InputError

KINDS = {
    ".txt": "text",
    ".text": "text",
    ".jsonl": "JSON lines",
    ".ndjson": "JSON lines",
    ".parquet": "Parquet",
}
"""What a file is, by its ending."""


@dataclass(frozen=True)
class CorpusRequest:
    """What ``--corpus`` and its kin ask for; see :class:`~pellucid.corpora.Corpus`."""

    files: tuple[str, ...]
    context: int = 128
    packing: str = "packed"
    separator: str | None = None
    tail: str = "drop"
    document: str = "line"
    field: str = "text"


def open_corpus(request: CorpusRequest, tokenizer: Any) -> Corpus:
    """The corpus.

    Raises:
        InputError: no file, files of several kinds, or of an unknown one.
        CorpusError: a file that does not exist or is empty.
    """
    files = labelled_files(request.files)
    kinds = {_kind(path) for paths in files.values() for path in paths}
    if len(kinds) > 1:
        raise InputError(f"--corpus takes files of one kind; found {' and '.join(sorted(kinds))}.")
    common: dict[str, Any] = {
        "context": request.context,
        "packing": request.packing,
        "separator": _separator(request.separator),
        "tail": request.tail,
    }
    match kinds.pop():
        case "JSON lines":
            return Corpus.from_json_lines(files, tokenizer, field=request.field, **common)
        case "Parquet":
            return Corpus.from_parquet(files, tokenizer, column=request.field, **common)
        case _:
            document: Any = request.document
            return Corpus.from_text(files, tokenizer, **common, document=document)


def _kind(path: Path) -> str:
    kind = KINDS.get(path.suffix.lower())
    if kind is None:
        raise InputError(f"{path} could be anything: give a file that ends in one of {', '.join(KINDS)}.")
    return kind


def _separator(given: str | None) -> Any:
    return int(given) if given is not None and given.isdecimal() else given
