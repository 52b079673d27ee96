"""Corpora, statistics over them, and what was collected."""

from __future__ import annotations

from typing import Any

import torch

from pellucid import Collected, Corpus, corpora, running_stats
from pellucid.corpora import PromptPairs
from tests.arguments.bench import (
    CORPUS,
    NAN,
    POST,
    TEXT,
    TOKENIZER,
    Call,
    Line,
    Of,
    a_path,
    a_text,
    bound,
    choice,
    entered,
    made,
    not_run,
    number,
    whole,
)


def corpus(name: str, /, **works: Any) -> Call:
    """A method of a corpus."""
    return bound(lambda bench: bench.corpus, getattr(Corpus, name), **works)


def collected(name: str, /, **works: Any) -> Call:
    """A method of what was collected."""
    return bound(lambda bench: bench.collected, getattr(Collected, name), **works)


def _seen(statistic: running_stats.Quantiles) -> running_stats.Quantiles:
    statistic.update(NUMBERS)
    return statistic


NUMBERS = torch.arange(6.0).reshape(1, 3, 2)


class Rows:
    """What a corpus needs of a Hugging Face data set."""

    column_names = ("text",)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, rows: slice) -> dict[str, list[str]]:
        return {"text": [TEXT][rows]}


FILES = {
    "Corpus.from_text": "files",
    "Corpus.from_json_lines": "files",
    "Corpus.from_parquet": "files",
    "Corpus.from_dataset": "datasets",
    "Corpus.from_documents": "documents",
}
"""What each of them reads from."""


def pairs(name: str, /, **works: Any) -> Call:
    """A method of pairs of prompts."""
    return bound(lambda _: PAIRS, getattr(PromptPairs, name), **works)


PAIRS = PromptPairs(["a", "b"], ["c", "d"], [" x", 7], ["y", [8, "z"]])

READY: dict[str, tuple[Any, dict[str, Any]]] = {
    "indirect_object_pairs": (corpora.indirect_object_pairs, {"names": ["right", "person", "law"]}),
    "greater_than_pairs": (corpora.greater_than_pairs, {}),
    "induction_pairs": (corpora.induction_pairs, {}),
    "docstring_pairs": (corpora.docstring_pairs, {}),
    "agreement_pairs": (corpora.agreement_pairs, {}),
}

