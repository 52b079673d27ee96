"""Harvesting: activations of a corpus to disk, shard by shard.

The job fixes everything that a number can depend on: weights, corpus, batches, threads, dtype, attention, the build of
torch and what the processor can do. So shard k has the same bytes whoever computes it, and any number of workers on any
launcher, killed and started again, make the same store. What is computed is the corpus' batches up to the last layer that
is asked for; what is copied is one copy of each activation, from where the model left it to where it is written from.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pellucid.arguments import check_choice, check_count, check_kind, check_path, check_text
from pellucid.corpora import Corpus, CorpusBatch
from pellucid.errors import CorpusError, InputError, StorageFullError
from pellucid.model_bridge.corpus.corpus_pass import PaddingSide, PassBatch, RowPlan, Tap, corpus_pass, stop_after
from pellucid.model_bridge.corpus.job_identity import Watched
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.names import HookIndex, HookSpec, NamesFilter
from pellucid.progress import progress_bar
from pellucid.scale.job_folder import Shard, ShardRecord
from pellucid.scale.job_settings import refuse_writers, settings_of
from pellucid.scale.shard_store import ShardBuffers, ShardWriter, StoredHook, StoreFolder, StoreJob
from pellucid.scale.workers import Worker, check_threads, fixed_threads, share_of
from pellucid.storage.safetensors_files import DTYPES

SHARD_BYTES = 64 * 2**20
"""About how large the file of the widest hook is, unless ``batches_per_shard`` is given."""

_CODES = {dtype: code for code, dtype in DTYPES.items() if dtype.is_floating_point}


@dataclass(frozen=True)
class HarvestReport:
    """What one worker did.

    Attributes:
        shards: how many the job has.
        share: how many of them are this worker's.
        written: how many it computed; the others were done.
        rows: rows in those it computed.
        finished: every shard of the job is done, and the manifest says so.
    """

    shards: int
    share: int
    written: int
    rows: int
    finished: bool


class Harvester:
    """A job on a model, a corpus and a folder: :meth:`harvest_shard` makes shard k, :meth:`run` a worker's share.

    Making one reads the corpus once (unless it is indexed) and hashes the weights, so that a folder where another job was
    begun is refused before anything is computed.

    Args:
        bridge: the model, in evaluation mode and without hooks that write.
        corpus: what it is run on.
        hooks: what to store: a name, a glob, a list or a predicate; activations with one value a token.
        out: the folder. Made if it is not there; one where the same job was begun is gone on with.
        labels: of the corpus, by default all.
        batch_size: sequences in a forward.
        batches_per_shard: by default as many as make a file of about :data:`SHARD_BYTES`.
        dtype: to store as, by default as the model has it.
        threads: of the CPU, set by the worker for the time of its work: another number rounds differently.
        padding_side: of sequences shorter than their batch.
        model_name: noted in the manifest; decides nothing.
        revision: of the model, noted beside its name.
        progress: show a bar while the corpus is read; ``None`` shows it on a terminal only.

    Attributes:
        job: everything that decides the bytes.
        folder: where shards go.

    Raises:
        HookNameError, HookDisabledError: hooks that do not exist or are off.
        InputError: hooks without one value a token, a model in training mode or with hooks on it, sizes below 1.
        CorpusError: a corpus that cannot be read.
        OtherJobError: the folder belongs to another job, with what differs.
        WeightError: weights that cannot be read where they are.
    """

    def __init__(
        self,
        bridge: TransformerBridge,
        corpus: Corpus,
        hooks: NamesFilter,
        out: str | os.PathLike[str],
        *,
        labels: Sequence[str] | None = None,
        batch_size: int = 8,
        batches_per_shard: int | None = None,
        dtype: torch.dtype | None = None,
        threads: int = 1,
        padding_side: PaddingSide = "right",
        model_name: str | None = None,
        revision: str | None = None,
        progress: bool | None = None,
    ) -> None:
        check_kind("corpus", corpus, Corpus, "a Corpus")
        folder = check_path("out", out)
        check_count("batch_size", batch_size)
        check_threads(threads)
        if batches_per_shard is not None:
            check_count("batches_per_shard", batches_per_shard)
        for argument, given in (("model_name", model_name), ("revision", revision)):
            if given is not None:
                check_text(argument, given)
        if dtype is not None and (not isinstance(dtype, torch.dtype) or dtype not in _CODES):
            known = ", ".join(str(each) for each in _CODES)
            raise InputError(f"dtype: activations are stored as one of {known}; found {dtype!r}.")
        check_choice("padding_side", padding_side, ("left", "right"))
        refuse_writers(bridge)
        self._specs = _chosen_hooks(bridge, hooks)
        stop = stop_after(self._specs, bridge.cfg.n_layers)
        self._stop = stop if stop is not None and stop <= bridge.cfg.n_layers else None  # a block, or all of the model
        self._bridge, self._corpus = bridge, corpus
        self._batch_size, self._threads = batch_size, threads
        self._side: PaddingSide = padding_side
        counts = corpus.index(labels, progress)
        stored = tuple(_stored_hook(spec, bridge, dtype) for spec in self._specs)
        if batches_per_shard is None:
            widest = max(hook.row_bytes for hook in stored)
            batches_per_shard = max(1, round(SHARD_BYTES / (widest * batch_size * corpus.rules.context)))
        self._tokens = {label: count.tokens / count.rows for label, count in counts.items()}
        self.job = StoreJob(
            stored,
            {label: count.rows for label, count in counts.items()},
            batches_per_shard * batch_size,
            corpus.rules.context,
            corpus.rules.packing == "packed" and not corpus.rules.keep_tail,
            settings_of(bridge, corpus, batch_size, threads, padding_side),
            {"model": {"name": model_name, "revision": revision}, "corpus": corpus.describe()},
        )
        self.folder = StoreFolder.begin(folder, self.job)
        self._watched = Watched(bridge, "the harvest", threads=threads)

    def __repr__(self) -> str:
        hooks = ", ".join(hook.name for hook in self.job.hooks[:4]) + (", ..." if len(self.job.hooks) > 4 else "")
        return f"Harvester({hooks} of {self._corpus!r} into {self.folder.path}, {self.folder.n_shards} shards)"

    # -- the work ------------------------------------------------------------------------------------------------------

    def run(self, worker: Worker | None = None, progress: bool | None = None) -> HarvestReport:
        """Make every shard of a worker's share that is not done. Writing overlaps computing.

        Args:
            worker: which share, by default all of it.
            progress: show a bar; ``None`` shows it on a terminal only.

        Raises:
            StorageFullError: no space is left, with the shard and what it needs; what was written stays.
            CorpusError: the corpus has changed since it was read.
            InputError: the model has changed since this was made, with what differs.
        """
        mine = share_of(worker, self.job.shards)
        self._refuse_full_disk()
        pinned = self._bridge.device.type == "cuda"
        total = round(sum((shard.stop - shard.first) * self._tokens[shard.label] for shard in mine))
        with (
            ShardWriter(self.folder, pinned=pinned) as writer,
            progress_bar(total=total, desc="harvesting", unit=" tokens", show=progress) as bar,
        ):
            for shard in mine:
                if self.folder.is_done(shard.index):
                    bar.update(round((shard.stop - shard.first) * self._tokens[shard.label]))
                    continue
                buffers = writer.buffers()
                self._compute(shard, buffers, bar)
                writer.submit(shard, buffers)
        finished = self.folder.finish()
        rows = sum(record.rows for record in writer.records)
        return HarvestReport(len(self.job.shards), len(mine), len(writer.records), rows, finished)

    def harvest_shard(self, index: int) -> ShardRecord:
        """Make one shard, unless it is done; for launchers that hand out shards one by one.

        Raises:
            InputError: no such shard.
            StorageFullError, CorpusError, InputError: see :meth:`run`.
        """
        check_count("index", index, 0, len(self.job.shards) - 1)
        if not self.folder.is_done(index):
            shard = self.job.shards[index]
            with ShardWriter(self.folder, depth=1) as writer:
                buffers = writer.buffers()
                self._compute(shard, buffers)
                writer.submit(shard, buffers)
        return self.folder.read_record(index)

    def _compute(self, shard: Shard, buffers: ShardBuffers, bar: Any | None = None) -> None:
        self._watched.refuse_change()
        plan = RowPlan([shard.label], self._batch_size, shard.first, shard.stop, self._side)
        taps = {name: _copying_to(buffer, buffers) for name, buffer in buffers.tensors.items()}
        sequences = 0
        with fixed_threads(self._threads):
            for batch in corpus_pass(self._bridge, plan.batches(self._corpus), taps, stop=self._stop, bar=bar):
                sequences += len(batch.rows.tokens)
                batch.run()
                _copy_columns(batch, buffers)
                buffers.rows += batch.n_tokens
        if sequences != shard.stop - shard.first:
            raise CorpusError(
                f"The corpus has changed since it was read: shard {shard.index} should hold sequences {shard.first} to "
                f"{shard.stop - 1} of {shard.label!r}, and there are not as many. Begin in another folder."
            )

    def _refuse_full_disk(self) -> None:
        """Refuse before computing what will not fit; what other users of the disk take meanwhile is met on the way."""
        rows = sum(
            (shard.stop - shard.first) * self._tokens[shard.label]
            for shard in self.job.shards
            if not self.folder.record_file(shard.index).exists()
        )
        needed = round(rows * self.job.row_bytes)
        free = shutil.disk_usage(self.folder.path).free
        if needed > free:
            raise StorageFullError(
                f"The shards that are missing need {needed:,} bytes and {self.folder.path} has {free:,} left. Store fewer "
                "hooks or a smaller dtype, or make room; nothing was written."
            )


def harvest(
    bridge: TransformerBridge,
    corpus: Corpus,
    hooks: NamesFilter,
    out: str | os.PathLike[str],
    *,
    labels: Sequence[str] | None = None,
    batch_size: int = 8,
    batches_per_shard: int | None = None,
    dtype: torch.dtype | None = None,
    threads: int = 1,
    padding_side: PaddingSide = "right",
    model_name: str | None = None,
    revision: str | None = None,
    worker: Worker | None = None,
    progress: bool | None = None,
) -> HarvestReport:
    """Store the activations of a corpus, or go on where that was interrupted; see :class:`Harvester` and its ``run``.

    What is read back with :class:`~pellucid.scale.stored_activations.StoredActivations` has for each real token, in the
    order of the corpus, one row ``[d]`` of every hook, the token's id, its document, position and sequence.

    Args:
        worker: which share of the job; started with the same arguments, the others make the rest.
        progress: show a bar; ``None`` shows it on a terminal only.
    """
    if worker is not None:
        check_kind("worker", worker, Worker, "a Worker")
    harvester = Harvester(
        bridge,
        corpus,
        hooks,
        out,
        labels=labels,
        batch_size=batch_size,
        batches_per_shard=batches_per_shard,
        dtype=dtype,
        threads=threads,
        padding_side=padding_side,
        model_name=model_name,
        revision=revision,
        progress=progress,
    )
    return harvester.run(worker, progress)


def _copying_to(buffer: Tensor, buffers: ShardBuffers) -> Tap:
    """A tap that copies real tokens' activations behind those of the batches before, from where the model has them."""

    def copy(values: Tensor, batch: PassBatch[CorpusBatch]) -> None:
        flat = values.reshape(batch.rows.tokens.numel(), -1)
        _take(flat, batch.real, buffer[buffers.rows : buffers.rows + batch.n_tokens])

    return copy


