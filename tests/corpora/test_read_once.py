"""Text that was read for its counts is not tokenised again for its batches, within a bound of memory; rows are the same."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from pellucid import TransformerBridge
from pellucid.corpora import Corpus, corpus
from pellucid.corpora.packing import Encoder
from pellucid.errors import CorpusError

TEXT = "".join(f"Everyone has the right to life, number {number}.\n" for number in range(200))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Two hundred documents."""
    path = tmp_path / "en.txt"
    path.write_text(TEXT, "utf-8")
    return path


@pytest.fixture
def calls(monkeypatch: Any) -> list[int]:
    """How many documents each call of a tokenizer was given."""
    seen: list[int] = []
    encode = Encoder.__call__

    def counted(self: Encoder, documents: Any) -> Any:
        seen.append(len(documents))
        return encode(self, documents)

    monkeypatch.setattr(Encoder, "__call__", counted)
    return seen


@pytest.mark.parametrize("settings", [{}, {"tail": "keep"}, {"packing": "documents"}])
@pytest.mark.parametrize("window", [{}, {"start_row": 3}, {"start_row": 5, "stop_row": 9}, {"stop_row": 0}])
def test_what_was_read_is_not_tokenised_again(
    settings: Any, window: Any, file: Path, calls: list[int], demo: TransformerBridge, monkeypatch: Any
) -> None:
    read, bound, unread = (Corpus.from_text({"en": file}, demo.tokenizer, context=16, **settings) for _ in range(3))
    read.index()
    del calls[:]
    kept = list(read.batches(4, **window))
    assert calls == []
    monkeypatch.setattr(corpus, "KEPT_BYTES", 4096)
    bound.index()
    assert not bound._of["en"].kept
    for other in (bound, unread):
        found = list(other.batches(4, **window))
        assert len(found) == len(kept)
        for one, two in zip(kept, found, strict=True):
            assert one.first_row == two.first_row
            for field in ("tokens", "attention_mask", "documents", "positions"):
                assert torch.equal(getattr(one, field), getattr(two, field))
    assert calls


def test_labels_share_the_bound(file: Path, demo: TransformerBridge, monkeypatch: Any) -> None:
    one = Corpus.from_text({"a": file}, demo.tokenizer, context=16)
    size = sum(24 * batch.n_tokens for batch in one.batches(8))
    monkeypatch.setattr(corpus, "KEPT_BYTES", int(1.5 * size))
    both = Corpus.from_text({"a": file, "b": file}, demo.tokenizer, context=16)
    both.index()
    assert [label for label in both.labels if both._of[label].kept] == ["a"]
    assert len(list(both.batches(1))) == 2 * both.rows("a")


def test_a_file_that_changed_is_refused_as_before(file: Path, demo: TransformerBridge) -> None:
    read = Corpus.from_text({"en": file}, demo.tokenizer, context=16)
    read.index()
    os.utime(file, ns=(1, 1))
    with pytest.raises(CorpusError, match="have changed"):
        next(iter(read.batches(1)))
