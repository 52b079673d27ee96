"""The store: a folder of shards, each a function of the job alone, and what says which of them are done.

::

    job.json                                        what decides every byte; written first, once
    00000.rows.safetensors                          token, document, position, sequence: [rows]
    00000.blocks.3.hook_out.safetensors             one tensor [rows, d], a file a hook
    00000.json                                      lengths and checksums of shard 0's files; written last: it is done
    manifest.json                                   job and shards in one file, when all are done

A *row* is what is stored for one real token; a *sequence* is a row of the corpus, what the model is given. Shard k holds
the sequences that the job says it holds, whoever computes it and when. There are no locks: two that compute one shard
write the same bytes. A shard is done when its record is there and its files have the checksums that the record gives.
"""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pellucid.errors import InputError, StoreError
from pellucid.names import nearest
from pellucid.scale.job_folder import (
    JOB_FILE,
    MANIFEST_FILE,
    JobFolder,
    Shard,
    ShardRecord,
    open_job,
    read_document,
    shards_of,
)
from pellucid.storage.json_text import Json, json_errors, sha256_of_json, to_json, to_line
from pellucid.storage.safetensors_files import DTYPES, safetensors_chunks
from pellucid.storage.whole_files import sync_folder, write_whole
from pellucid.tables import BriefFields

FORMAT = "pellucid activations"
FORMAT_VERSION = 1
ROWS = "rows"
"""The file beside the hooks': what each row is."""

COLUMNS: Mapping[str, torch.dtype] = {
    "token": torch.int32,
    "document": torch.int64,
    "position": torch.int32,
    "sequence": torch.int64,
}
"""What is kept of each row beside its activations."""

_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
"""Names that go into file names."""


# -- the job -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredHook:
    """One hook of a job.

    Attributes:
        name: canonical name, as in the file names.
        aliases: other names it can be asked for by.
        axes: words for the axes of one row, such as ``("n_heads", "d_head")``.
        shape: their lengths; a row holds their product.
        dtype: of the stored numbers, as safetensors calls it.
    """

    name: str
    aliases: tuple[str, ...]
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str

    @property
    def width(self) -> int:
        """``d``: how many numbers a row has."""
        width = 1
        for length in self.shape:
            width *= length
        return width

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.width * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, repr=False)
class StoreJob(BriefFields):
    """Everything that decides the bytes of a store.

    Attributes:
        hooks: what is stored.
        labels: every label of the corpus and how many sequences it has.
        sequences_per_shard: of one label; its last shard may have fewer.
        length: positions of a sequence at most.
        packed: every sequence has ``length`` real tokens.
        settings: model, corpus, settings of the run, versions; see :mod:`pellucid.scale.harvest`.
        remarks: what is worth knowing and decides nothing, such as the model's name.
    """

    hooks: tuple[StoredHook, ...]
    labels: Mapping[str, int]
    sequences_per_shard: int
    length: int
    packed: bool
    settings: Mapping[str, Json]
    remarks: Mapping[str, Json] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [hook.name for hook in self.hooks]
        unfit = [name for name in names if not _NAME.fullmatch(name) or name == ROWS]
        if unfit or len(set(names)) != len(names) or not names:
            raise StoreError(f"A job stores hooks by their names, each once; found {names}.")
        if self.sequences_per_shard < 1 or self.length < 1 or not self.labels or min(self.labels.values()) < 1:
            raise StoreError("A job has at least one label, and sequences in every label.")

    def identity(self) -> dict[str, Json]:
        """What decides the bytes, as JSON."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "hooks": [_hook_json(hook) for hook in self.hooks],
            "labels": [[label, count] for label, count in self.labels.items()],
            "sequences_per_shard": self.sequences_per_shard,
            "length": self.length,
            "packed": self.packed,
            "settings": dict(self.settings),
        }

    @cached_property
    def sha256(self) -> str:
        """Of :meth:`identity`; every shard carries it."""
        return sha256_of_json(self.identity())

    def document(self) -> dict[str, Json]:
        """What ``job.json`` says."""
        return {"job": self.identity(), "job_sha256": self.sha256, "remarks": dict(self.remarks)}

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        """Every shard, label by label."""
        return shards_of(self.labels, self.sequences_per_shard)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in all files together."""
        return sum(dtype.itemsize for dtype in COLUMNS.values()) + sum(hook.row_bytes for hook in self.hooks)

    def hook(self, name: str) -> StoredHook:
        """A stored hook, by any of its names.

        Raises:
            InputError: it is not stored; the nearest that are stand in the message.
        """
        for hook in self.hooks:
            if name == hook.name or name in hook.aliases:
                return hook
        stored = [hook.name for hook in self.hooks]
        raise InputError(f"{name!r} is not stored here. Nearest of what is: {', '.join(nearest(name, stored))}.")