CALLS: dict[str, Call] = {
    "PromptPairs": made(PromptPairs, clean=["a"], corrupted=["b"], answer=["x"]),
    "PromptPairs.from_rows": made(PromptPairs.from_rows, rows=[{"clean": "a", "corrupted": "b"}]),
    "PromptPairs.from_csv": not_run(made(PromptPairs.from_csv, path="no.csv")),
    "PromptPairs.from_dataframe": made(PromptPairs.from_dataframe, table=PAIRS.to_dataframe()),
    "PromptPairs.to_csv": pairs("to_csv", path="out.csv"),
    "single_tokens": made(corpora.single_tokens, tokenizer=TOKENIZER, words=["right"]),
    "vocabulary_words": made(corpora.vocabulary_words, tokenizer=TOKENIZER, most=3),
    **{name: made(make, tokenizer=TOKENIZER, n=2, **given) for name, (make, given) in READY.items()},
    "Corpus.from_documents": made(Corpus.from_documents, documents={"en": [TEXT]}, tokenizer=TOKENIZER),
    "Corpus.from_text": made(
        Corpus.from_text, files=Of(lambda bench: {"en": bench.folder / "en.txt"}), tokenizer=TOKENIZER
    ),
    "Corpus.from_json_lines": made(
        Corpus.from_json_lines, files=Of(lambda bench: {"en": bench.folder / "en.jsonl"}), tokenizer=TOKENIZER
    ),
    "Corpus.from_parquet": made(
        Corpus.from_parquet, files=Of(lambda bench: {"en": bench.folder / "en.parquet"}), tokenizer=TOKENIZER
    ),
    "Corpus.from_dataset": made(Corpus.from_dataset, datasets={"en": Rows()}, tokenizer=TOKENIZER),
    "Corpus.from_tokens": made(Corpus.from_tokens, tokens={"en": [[1, 2, 3]]}),
    "Corpus": made(
        Corpus,
        sources=Of(lambda bench: {label: each.source for label, each in bench.corpus._of.items()}),
        tokenizer=TOKENIZER,
    ),
    "Corpus.batches": entered(corpus("batches", batch_size=2)),
    "Corpus.index": corpus("index"),
    "Corpus.chosen": corpus("chosen", labels=None),
    "Corpus.count": corpus("count", label="en"),
    "Corpus.rows": corpus("rows", label="en"),
    "Corpus.tokens": corpus("tokens", label="en"),
    "Corpus.contexts": corpus("contexts", label="en", places=[(0, 1)]),
    "Corpus.documents": corpus("documents", label="en", numbers=[0]),
    "Corpus.text_of": corpus("text_of", label="en", document=0),
    "Corpus.restore_index": not_run(corpus("restore_index", state={})),
    "Collected.array": collected("array", hook=POST, statistic="count_positive"),
    "Collected.average_precision": not_run(collected("average_precision", hook=POST, positive="en")),
    "Collected.examples": collected("examples", corpus=CORPUS, hook=POST, label="en", feature=0),
    "Collected.get": collected("get", hook=POST, statistic="count_positive", label="en"),
    "Collected.of": collected("of", hook=POST, label="en"),
    "Collected.merge": not_run(collected("merge", other=Of(lambda bench: bench.collected))),
    "Collected.save": collected("save", path="out.safetensors"),
    "Collected.load": made(Collected.load, path=Of(lambda bench: bench.folder / "collected.safetensors")),
    "CountPositive": made(running_stats.CountPositive),
    "CountTogether": made(running_stats.CountTogether),
    "MeanVariance": made(running_stats.MeanVariance),
    "Covariance": made(running_stats.Covariance),
    "Histogram": made(running_stats.Histogram, edges=[0.0, 1.0]),
    "Quantiles": made(running_stats.Quantiles),
    "Quantiles.at": bound(
        lambda _: _seen(running_stats.Quantiles()),
        running_stats.Quantiles.at,
        quantiles=[0.5],
    ),
    "TopK": made(running_stats.TopK, k=2),
    "AveragePrecision": made(running_stats.AveragePrecision),
    "AveragePrecision.against": not_run(
        bound(lambda _: running_stats.AveragePrecision(), running_stats.AveragePrecision.against, negatives=[])
    ),
    "Statistic.update": bound(lambda _: running_stats.MinMax(), running_stats.Statistic.update, values=NUMBERS),
    "Statistic.merge": bound(
        lambda _: running_stats.MinMax(), running_stats.Statistic.merge, other=running_stats.MinMax()
    ),
    "average_precision": made(
        running_stats.average_precision,
        scores=torch.tensor([[0.0], [1.0]]),
        positive=torch.tensor([True, False]),
    ),
    "load_statistics": not_run(made(running_stats.load_statistics, path="no.safetensors")),
    "save_statistics": made(
        running_stats.save_statistics, path="out.safetensors", statistics={"a": running_stats.MinMax()}, extra={}
    ),
}

