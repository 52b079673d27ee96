"""Statistics of a corpus on many processes: ``bridge.collect`` shard by shard, merged in the order of the shards.

A shard's statistics depend on the job alone, and they are always merged one after another from shard 0 on. So integer
statistics are exactly those of one process, and floating-point ones have equal bits for any number of workers. (They round
otherwise than one ``collect`` over everything, which adds batch by batch: by the last bits of a float64.)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pellucid.arguments import check_choice, check_count, check_kind, check_path
from pellucid.corpora import Corpus
from pellucid.errors import CorpusError, StoreError
from pellucid.model_bridge.corpus.collected import Collected, describe_request
from pellucid.model_bridge.corpus.collecting import Requests, requested_hooks
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.progress import progress_bar
from pellucid.scale.job_folder import JobFolder, Shard, ShardRecord, open_job, read_document, shards_of
from pellucid.scale.job_settings import refuse_writers, settings_of
from pellucid.scale.workers import Worker, check_threads, fixed_threads, share_of
from pellucid.storage.json_text import Json, json_errors, sha256_of_json
from pellucid.storage.whole_files import hash_file

FORMAT = "pellucid statistics"
FORMAT_VERSION = 1
STATISTICS = "statistics"


@dataclass(frozen=True)
class CollectReport:
    """What one worker did.

    Attributes:
        shards: how many the job has.
        written: how many this worker computed.
        finished: every shard is done: :func:`merge_shards` gives the outcome.
    """

    shards: int
    written: int
    finished: bool


def collect_shards(
    bridge: TransformerBridge,
    corpus: Corpus,
    statistics: Requests,
    out: str | os.PathLike[str],
    *,
    labels: Sequence[str] | None = None,
    batch_size: int = 4,
    batches_per_shard: int = 64,
    threads: int = 1,
    padding_side: Literal["left", "right"] = "right",
    worker: Worker | None = None,
    progress: bool | None = None,
) -> CollectReport:
    """Collect a worker's share of a corpus into a folder, or go on where that was interrupted.

    Args:
        bridge: the model, in evaluation mode and without hooks that write.
        corpus: what it is run on.
        statistics: what to keep of which hook points; see ``bridge.collect``.
        out: the folder. Made if it is not there; one where the same job was begun is gone on with.
        labels: of the corpus, by default all.
        batch_size: rows of a forward.
        batches_per_shard: what an interruption can cost; a shard has a file with the whole state.
        threads: of the CPU, set for the time of the work.
        padding_side: where shorter rows are padded.
        worker: which share, by default all of it.
        progress: show a bar; ``None`` shows it on a terminal only.

    Raises:
        InputError: sizes below 1; a model with hooks on it or in training mode; see ``bridge.collect``.
        OtherJobError: the folder belongs to another job, with what differs.
        CorpusError: a corpus that cannot be read, or has changed.
    """
    check_kind("corpus", corpus, Corpus, "a Corpus")
    folder_path = check_path("out", out)
    check_count("batch_size", batch_size)
    check_count("batches_per_shard", batches_per_shard)
    check_threads(threads)
    check_choice("padding_side", padding_side, ("left", "right"))
    if worker is not None:
        check_kind("worker", worker, Worker, "a Worker")
    refuse_writers(bridge)
    counts = corpus.index(labels, progress)
    rows = {label: count.rows for label, count in counts.items()}
    asked = describe_request(requested_hooks(bridge, statistics))
    identity: dict[str, Json] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "statistics": asked,
        "labels": [[label, count] for label, count in rows.items()],
        "sequences_per_shard": batch_size * batches_per_shard,
        "settings": settings_of(bridge, corpus, batch_size, threads, padding_side),
    }
    sha256 = sha256_of_json(identity)
    open_job(folder_path, {"job": identity, "job_sha256": sha256, "remarks": {"corpus": corpus.describe()}})
    shards = shards_of(rows, batch_size * batches_per_shard)
    folder = JobFolder(folder_path, sha256, len(shards), [STATISTICS])
    mine, written = share_of(worker, shards), 0
    with progress_bar(total=len(mine), desc="collecting shards", unit=" shards", show=progress) as bar:
        for shard in mine:
            if not folder.is_done(shard.index):
                with fixed_threads(threads):
                    found = bridge.collect(
                        corpus,
                        statistics,
                        batch_size,
                        labels=[shard.label],
                        start_row=shard.first,
                        stop_row=shard.stop,
                        padding_side=padding_side,
                        progress=False,
                    )
                _write(folder, shard, found)
                written += 1
            bar.update()
    finished = all(folder.record_file(shard.index).exists() for shard in shards)
    return CollectReport(len(shards), written, finished)


def _write(folder: JobFolder, shard: Shard, found: Collected) -> None:
    if found.n_rows[shard.label] != shard.stop - shard.first:
        raise CorpusError(
            f"The corpus has changed since it was read: shard {shard.index} should have rows {shard.first} to "
            f"{shard.stop - 1} of {shard.label!r}, and there are not as many. Begin in another folder."
        )
    path = folder.file(shard.index, STATISTICS)
    found.save(path)
    folder.write_record(ShardRecord(shard.index, found.n_tokens[shard.label], {STATISTICS: hash_file(path)}))


def merge_shards(out: str | os.PathLike[str]) -> Collected:
    """What all workers collected, merged from shard 0 on; needs neither the model nor the corpus.

    Raises:
        StoreError: a shard that is missing or damaged, by name.
    """
    path = check_path("out", out)
    document = read_document(path)
    with json_errors(path):
        job = document["job"]
        if job["format"] != FORMAT or job["format_version"] != FORMAT_VERSION:
            raise StoreError(f"{path} holds {job['format']!r}, not {FORMAT!r} of version {FORMAT_VERSION}.")
        rows = {str(label): int(count) for label, count in job["labels"]}
        shards = shards_of(rows, int(job["sequences_per_shard"]))
    folder = JobFolder(path, document["job_sha256"], len(shards), [STATISTICS])
    whole: Collected | None = None
    for shard in shards:
        if not folder.record_file(shard.index).exists():
            raise StoreError(f"{path} is not finished: shard {shard.index} of {len(shards)} is missing. {_REMEDY}")
        damage = folder.damage(folder.read_record(shard.index))
        if damage is not None:
            raise StoreError(f"{path}: {damage}. {_REMEDY}")
        part = Collected.load(folder.file(shard.index, STATISTICS))
        if whole is None:
            whole = Collected.empty(part.hooks, tuple(rows))
        for hook in part.hooks:
            pairs = zip(whole.of(hook.spec.name, shard.label), part.of(hook.spec.name, shard.label), strict=True)
            for mine, theirs in pairs:
                mine.merge(theirs)
        whole.saw(shard.label, part.n_rows[shard.label], part.n_tokens[shard.label])
    assert whole is not None
    return whole


_REMEDY = "Run the same collection again: it makes anew what is missing or damaged."
