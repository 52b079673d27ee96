"""Corpora against a plain reading of the same text: which tokens, in which rows, from which document."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.corpora import Corpus, packing
from pellucid.errors import CorpusError, InputError

TEXTS = {
    "en": ["Everyone has the right to life.", "All human beings", "a", "Everyone is equal before the law. " * 5],
    "zh": ["人人有权享有生命。", "人人生而自由" * 6, "法律"],
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from pellucid.demo import load_demo_bridge

    return load_demo_bridge().tokenizer


def naive_rows(
    documents: list[list[int]], packed: bool, context: int, separator: int | None, keep_tail: bool
) -> list[list[tuple[int, int, int]]]:
    """Rows of (id, document, position), written down as one would on paper."""
    end = [] if separator is None else [separator]
    streams = [[(t, d, p) for p, t in enumerate([*ids, *end])] if ids else [] for d, ids in enumerate(documents)]
    if not packed:
        return [s[i : i + context] for s in streams for i in range(0, len(s), context)]
    flat = [entry for stream in streams for entry in stream]
    rows = [flat[i : i + context] for i in range(0, len(flat), context)]
    return rows if keep_tail or not rows or len(rows[-1]) == context else rows[:-1]


def rows_of(corpus: Corpus, label: str, **arguments: Any) -> list[list[tuple[int, int, int]]]:
    rows = []
    for batch in corpus.batches(3, labels=label, **arguments):
        for tokens, mask, documents, positions in zip(
            batch.tokens, batch.attention_mask, batch.documents, batch.positions, strict=True
        ):
            assert (documents[~mask] == -1).all()
            assert (positions[~mask] == -1).all()
            rows.append(list(zip(*(x[mask].tolist() for x in (tokens, documents, positions)), strict=True)))
    return rows


@given(
    documents=st.lists(st.lists(st.integers(0, 50), max_size=40), min_size=1, max_size=25),
    packed=st.booleans(),
    context=st.integers(1, 12),
    separator=st.sampled_from([None, 7]),
    keep_tail=st.booleans(),
    sizes=st.tuples(st.integers(1, 30), st.integers(1, 5)),
    start=st.integers(0, 30),
)
@settings(max_examples=150, deadline=None)
def test_rows_are_those_of_a_plain_reading_from_any_row_on(
    documents: list[list[int]],
    packed: bool,
    context: int,
    separator: int | None,
    keep_tail: bool,
    sizes: tuple[int, int],
    start: int,
) -> None:
    expected = naive_rows(documents, packed, context, separator, keep_tail)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "CHUNK_TOKENS", sizes[0])
        patch.setattr(packing, "CHUNK_DOCUMENTS", sizes[1])
        corpus = Corpus.from_tokens(
            {"a": [torch.tensor(ids, dtype=torch.long) for ids in documents]},
            context=context,
            packing="packed" if packed else "documents",
            separator="none" if separator is None else separator,
            tail="keep" if keep_tail else "drop",
        )
        if not expected:
            with pytest.raises(CorpusError, match="'a'"):
                list(corpus.batches(2))
            with pytest.raises(CorpusError, match="'a'"):
                corpus.index()
            return
        assert rows_of(corpus, "a") == expected
        assert rows_of(corpus, "a", start_row=start, padding_side="left") == expected[start:]
        count = corpus.count("a")
        every = sum(len(ids) + (separator is not None) for ids in documents if ids)
        assert count.rows == len(expected)
        assert count.tokens == sum(map(len, expected))
        assert count.tokens + count.dropped_tokens == every
        assert count.empty_documents == sum(not ids for ids in documents)
        assert (
            rows_of(corpus, "a", start_row=start, stop_row=start + 4) == expected[start : start + 4]
        )  # from a checkpoint
        other = Corpus({label: each.source for label, each in corpus._of.items()}, None, context, corpus.rules.packing, corpus.rules.separator or "none",
                       "keep" if keep_tail else "drop")  # fmt: skip
        other.restore_index(json.loads(json.dumps(corpus.index_state())))
        assert rows_of(other, "a", start_row=start) == expected[start:]


# -- every kind of source gives the same rows --------------------------------------------------------------------------


def expected_rows(tokenizer: Any, context: int, packed: bool = True, label: str = "en") -> Any:
    ids = [tokenizer(text)["input_ids"] for text in TEXTS[label]]
    separator = tokenizer.eos_token_id if packed else None
    return naive_rows(ids, packed, context, separator, keep_tail=False)


def write_sources(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for label, texts in TEXTS.items():
        (folder / f"{label}.txt").write_text("\n".join([*texts[:1], "   ", *texts[1:]]) + "\n", encoding="utf-8")
        (folder / f"{label}.crlf.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(texts).encode())
        (folder / f"{label}.paragraphs.txt").write_text("\n\n \n".join(texts), encoding="utf-8")
        lines = [json.dumps({"id": index, "text": text}) for index, text in enumerate(texts)]
        (folder / f"{label}.jsonl").write_text("\n".join(lines), encoding="utf-8")
        (folder / f"{label}.nul.jsonl").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
        pq.write_table(
            pa.table({"text": texts, "id": range(len(texts))}), folder / f"{label}.parquet", row_group_size=2
        )
        for index, text in enumerate(texts):
            (folder / f"{label}.{index}.one.txt").write_text(text, encoding="utf-8")


def corpora_of(folder: Path, tokenizer: Any, **settings: Any) -> Iterator[tuple[str, Corpus]]:
    import datasets

    def files(end: str) -> dict[str, Path]:
        return {label: folder / f"{label}{end}" for label in TEXTS}

    yield "lines", Corpus.from_text(files(".txt"), tokenizer, **settings)
    yield "crlf", Corpus.from_text(files(".crlf.txt"), tokenizer, **settings)
    yield "paragraphs", Corpus.from_text(files(".paragraphs.txt"), tokenizer, document="paragraph", **settings)
    every = {label: [str(folder / f"{label}.{i}.one.txt") for i in range(len(TEXTS[label]))] for label in TEXTS}
    yield "files", Corpus.from_text(every, tokenizer, document="file", **settings)
    yield "json", Corpus.from_json_lines(files(".jsonl"), tokenizer, **settings)
    yield "json with blank lines", Corpus.from_json_lines(files(".nul.jsonl"), tokenizer, **settings)
    yield "parquet", Corpus.from_parquet(files(".parquet"), tokenizer, **settings)
    yield "documents", Corpus.from_documents(TEXTS, tokenizer, **settings)
    data = {label: datasets.Dataset.from_dict({"text": texts}) for label, texts in TEXTS.items()}
    yield "dataset", Corpus.from_dataset(data, tokenizer, **settings)
    streamed = {label: one.to_iterable_dataset() for label, one in data.items()}
    yield "streamed dataset", Corpus.from_dataset(streamed, tokenizer, **settings)


@pytest.mark.parametrize("mode", ["packed", "documents"])
def test_every_kind_of_source_gives_the_same_rows_and_hash(
    mode: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "CHUNK_DOCUMENTS", 2)
    write_sources(tmp_path)
    hashes = set()
    for name, corpus in corpora_of(tmp_path, tokenizer, context=7, packing=mode):
        for label in TEXTS:
            expected = expected_rows(tokenizer, 7, mode == "packed", label)
            assert rows_of(corpus, label) == expected, name
            corpus.index()
            assert rows_of(corpus, label, start_row=3) == expected[3:], name
            assert [corpus.text_of(label, index) for index in range(len(TEXTS[label]))] == TEXTS[label], name
        hashes.add(corpus.content_hash)
        json.dumps(corpus.describe())
    assert len(hashes) == 1  # the content and the settings, not where they were


def test_batches_do_not_mix_labels_and_are_padded_where_asked(tokenizer: Any) -> None:
    corpus = Corpus.from_documents(TEXTS, tokenizer, context=40, packing="documents")
    found = list(corpus.batches(3))
    assert [(batch.label, batch.first_row, len(batch.tokens)) for batch in found] == [
        ("en", 0, 3), ("en", 3, 2), ("zh", 0, 3),
    ]  # fmt: skip
    left = list(corpus.batches(3, padding_side="left"))
    wide = list(corpus.batches(3, pad_to_context=True, labels=["zh", "en"]))
    assert [batch.label for batch in wide] == ["zh", "en", "en"]
    assert all(batch.tokens.shape[1] == 40 for batch in wide)
    for right, other in zip(found, left, strict=True):
        assert (other.tokens[~other.attention_mask] == tokenizer.pad_token_id).all()
        assert other.attention_mask[:, -1].all()
        assert right.attention_mask[:, 0].all()
        assert torch.equal(right.tokens[right.attention_mask], other.tokens[other.attention_mask])
        assert right.n_tokens == other.n_tokens


def test_the_hash_changes_with_whatever_changes_a_token(tokenizer: Any) -> None:
    def made(texts: Any = TEXTS, tok: Any = tokenizer, **settings: Any) -> str:
        return Corpus.from_documents(texts, tok, **{"context": 5, **settings}).content_hash

    import copy

    other_tokenizer = copy.deepcopy(tokenizer)
    other_tokenizer.add_tokens(["human"])
    moved = {"en": [TEXTS["en"][0] + TEXTS["en"][1], *TEXTS["en"][2:]], "zh": TEXTS["zh"]}
    hashes = [
        made(),
        made({"en": TEXTS["en"][:-1], "zh": TEXTS["zh"]}),
        made({"en": TEXTS["en"], "xx": TEXTS["zh"]}),
        made({"zh": TEXTS["zh"], "en": TEXTS["en"]}),
        made(moved),
        made(context=6),
        made(packing="documents"),
        made(separator="none"),
        made(separator=5),
        made(tail="keep"),
        made(tok=other_tokenizer),
    ]
    assert len(set(hashes)) == len(hashes)
    used = copy.deepcopy(tokenizer)
    used(["a", "b c d"], padding=True, truncation=True, max_length=4)  # leaves its settings in the tokenizer
    assert made(tok=used) == hashes[0]


def test_nothing_is_added_and_nothing_is_cut(tokenizer: Any) -> None:
    import copy

    adds = copy.deepcopy(tokenizer)
    adds(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert rows_of(Corpus.from_documents(TEXTS, adds, context=7), "en") == expected_rows(tokenizer, 7)


def test_the_text_around_a_token(tokenizer: Any) -> None:
    corpus = Corpus.from_documents(TEXTS, tokenizer, context=5)
    for label, document in (("en", 3), ("zh", 0)):
        ids = tokenizer(TEXTS[label][document])["input_ids"]
        places = [(document, position) for position in range(len(ids) + 1)]
        for (_, position), context in zip(places, corpus.contexts(label, places, 200, 200), strict=True):
            if label == "en":
                assert context.before + context.token + context.after == TEXTS[label][document]
            assert context.before == tokenizer.decode(ids[:position]) or "⟨" in context.before
    with pytest.raises(InputError, match="has 1 tokens|tokens; asked for"):
        corpus.contexts("en", [(2, 99)])
    with pytest.raises(InputError, match="no document 99"):
        corpus.text_of("en", 99)
    assert list(corpus.documents("en", [3, 1])) == [1, 3]


# -- streaming ---------------------------------------------------------------------------------------------------------


def test_a_file_is_read_as_it_is_needed(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("Everyone has the right to life.\n" * 20000, encoding="utf-8")
    read: list[int] = []
    encode = packing.Encoder.__call__

    def counted(self: Any, documents: Any) -> Any:
        read.append(len(documents))
        return encode(self, documents)

    monkeypatch.setattr(packing.Encoder, "__call__", counted)
    corpus = Corpus.from_text({"en": path}, tokenizer, context=16)
    first = next(iter(corpus.batches(4)))
    assert first.tokens.shape == (4, 16)
    assert sum(read) <= packing.CHUNK_DOCUMENTS
    rows = corpus.rows("en")
    read.clear()
    late = next(iter(corpus.batches(4, start_row=rows - 6)))
    assert late.first_row == rows - 6
    assert sum(read) <= 2 * packing.CHUNK_DOCUMENTS  # from the nearest place, not from the beginning


def test_memory_mapped_ids_are_read_piece_by_piece(tmp_path: Path) -> None:
    ids = np.arange(3 * packing.CHUNK_TOKENS, dtype=np.int32) % 1000
    np.save(tmp_path / "ids.npy", ids)
    mapped = np.load(tmp_path / "ids.npy", mmap_mode="r")
    corpus = Corpus.from_tokens({"en": mapped}, context=100)
    assert corpus.rows("en") == len(ids) // 100
    row = corpus.rows("en") - 3
    batch = next(iter(corpus.batches(2, start_row=row)))
    assert batch.tokens.flatten().tolist() == ids[row * 100 : row * 100 + 200].tolist()


# -- bad input ---------------------------------------------------------------------------------------------------------


def broken_files(folder: Path) -> Iterator[tuple[str, Any, str]]:
    """A name, a call that reads to the end, and what its error has to say."""

    def file(name: str, data: bytes) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    def text(path: Path, **arguments: Any) -> Any:
        return lambda tok: Corpus.from_text({"en": path}, tok, context=2, **arguments).index()

    def lines(path: Path, **arguments: Any) -> Any:
        return lambda tok: Corpus.from_json_lines({"en": path}, tok, context=2, **arguments).index()

    yield "empty file", text(file("empty.txt", b"")), r"empty\.txt.*is empty"
    yield "blank file", text(file("blank.txt", b"\n \n\t\n")), "label 'en' has no row"
    yield "missing", text(folder / "emty.txt"), r"does not exist\. Nearest names there: empty\.txt"
    yield "folder", text(folder), "is a folder"
    bad = file("bad.txt", "första\n".encode() + b"ok\nab\xffcd\n")
    yield "not UTF-8", text(bad), r"bad\.txt, line 3: byte 13 \(0xFF\)"
    yield "cut off", text(file("cut.txt", "ok\nä".encode()[:-1])), r"cut\.txt, line 2: byte 3"
    long = file("long.txt", b"short\n" + b"x" * 101 + b"\nshort\n")
    yield "long line", text(long, longest_document=100), r"long\.txt, line 2 \(byte 6\) is longer than 100 bytes"
    many = file("many.txt", b"word\n" * 50)
    yield "long paragraph", text(many, document="paragraph", longest_document=100), "paragraph that begins at line 1"
    yield "long file", text(many, document="file", longest_document=100), "the file that begins at line 1"
    yield "not JSON", lines(file("bad.jsonl", b'{"text": "a"}\n{"text": \n')), r"bad\.jsonl, line 2 .*is not JSON"
    yield "no field", lines(file("no.jsonl", b'{"txt": "a"}\n')), r"no field 'text'.*Did you mean field='txt'"
    yield "no object", lines(file("list.jsonl", b"[1]\n")), "found a list"
    yield "no string", lines(file("num.jsonl", b'{"text": 3}\n')), "holds int, not text"
    yield "half a pair", lines(file("pair.jsonl", b'{"text": "a\\ud800"}\n')), r"character 1 \(U\+D800\)"
    yield "no parquet", lambda tok: Corpus.from_parquet({"en": many}, tok), r"many\.txt cannot be read as Parquet"


def test_broken_files_are_refused_with_the_place(tokenizer: Any, tmp_path: Path) -> None:
    for name, call, words in broken_files(tmp_path):
        with pytest.raises(CorpusError, match=words):
            call(tokenizer)
        assert name


def test_what_was_read_before_a_broken_line_was_given_out(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"Everyone has the right to life.\n" * 3000 + b"\xff\n")
    corpus = Corpus.from_text({"en": tmp_path / "a.txt"}, tokenizer, context=8)
    seen = 0
    with pytest.raises(CorpusError, match=r"line 3001: byte 96000 "):
        for batch in corpus.batches(8):
            seen += batch.n_tokens
    assert seen > 1000


def test_broken_tables_are_refused_with_the_place(tokenizer: Any, tmp_path: Path) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"txt": ["a"], "id": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "c.parquet")
    data = datasets.Dataset.from_dict({"txt": ["a", "b"]})
    cases = [
        (lambda: Corpus.from_parquet({"en": tmp_path / "a.parquet"}, tokenizer), "no column 'text'.*column='txt'"),
        (
            lambda: Corpus.from_parquet({"en": tmp_path / "b.parquet"}, tokenizer).index(),
            "row 1, column 'text' holds None",
        ),
        (lambda: Corpus.from_parquet({"en": tmp_path / "c.parquet"}, tokenizer), "holds int64"),
        (lambda: Corpus.from_dataset({"en": data}, tokenizer), "no column 'text'.*column='txt'"),
        (lambda: Corpus.from_dataset({"en": data.to_iterable_dataset()}, tokenizer).index(), "no column 'text'"),
    ]
    for call, words in cases:
        with pytest.raises(CorpusError, match=words):
            call()
    with pytest.raises(InputError, match="dictionary of splits"):
        Corpus.from_dataset({"en": datasets.DatasetDict({"train": data})}, tokenizer)


def test_arguments_that_cannot_be_are_refused(tokenizer: Any) -> None:
    def made(**settings: Any) -> Corpus:
        return Corpus.from_documents(TEXTS, tokenizer, **settings)

    cases: list[tuple[Any, str]] = [
        (lambda: made(context=0), "context"),
        (lambda: made(packing="pack"), "Invalid packing: 'pack'"),
        (lambda: made(tail="cut"), "Invalid tail"),
        (lambda: made(long_documents="cut"), "Invalid long_documents"),
        (lambda: made(separator="bos"), "separator is"),
        (lambda: made(separator=-1), "separator is"),
        (lambda: Corpus.from_text({"en": "x"}, tokenizer, document="page"), "Invalid document"),  # type: ignore[arg-type]
        (lambda: Corpus.from_text({"en": []}, tokenizer), "no files"),
        (lambda: Corpus.from_text({}, tokenizer), "files is a dictionary from labels .* without a label"),
        (lambda: Corpus.from_text(["x"], tokenizer), "dictionary from labels"),  # type: ignore[arg-type]
        (lambda: Corpus.from_text({"en": __file__}, None), "needs a tokenizer"),
        (lambda: Corpus.from_documents({"en": "one text"}, tokenizer), r"list of strings.*\[text\]"),
        (lambda: Corpus.from_documents({"": ["a"]}, tokenizer), "a label of documents is a string"),
        (lambda: Corpus.from_tokens({"en": torch.zeros(3)}), r"tokens\['en'\] are integers"),
        (lambda: Corpus.from_tokens({"en": torch.zeros(2, 3, 4).long()}), r"\[document, pos\]"),
        (lambda: Corpus.from_tokens({"en": "abc"}), "tensor, an array or a list"),
        (lambda: Corpus.from_tokens({"en": [1, 2]}, separator="eos"), "end-of-sequence"),
        (lambda: made().batches(2, labels="fr"), "no label 'fr'. Nearest: "),
        (lambda: made().batches(2, labels=[]), "empty"),
        (lambda: made().batches(2, labels=["en", "en"]), "twice"),
        (lambda: made().batches(2, start_row=4, stop_row=3), "stop_row must be at least 4; found 3"),
        (lambda: made().count("fr"), "no label 'fr'"),
    ]
    for call, words in cases:
        with pytest.raises(InputError, match=words):
            call()
    for call, words in [
        (lambda: Corpus.from_tokens({"en": [[1, -2]]}, context=2).index(), "token id -2"),
        (lambda: Corpus.from_tokens({"en": []}), "no tokens"),
        (lambda: Corpus.from_tokens({"en": [[], []]}, packing="documents").index(), "its documents are empty"),
        (lambda: made(context=9000).index(), 'fewer than 9000 tokens.*tail="keep"'),
        (
            lambda: made(context=4, packing="documents", long_documents="refuse").index(),
            "Document 0 has .*one row of 4",
        ),
        (lambda: Corpus.from_documents({"en": ["ab", 3]}, tokenizer), "document 1 of 'en' holds int"),  # type: ignore[list-item]
    ]:
        with pytest.raises(CorpusError, match=words):
            call()


def test_an_index_of_other_settings_or_changed_files_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("Everyone has the right to life.\n" * 10, encoding="utf-8")
    corpus = Corpus.from_text({"en": path}, tokenizer, context=4)
    corpus.index()
    state = corpus.index_state()
    with pytest.raises(CorpusError, match="other settings"):
        Corpus.from_text({"en": path}, tokenizer, context=5).restore_index(state)
    path.write_text("Everyone has the right to life!\n" * 11, encoding="utf-8")
    with pytest.raises(CorpusError, match="have changed"):
        Corpus.from_text({"en": path}, tokenizer, context=4).restore_index(state)
    with pytest.raises(CorpusError, match="have changed"):
        list(corpus.batches(2))