def _hook_json(hook: StoredHook) -> dict[str, Json]:
    return {
        "name": hook.name,
        "aliases": list(hook.aliases),
        "axes": list(hook.axes),
        "shape": list(hook.shape),
        "dtype": hook.dtype,
    }


def job_of_json(document: Mapping[str, Any]) -> StoreJob:
    """The inverse of :meth:`StoreJob.document`.

    Raises:
        StoreError: another format, or a description that has been changed.
        KeyError, TypeError, ValueError, AttributeError: it is no such document.
    """
    said = document["job"]
    if said["format"] != FORMAT or said["format_version"] != FORMAT_VERSION:
        raise StoreError(
            f"The folder holds {said['format']!r} of version {said['format_version']}; this Pellucid reads version "
            f"{FORMAT_VERSION} of {FORMAT!r}."
        )
    hooks = tuple(
        StoredHook(
            str(hook["name"]),
            tuple(map(str, hook["aliases"])),
            tuple(map(str, hook["axes"])),
            tuple(map(int, hook["shape"])),
            str(hook["dtype"]),
        )
        for hook in said["hooks"]
    )
    if any(hook.dtype not in DTYPES for hook in hooks):
        raise StoreError(f"A stored type is one of {', '.join(DTYPES)}; found {[hook.dtype for hook in hooks]}.")
    job = StoreJob(
        hooks,
        {str(label): int(count) for label, count in said["labels"]},
        int(said["sequences_per_shard"]),
        int(said["length"]),
        bool(said["packed"]),
        dict(said["settings"]),
        dict(document["remarks"]),
    )
    if job.sha256 != document["job_sha256"]:
        raise StoreError("The description of the job does not have the checksum that stands beside it.")
    return job


# -- the folder --------------------------------------------------------------------------------------------------------


class StoreFolder(JobFolder):
    """A folder that activations are written to.

    Args:
        path: the folder.
        job: what it holds.
    """

    def __init__(self, path: Path, job: StoreJob) -> None:
        super().__init__(path, job.sha256, len(job.shards), (*(hook.name for hook in job.hooks), ROWS))
        self.job = job

    @classmethod
    def begin(cls, path: Path, job: StoreJob) -> StoreFolder:
        """Begin a job in a folder, or go on with the same one; see :func:`~pellucid.scale.job_folder.open_job`."""
        open_job(path, job.document())
        return cls(path, job)

    def write_shard(self, shard: Shard, tensors: Mapping[str, Tensor], columns: Mapping[str, Tensor]) -> ShardRecord:
        """Write a shard's files, then its record.

        Args:
            shard: which.
            tensors: ``[rows, d]`` by hook, contiguous, on the CPU.
            columns: ``[rows]`` by name, see :data:`COLUMNS`.

        Raises:
            StorageFullError: no space is left.
            StoreError: values that are not finite in float16.
        """
        rows = len(columns["token"])
        self._refuse_overflow(shard, tensors)
        about: dict[str, Json] = {
            "job": self.job.sha256,
            "shard": shard.index,
            "label": shard.label,
            "sequences": [shard.first, shard.stop],
        }
        what, files = f"shard {shard.index} of {len(self.job.shards)}", {}
        for hook in self.job.hooks:
            tensor, more = tensors[hook.name], _hook_json(hook)
            chunks = list(safetensors_chunks({hook.name: tensor}, to_line(about | {"hook": more}, compact=True)))
            path = self.file(shard.index, hook.name)
            files[hook.name] = write_whole(path, chunks, what=what, size=tensor.nbytes)
        chunks = list(safetensors_chunks(columns, to_line(about, compact=True)))
        size = sum(column.nbytes for column in columns.values())
        files[ROWS] = write_whole(self.file(shard.index, ROWS), chunks, what=what, size=size)
        return self.write_record(ShardRecord(shard.index, rows, files))

    def _refuse_overflow(self, shard: Shard, tensors: Mapping[str, Tensor]) -> None:
        """Half precision ends at 65,504, and what is above became infinite when it was cast."""
        for hook in self.job.hooks:
            if hook.dtype == "F16" and not bool(torch.isfinite(tensors[hook.name]).all()):
                raise StoreError(
                    f"{hook.name} in shard {shard.index} has values that float16 cannot hold: store it as bfloat16 or "
                    "float32, in another folder."
                )

    def finish(self) -> bool:
        """Write the manifest if every shard has its record; whether all have. Files are not read again.

        Raises:
            StorageFullError: no space is left.
        """
        records = []
        for shard in self.job.shards:
            try:
                record = self.read_record(shard.index)
            except StoreError:
                return False
            if self.damage(record, contents=False) is not None:
                return False
            records.append(record.to_json())
        rows = sum(int(str(record["rows"])) for record in records)
        text = to_json(self.job.document() | {"rows": rows, "shards": records}, sort_keys=True).encode()
        write_whole(self.path / MANIFEST_FILE, [text], what="the manifest", size=len(text))
        sync_folder(self.path)
        return True