REFUSED: list[Line] = [
    ("PromptPairs", {"clean": "a"}, "clean is a list"),
    ("PromptPairs", {"clean": []}, "clean is a list of one for each row; found an empty one"),
    ("PromptPairs", {"clean": [3]}, "row 0 of clean is text or token ids"),
    ("PromptPairs", {"clean": iter(["a"])}, "clean is a list; found list_iterator"),
    ("PromptPairs", {"corrupted": [[1.5]]}, "row 0 of corrupted is text or token ids"),
    ("PromptPairs", {"corrupted": [[]]}, "row 0 of corrupted is text or token ids"),
    ("PromptPairs", {"corrupted": ["a", "b"]}, "clean has 1 rows and corrupted 2"),
    ("PromptPairs", {"answer": [1.5]}, "row 0 of answer is a token"),
    ("PromptPairs", {"answer": [True]}, "row 0 of answer is a token"),
    ("PromptPairs", {"answer": [[]]}, "row 0 of answer is a token"),
    ("PromptPairs", {"foil": [{"x"}]}, "row 0 of foil is a token"),
    ("PromptPairs", {"answer": None, "foil": ["y"]}, "foil needs answer"),
    *a_text("PromptPairs", "name"),
    ("PromptPairs", {"labels": ["x"]}, "labels is a mapping"),
    ("PromptPairs", {"labels": {"clean": ["x"]}}, "a label cannot be called 'clean'"),
    ("PromptPairs", {"labels": {"x:json": ["x"]}}, "a label cannot be called 'x:json'"),
    ("PromptPairs", {"labels": {"x": ["x", "y"]}}, "clean has 1 rows and x 2"),
    ("PromptPairs.from_rows", {"rows": []}, "there are no rows"),
    ("PromptPairs.from_rows", {"rows": [3]}, "a row is a mapping"),
    ("PromptPairs.from_rows", {"rows": 3}, "rows is a list"),
    ("PromptPairs.from_rows", {"rows": [{"clean": "a"}]}, "row 0 has no 'corrupted'"),
    *a_text("PromptPairs.from_rows", "name"),
    *a_path("PromptPairs.from_csv", "path"),
    ("PromptPairs.from_csv", {"path": "nowhere.csv"}, "nowhere.csv cannot be read"),
    ("PromptPairs.from_dataframe", {"table": [3]}, "table is a pandas DataFrame"),
    *a_text("PromptPairs.from_dataframe", "name"),
    *a_path("PromptPairs.to_csv", "path"),
    ("single_tokens", {"words": "right"}, "words is a list of strings; found the string"),
    ("single_tokens", {"words": [3]}, "an entry of words is a string"),
    ("single_tokens", {"tokenizer": "gpt2"}, "tokenizer is Hugging Face's"),
    ("vocabulary_words", {"tokenizer": "gpt2"}, "tokenizer is Hugging Face's"),
    *whole("vocabulary_words", "most", 1),
    *(
        line
        for name in READY
        for line in (
            (name, {"tokenizer": "gpt2"}, "tokenizer is Hugging Face's"),
            (name, {"tokenizer": None}, "needs a tokenizer"),
            (name, {"n": 10**30}, "different prompts"),
            *whole(name, "n", 1),
            *whole(name, "seed", 0),
        )
    ),
    ("indirect_object_pairs", {"names": "Mary"}, "names is a list of strings; found the string"),
    ("indirect_object_pairs", {"names": ["Mary", "John"]}, "needs 2 names"),
    *whole("induction_pairs", "length", 3),
    ("induction_pairs", {"words": "abc"}, "words is a list of strings; found the string"),
    ("docstring_pairs", {"words": ["right"]}, "needs 11 words"),
    ("agreement_pairs", {"nouns": 3}, "nouns is a list"),
    ("agreement_pairs", {"nouns": [("right", "right")]}, "nouns is a list of .singular, plural. pairs"),
    ("agreement_pairs", {"nouns": [("right", 3)]}, "an entry of nouns is a string"),
    ("agreement_pairs", {"verbs": [("is", "nothinglikethis")]}, "needs 1 verbs"),
    ("Corpus.from_documents", {"documents": []}, "documents is a dictionary"),
    ("Corpus.from_documents", {"context": 0}, "context (is a whole number|must be at least 1)"),
    ("Corpus.from_documents", {"context": True}, "context (is a whole number|must be at least 1)"),
    ("Corpus.from_documents", {"packing": "loose"}, "Invalid packing"),
    ("Corpus.from_documents", {"separator": -1}, "separator is 'eos', 'none' or a token id"),
    ("Corpus.from_documents", {"tail": "cut"}, "Invalid tail"),
    ("Corpus.from_documents", {"long_documents": "cut"}, "Invalid long_documents"),
    ("Corpus.from_documents", {"pad_id": -1}, "pad_id must be at least 0"),
    ("Corpus.from_documents", {"longest_document": 0}, "longest_document must be at least 1"),
    ("Corpus.batches", {"batch_size": 1.5}, "batch_size is a whole number"),
    ("Corpus.batches", {"labels": "de"}, "no label 'de'"),
    ("Corpus.batches", {"start_row": 1.5}, "start_row is a whole number"),
    ("Corpus.batches", {"start_row": 3, "stop_row": 2}, "stop_row must be at least 3"),
    ("Corpus.batches", {"padding_side": "middle"}, "Invalid padding_side"),
    ("Corpus.contexts", {"label": "de"}, "no label 'de'"),
    ("Corpus.contexts", {"places": [(99, 0)]}, "no document 99"),
    ("Corpus.contexts", {"before": -1}, "before must be at least 0"),
    ("Corpus.contexts", {"after": -1}, "after must be at least 0"),
    ("Corpus.documents", {"label": "de"}, "no label 'de'"),
    ("Corpus.documents", {"numbers": [-1]}, "an entry of numbers must be at least 0"),
    ("Corpus.documents", {"numbers": [1.5]}, "an entry of numbers is a whole number; found 1.5"),
    ("Collected.examples", {"hook": "nonsense"}, "No hook 'nonsense'"),
    ("Collected.examples", {"label": "de"}, "No label 'de'"),
    ("Collected.examples", {"feature": -1}, "feature must be at least 0"),
    ("Collected.examples", {"feature": 9999}, "feature must be at most 511"),
    ("Collected.examples", {"feature": [0, 0]}, "feature is 1 indices"),
    ("Collected.examples", {"statistic": "top_9"}, "0 statistics of that kind"),
    ("Collected.get", {"hook": "nonsense"}, "No hook 'nonsense'"),
    ("Collected.get", {"statistic": "nonsense"}, "No statistic 'nonsense'"),
    ("Collected.get", {"label": "de"}, "No label 'de'"),
    ("CountPositive", {"threshold": NAN}, "threshold must be finite"),
    ("CountTogether", {"threshold": NAN}, "threshold must be finite"),
    ("MeanVariance", {"correction": -1}, "correction must be at least 0"),
    ("MeanVariance", {"correction": 0.5}, "correction is a whole number"),
    ("Covariance", {"correction": -1}, "correction must be at least 0"),
    ("Covariance", {"most_features": 0}, "most_features must be at least 1"),
    ("Histogram", {"edges": [1.0, 0.0]}, "edges increase"),
    ("Quantiles", {"quantiles": [1.5]}, "an entry of quantiles must be at most 1"),
    ("Quantiles", {"relative_error": 0.0}, "relative_error must be at least 0.001"),
    ("Quantiles", {"smallest": 0.0}, "smallest must be above 0"),
    ("Quantiles", {"largest": float("inf")}, "largest must be finite"),
    ("TopK", {"k": True}, "k is a whole number"),
    ("AveragePrecision", {"pool": "sum"}, "Invalid pool: 'sum'"),
    ("average_precision", {"scores": torch.zeros(3, 1)}, "takes scores .*found"),
    ("average_precision", {"positive": torch.tensor([True, True])}, "no negative one"),
    ("average_precision", {"chunk": 0}, "chunk must be at least 1"),
    ("average_precision", {"chunk": -1}, "chunk must be at least 1"),
    *(
        line
        for name, files in FILES.items()
        for line in (
            *whole(name, "context", 1),
            *whole(name, "longest_document", 1),
            *choice(name, "packing"),
            *choice(name, "tail"),
            *choice(name, "long_documents"),
            *whole(name, "pad_id", 0),
            (name, {"separator": -1}, "separator is 'eos', 'none' or a token id"),
            (name, {"separator": "eot"}, "separator is 'eos', 'none' or a token id"),
            (name, {"separator": 1.5}, "separator is 'eos'"),
            (name, {"tokenizer": "gpt2"}, "tokenizer is Hugging Face's"),
            (name, {"tokenizer": None}, "needs a tokenizer"),
            (name, {files: []}, f"{files} is a dictionary"),
            (name, {files: {}}, f"{files} is a dictionary"),
            (name, {files: {"": "x"}}, f"a label of {files} is a string"),
        )
    ),
    *choice("Corpus.from_text", "document"),
    ("Corpus.from_text", {"files": {"en": 3}}, "The files of 'en' are paths"),
    ("Corpus.from_text", {"files": {"en": "nowhere.txt"}}, "The file nowhere.txt of 'en' does not exist"),
    *a_text("Corpus.from_json_lines", "field"),
    *a_text("Corpus.from_parquet", "column"),
    *a_text("Corpus.from_dataset", "column"),
    ("Corpus.from_dataset", {"datasets": {"en": ["x"]}}, r"datasets\['en'\] is a Hugging Face data set"),
    ("Corpus.from_documents", {"documents": {"en": "x"}}, "The documents of 'en' are a list"),
    *whole("Corpus.from_tokens", "context", 1),
    *whole("Corpus.from_tokens", "pad_id", 0),
    *choice("Corpus.from_tokens", "packing"),
    *choice("Corpus.from_tokens", "tail"),
    *choice("Corpus.from_tokens", "long_documents"),
    ("Corpus.from_tokens", {"separator": "eos"}, "separator=.eos. needs a tokenizer"),
    ("Corpus.from_tokens", {"separator": True}, "separator is 'eos', 'none' or a token id"),
    ("Corpus.from_tokens", {"tokens": {"en": 3}}, r"tokens\['en'\] is a tensor, an array or a list"),
    ("Corpus.from_tokens", {"tokens": {"en": [[1.5]]}}, r"tokens\['en'\] are integers"),
    ("Corpus.from_tokens", {"tokenizer": 3}, "tokenizer is Hugging Face's"),
    ("Corpus", {"sources": {}}, "sources is a dictionary"),
    ("Corpus", {"tokenizer": 3}, "tokenizer is Hugging Face's"),
    *whole("Corpus", "context", 1),
    *choice("Corpus", "packing"),
    *choice("Corpus", "tail"),
    *choice("Corpus", "long_documents"),
    *whole("Corpus", "pad_id", 0),
    ("Corpus", {"separator": "eot"}, "separator is 'eos', 'none' or a token id"),
    *whole("Corpus.batches", "batch_size", 1),
    *whole("Corpus.batches", "start_row", 0),
    *whole("Corpus.batches", "stop_row", 0),
    *choice("Corpus.batches", "padding_side"),
    *(
        (name, {"labels": wrong}, words)
        for name in ("Corpus.batches", "Corpus.index", "Corpus.chosen")
        for wrong, words in (
            (3, "labels is a list of strings"),
            ([], "labels is a list of strings; found an empty one"),
            ([3], "an entry of labels is a string"),
            (["de"], "no label 'de'"),
            (["en", "en"], "twice in labels="),
        )
    ),
    *(
        (name, {"label": wrong}, words)
        for name in ("count", "rows", "tokens", "contexts", "documents", "text_of")
        for name in (f"Corpus.{name}",)
        for wrong, words in ((3, "label is a string"), ([], "label is a string"), ("de", "no label 'de'"))
    ),
    ("Corpus.contexts", {"places": 3}, "places is a list"),
    ("Corpus.contexts", {"places": [3]}, "places is a list of"),
    ("Corpus.contexts", {"places": [(0, 1.5)]}, "an entry of places is a whole number"),
    *whole("Corpus.contexts", "before", 0),
    *whole("Corpus.contexts", "after", 0),
    ("Corpus.documents", {"numbers": 3}, "numbers is a list"),
    ("Corpus.documents", {"numbers": [True]}, "an entry of numbers is a whole number"),
    *whole("Corpus.text_of", "document", 0),
    ("Corpus.text_of", {"document": 99}, "no document 99"),
    ("Corpus.restore_index", {"state": 3}, "state maps what index_state gave"),
    ("Corpus.restore_index", {"state": {}}, "of a corpus with another tokenizer or other settings"),
    *(
        (name, {"hook": wrong}, words)
        for name in ("array", "average_precision", "examples", "get", "of")
        for name in (f"Collected.{name}",)
        for wrong, words in ((3, "hook is a string"), ([], "hook is a string"), ("nonsense", "No hook 'nonsense'"))
    ),
    *a_text("Collected.array", "statistic"),
    ("Collected.array", {"field": "mean"}, "leave field='mean' out"),
    *a_text("Collected.get", "statistic"),
    *a_text("Collected.get", "label"),
    *a_text("Collected.of", "label"),
    *a_text("Collected.examples", "label"),
    *a_text("Collected.examples", "statistic"),
    ("Collected.examples", {"feature": True}, "feature is a whole number"),
    ("Collected.examples", {"feature": "1"}, "feature is a whole number"),
    ("Collected.examples", {"corpus": 3}, "corpus is a Corpus"),
    *a_text("Collected.average_precision", "positive"),
    ("Collected.average_precision", {"statistic": 3}, "statistic is a string"),
    ("Collected.merge", {"other": 3}, "other is a collection"),
    *a_path("Collected.save", "path"),
    *a_path("Collected.load", "path"),
    ("Collected.load", {"path": "nowhere"}, "nowhere holds no statistics"),
    *number("CountPositive", "threshold"),
    *number("CountTogether", "threshold"),
    *whole("CountTogether", "most_features", 1),
    *whole("MeanVariance", "correction", 0),
    *a_text("MeanVariance", "label"),
    *whole("Covariance", "correction", 0),
    *whole("Covariance", "most_features", 1),
    ("Histogram", {"edges": 3}, "edges is a list of numbers"),
    ("Histogram", {"edges": ["0", "1"]}, "an entry of edges is a number"),
    ("Histogram", {"edges": [0.0]}, "edges increase, two at least"),
    ("Quantiles", {"quantiles": 3}, "quantiles is a list"),
    ("Quantiles", {"quantiles": []}, "quantiles is a list of numbers from 0 to 1; found an empty one"),
    *number("Quantiles", "relative_error", 0.0),
    ("Quantiles", {"relative_error": 1.0}, "relative_error must be below 1"),
    *number("Quantiles", "smallest", 0.0),
    *number("Quantiles", "largest", 0.0),
    ("Quantiles.at", {"quantiles": [1.5]}, "an entry of quantiles must be at most 1"),
    ("Quantiles.at", {"quantiles": 3}, "quantiles is a list"),
    *whole("TopK", "k", 1),
    *choice("AveragePrecision", "pool"),
    ("AveragePrecision.against", {"negatives": 3}, "negatives is a list"),
    ("AveragePrecision.against", {"negatives": []}, "negatives is a list of AveragePrecision; found an empty one"),
    ("AveragePrecision.against", {"negatives": [3]}, "an entry of negatives is an AveragePrecision"),
    ("Statistic.update", {"values": 3}, "values is a tensor"),
    ("Statistic.update", {"values": torch.zeros(2)}, "takes values .batch, pos"),
    ("Statistic.update", {"mask": 3}, "mask is a tensor"),
    ("Statistic.update", {"mask": torch.ones(1, 3)}, "mask is a tensor .batch, pos. bool; found torch.float32"),
    ("Statistic.update", {"places": 3}, "places is Places"),
    ("Statistic.merge", {"other": 3}, "other is a statistic"),
    ("Statistic.merge", {"other": running_stats.TopK(1)}, "merges with its like; found top_1"),
    ("average_precision", {"scores": 3}, "scores is a tensor"),
    ("average_precision", {"positive": 3}, "positive is a tensor"),
    *whole("average_precision", "chunk", 1),
    *a_path("load_statistics", "path"),
    *a_path("save_statistics", "path"),
    ("save_statistics", {"statistics": 3}, "statistics maps names"),
    ("save_statistics", {"statistics": {"a": 3}}, r"statistics\['a'\] is a statistic"),
    ("save_statistics", {"extra": 3}, "extra maps names"),
]