def _copy_columns(batch: PassBatch[CorpusBatch], buffers: ShardBuffers) -> None:
    rows = batch.rows
    numbers = torch.arange(rows.first_row, rows.first_row + len(rows.tokens))[:, None].expand_as(rows.tokens)
    columns = {"token": rows.tokens, "document": rows.documents, "position": rows.positions, "sequence": numbers}
    for name, values in columns.items():
        _take(values.reshape(-1), batch.real, buffers.columns[name][buffers.rows : buffers.rows + batch.n_tokens])


def _take(values: Tensor, places: Tensor | None, target: Tensor) -> None:
    """Copy rows to where they are written from: once, but for a choice of rows that is also cast or moved."""
    if places is None:
        target.copy_(values)
    elif values.dtype == target.dtype and values.device == target.device:
        torch.index_select(values, 0, places, out=target)
    else:
        target.copy_(values[places.to(values.device)])


def _chosen_hooks(bridge: TransformerBridge, hooks: NamesFilter) -> list[HookSpec]:
    """The points to store, in firing order however they were asked for.

    Raises:
        InputError: one that has not one value a token.
    """
    cfg = bridge.cfg
    index: HookIndex = bridge.adapter.hook_index()
    names = {spec.name for spec, _ in index.select(hooks, cfg.flags, argument="hooks")}
    chosen = [index[name] for name in index if name in names]
    unfit = [
        spec for spec in chosen if spec.axes[:2] != ("batch", "pos") or "key_pos" in spec.axes or spec.kind == "int"
    ]
    if unfit:
        shape = ", ".join(unfit[0].axes)
        what = "token ids are stored beside every hook" if unfit[0].kind == "int" else "it has no row for each token"
        raise InputError(
            f"{unfit[0].name} [{shape}] cannot be stored: {what}. Name hooks that begin with batch, pos, such as "
            f"blocks.{cfg.n_layers // 2}.hook_resid_post."
        )
    return chosen


def _stored_hook(spec: HookSpec, bridge: TransformerBridge, dtype: torch.dtype | None) -> StoredHook:
    lengths = spec.sizes(bridge.cfg.sizes())
    own = torch.promote_types(bridge.dtype, torch.float32) if spec.kind == "wide" else bridge.dtype
    axes = spec.axes[2:]
    return StoredHook(spec.name, spec.aliases, axes, tuple(lengths[axis] for axis in axes), _CODES[dtype or own])


def idle_threads(threads: int) -> int:
    """How many of the processor's threads that this process may use stand idle beside so many."""
    available = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(0, available - threads)
