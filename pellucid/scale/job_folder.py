"""A folder that one job belongs to, and its shards: which are done, and that no other job is mixed in.

``job.json`` says what decides every byte and is written first, once. A shard's record ``00000.json`` has the lengths and
checksums of the shard's files and is written last: a shard is done when its record is there and its files are as it says.
There are no locks: two that compute one shard write the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pellucid.errors import InputError, OtherJobError, StoreError
from pellucid.storage.json_text import Json, differences, json_errors, read_exact_json, to_json
from pellucid.storage.whole_files import (
    FileRecord,
    hash_file,
    remove_abandoned_parts,
    sync_folder,
    write_new,
    write_whole,
)

JOB_FILE, MANIFEST_FILE = "job.json", "manifest.json"


@dataclass(frozen=True)
class Shard:
    """Which sequences a shard holds: those of one label, ``first`` up to, not including, ``stop``."""

    index: int
    label: str
    first: int
    stop: int


def shards_of(labels: Mapping[str, int], sequences_per_shard: int) -> tuple[Shard, ...]:
    """Every shard of a corpus, label by label.

    Args:
        labels: how many sequences each has.
        sequences_per_shard: of one label; its last shard may have fewer.
    """
    found: list[Shard] = []
    for label, count in labels.items():
        for first in range(0, count, sequences_per_shard):
            found.append(Shard(len(found), label, first, min(count, first + sequences_per_shard)))
    return tuple(found)


# -- the job -----------------------------------------------------------------------------------------------------------


def open_job(path: Path, document: Mapping[str, Json]) -> None:
    """Begin a job in a folder, or go on with the same one. What killed writers left there is cleared away.

    Args:
        path: the folder; made if it is not there.
        document: ``job`` (what decides the bytes), ``job_sha256`` and ``remarks``.

    Raises:
        OtherJobError: the folder holds another job, with what differs; or files of someone else's.
        InputError: it is a file.
        StorageFullError: there is no space.
        StoreError: ``job.json`` is damaged.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is not a folder: give another folder to write to.")
    path.mkdir(parents=True, exist_ok=True)
    if not (path / JOB_FILE).exists():
        strange = sorted(entry.name for entry in path.iterdir() if not _is_ours(entry.name))
        if strange:
            raise OtherJobError(
                f"{path} holds files that are no shards ({', '.join(strange[:3])}{', ...' * (len(strange) > 3)}): give "
                "an empty folder, or one where this job was begun."
            )
        write_new(path / JOB_FILE, to_json(document, sort_keys=True))
    try:
        found = read_document(path)
    except StoreError as error:
        raise StoreError(f"{error} Remove that file and give the same command again: sound shards are kept.") from error
    different = differences(found["job"], document["job"])
    if different:
        raise OtherJobError(
            f"{path} was begun by another job, and shards of two jobs do not mix. It has "
            + "; ".join(different)
            + ". Give the settings it was begun with, or another folder."
        )
    remove_abandoned_parts(path)


def read_document(path: Path) -> dict[str, Any]:
    """What ``job.json`` says.

    Raises:
        StoreError: there is none, or it is damaged.
    """
    file = path / JOB_FILE
    with json_errors(file):
        found: dict[str, Any] = read_exact_json(file)
        if set(found) != {"job", "job_sha256", "remarks"}:
            raise ValueError("it has other entries")
    return found


def _is_ours(name: str) -> bool:
    return bool(re.fullmatch(r"\..*\.part|\d{5,}\..*", name)) or name in (JOB_FILE, MANIFEST_FILE)


# -- the folder --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardRecord:
    """What a shard's files have to be.

    Attributes:
        shard: its number.
        rows: how many it has.
        files: length and checksum by hook, and of ``ROWS``.
    """

    shard: int
    rows: int
    files: Mapping[str, FileRecord]

    def to_json(self) -> dict[str, Json]:
        """As it stands in the record and in the manifest."""
        return {
            "shard": self.shard,
            "rows": self.rows,
            "files": {name: {"bytes": file.bytes, "sha256": file.sha256} for name, file in self.files.items()},
        }


def record_of_json(document: Mapping[str, Any], n_shards: int, names: Sequence[str]) -> ShardRecord:
    """The inverse of :meth:`ShardRecord.to_json`.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: it is no such document, or not one of this job.
    """
    files = {name: FileRecord(int(file["bytes"]), str(file["sha256"])) for name, file in document["files"].items()}
    record = ShardRecord(int(document["shard"]), int(document["rows"]), files)
    if not 0 <= record.shard < n_shards or set(files) != set(names):
        raise ValueError("it names a shard or files that the job does not have")
    return record


class JobFolder:
    """Shards and their records in a folder. File names come from the job, never from a file in the folder.

    Args:
        path: the folder.
        sha256: of the job.
        n_shards: how many it has.
        names: of a shard's files.
    """

    def __init__(self, path: Path, sha256: str, n_shards: int, names: Sequence[str]) -> None:
        self.path, self.sha256, self.n_shards, self.names = path, sha256, n_shards, tuple(names)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, {self.n_shards} shards)"

    def file(self, shard: int, name: str) -> Path:
        """One file of a shard."""
        return self.path / f"{shard:05d}.{name}.safetensors"

    def record_file(self, shard: int) -> Path:
        """The record that says a shard is done."""
        return self.path / f"{shard:05d}.json"

    def write_record(self, record: ShardRecord) -> ShardRecord:
        """Say that a shard is done, when its files are on the disk under their names.

        Raises:
            StorageFullError: no space is left.
        """
        sync_folder(self.path)
        document: Json = {"job_sha256": self.sha256, "shard": record.to_json()}
        text = to_json(document, sort_keys=True).encode()
        what = f"shard {record.shard} of {self.n_shards}"
        write_whole(self.record_file(record.shard), [text], what=what, size=len(text))
        sync_folder(self.path)
        return record

    def read_record(self, shard: int) -> ShardRecord:
        """What a shard's files have to be.

        Raises:
            StoreError: there is no record, or it is damaged.
        """
        path = self.record_file(shard)
        with json_errors(path):
            document = read_exact_json(path)
            if document["job_sha256"] != self.sha256 or document["shard"]["shard"] != shard:
                raise StoreError(f"{path} is of another job or shard: it was put here by hand.")
            return record_of_json(document["shard"], self.n_shards, self.names)

    def damage(self, record: ShardRecord, *, contents: bool = True) -> str | None:
        """What is wrong with a shard's files, naming each; ``None`` if nothing is.

        Args:
            record: what its files have to be.
            contents: check every byte; otherwise lengths only.
        """
        found = [self._file_damage(record.shard, name, expected, contents) for name, expected in record.files.items()]
        wrong = [what for what in found if what is not None]
        return f"shard {record.shard} is damaged: {', '.join(wrong)}" if wrong else None

    def _file_damage(self, shard: int, name: str, expected: FileRecord, contents: bool) -> str | None:
        path = self.file(shard, name)
        try:
            size = path.stat().st_size
            if size != expected.bytes:
                return f"{path.name} has {size:,} bytes and should have {expected.bytes:,}"
            if contents and hash_file(path) != expected:
                return f"{path.name} does not have its checksum"
        except FileNotFoundError:
            return f"{path.name} is missing"
        return None

    def is_done(self, shard: int) -> bool:
        """Whether a shard is there and every byte of it is right."""
        try:
            record = self.read_record(shard)
        except StoreError:
            return False
        return self.damage(record) is None
