"""Corpora, statistics over them, and what was collected."""

from __future__ import annotations

from typing import Any

import torch

from pellucid import Collected, Corpus, running_stats
from tests.arguments.bench import (
    CORPUS, NAN, POST, TEXT, TOKENIZER, Call, Line, Of, a_path, a_text, bound, choice, entered, made, not_run, number, whole,
)  # fmt: skip


def corpus(name: str, /, **works: Any) -> Call:
    """A method of a corpus."""
    return bound(lambda bench: bench.corpus, getattr(Corpus, name), **works)


def collected(name: str, /, **works: Any) -> Call:
    """A method of what was collected."""
    return bound(lambda bench: bench.collected, getattr(Collected, name), **works)


NUMBERS = torch.arange(6.0).reshape(1, 3, 2)

CALLS: dict[str, Call] = {
    "Corpus.from_documents": made(Corpus.from_documents, documents={"en": [TEXT]}, tokenizer=TOKENIZER),
    "Corpus.from_text": not_run(made(Corpus.from_text, files={"en": "no.txt"}, tokenizer=TOKENIZER)),
    "Corpus.from_json_lines": not_run(made(Corpus.from_json_lines, files={"en": "no.jsonl"}, tokenizer=TOKENIZER)),
    "Corpus.from_parquet": not_run(made(Corpus.from_parquet, files={"en": "no.parquet"}, tokenizer=TOKENIZER)),
    "Corpus.from_dataset": made(Corpus.from_dataset, datasets={"en": [{"text": TEXT}]}, tokenizer=TOKENIZER),
    "Corpus.from_tokens": made(Corpus.from_tokens, tokens={"en": [[1, 2, 3]]}),
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
    "MeanVariance": made(running_stats.MeanVariance),
    "Covariance": made(running_stats.Covariance),
    "Histogram": made(running_stats.Histogram, edges=[0.0, 1.0]),
    "Quantiles": made(running_stats.Quantiles),
    "Quantiles.at": bound(
        lambda _: running_stats.Quantiles().update(NUMBERS) or running_stats.Quantiles(),
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

REFUSED: list[Line] = []