def read_job(path: Path) -> StoreJob:
    """The job that a folder was begun with.

    Raises:
        StoreError: there is none, or it is damaged.
    """
    with json_errors(path / JOB_FILE):
        return job_of_json(read_document(path))


# -- writing while computing -------------------------------------------------------------------------------------------


@dataclass
class ShardBuffers:
    """Memory for one shard; used again for later ones.

    Attributes:
        tensors: ``[capacity, d]`` by hook.
        columns: ``[capacity]`` by name.
        rows: how many are filled.
    """

    tensors: dict[str, Tensor]
    columns: dict[str, Tensor]
    rows: int = 0

    @classmethod
    def of(cls, job: StoreJob, pinned: bool) -> ShardBuffers:
        """For the largest shard of a job."""
        largest = min(job.sequences_per_shard, max(job.labels.values()))
        capacity = largest * job.length
        return cls(
            {
                hook.name: torch.empty(capacity, hook.width, dtype=DTYPES[hook.dtype], pin_memory=pinned)
                for hook in job.hooks
            },
            {name: torch.empty(capacity, dtype=dtype) for name, dtype in COLUMNS.items()},
        )

    def filled(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The part of each that is filled."""
        return {name: tensor[: self.rows] for name, tensor in tensors.items()}


class ShardWriter:
    """Writes shards in a thread of its own while the next are computed; used in a ``with`` block.

    There are as many buffers as shards may be in memory: one is filled while others are written, and where the disk is
    slower than the model, :meth:`buffers` waits. Leaving the block waits for what is being written; if the block raised,
    shards that are not begun are left unwritten.

    Args:
        folder: where to.
        depth: how many buffers.
        pinned: in memory that a GPU copies to directly.
    """

    def __init__(self, folder: StoreFolder, depth: int = 2, pinned: bool = False) -> None:
        self._folder = folder
        self._free: queue.SimpleQueue[ShardBuffers | None] = queue.SimpleQueue()
        self._full: queue.SimpleQueue[tuple[Shard, ShardBuffers] | None] = queue.SimpleQueue()
        self._to_make, self._pinned = depth, pinned
        self._error: BaseException | None = None
        self._abandoned = threading.Event()
        self._thread = threading.Thread(target=self._write, name="pellucid-shard-writer", daemon=True)
        self.records: list[ShardRecord] = []
        """Of what this writer has written."""

    def __enter__(self) -> ShardWriter:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is not None:
            self._abandoned.set()
        self._full.put(None)
        self._thread.join()
        if kind is None:
            self._raise()

    def buffers(self) -> ShardBuffers:
        """Memory for the next shard.

        Raises:
            StorageFullError, OSError: an earlier shard could not be written.
        """
        self._raise()
        if self._to_make and self._free.empty():
            self._to_make -= 1
            return ShardBuffers.of(self._folder.job, self._pinned)
        found = self._free.get()
        self._raise()
        assert found is not None
        found.rows = 0
        return found

    def submit(self, shard: Shard, buffers: ShardBuffers) -> None:
        """Write a shard when those before it are written; the buffers are the writer's from now on."""
        self._raise()
        self._full.put((shard, buffers))

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _write(self) -> None:
        while (job := self._full.get()) is not None:
            shard, buffers = job
            if self._error is None and not self._abandoned.is_set():
                try:
                    columns = buffers.filled(buffers.columns)
                    self.records.append(self._folder.write_shard(shard, buffers.filled(buffers.tensors), columns))
                except BaseException as error:
                    self._error = error
            self._free.put(buffers)
