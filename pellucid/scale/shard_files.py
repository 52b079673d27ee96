"""Files that are whole or not there: safetensors whose bytes are a function of what they hold, and JSON.

A file is written under a temporary name, synced, and renamed; its SHA-256 is taken from the bytes on their way to the disk.
The safetensors header is written here and not by the library for two reasons: data go from the array to the file without
a copy, through the checksum; and the bytes are fixed. (The library keeps metadata in a hash map: several keys come in
another order in another process. Ours is one key, a JSON object with its keys sorted.) Any safetensors reader reads them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pellucid.errors import StorageFullError, StoreError

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    from numpy.typing import NDArray

Json: TypeAlias = "str | int | float | bool | Sequence[Json] | Mapping[str, Json] | None"

METADATA_KEY = "pellucid"
"""The one metadata key of our safetensors files, a JSON object."""

DTYPES: Mapping[str, torch.dtype] = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
"""What safetensors calls the types that we store, in the order in which its library puts them into a file."""

_CODES = {dtype: code for code, dtype in DTYPES.items()}
_VIEWS: Mapping[str, str] = {"F64": "<f8", "F32": "<f4", "BF16": "<u2", "F16": "<f2", "I64": "<i8", "I32": "<i4"}
"""As what numpy maps them; it has no bfloat16, which is looked at as 16 bits."""

PART = ".part"
CHUNK = 8 * 2**20
"""Bytes that are hashed and written at a time."""

MAX_HEADER = 2**20
"""Ours are below 4 KiB; a damaged length must not make us read the whole file as JSON."""

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True)
class FileRecord:
    """What a file has to be.

    Attributes:
        bytes: its length.
        sha256: of all its bytes, header included, in hexadecimal.
    """

    bytes: int
    sha256: str


def to_json(value: Json) -> str:
    """JSON in one form only: keys sorted, nothing that is not JSON."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def sha256_of_json(value: Json) -> str:
    """The SHA-256 of :func:`to_json`."""
    return hashlib.sha256(to_json(value).encode()).hexdigest()


# -- writing -----------------------------------------------------------------------------------------------------------


def safetensors_chunks(tensors: Mapping[str, Tensor], about: Mapping[str, Json]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file: header, then each tensor's memory as it lies.

    Args:
        tensors: contiguous CPU tensors by name, of the types in :data:`DTYPES`.
        about: goes into the one metadata key.
    """
    if sys.byteorder != "little":
        raise StoreError("Shards are little-endian files, and this machine is not: run the job on another.")
    # The library's own order: wide types first, so that every tensor lies at a multiple of its width, then by name.
    order = list(DTYPES.values())
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))
    described: dict[str, Json] = {
        "__metadata__": {METADATA_KEY: json.dumps(about, sort_keys=True, separators=(",", ":"), ensure_ascii=False)}
    }
    end = 0
    for name in names:
        tensor = tensors[name]
        assert tensor.is_contiguous()
        start, end = end, end + tensor.nbytes
        described[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        flat = tensors[name].detach().reshape(-1).view(torch.uint8).numpy().data
        for place in range(0, len(flat), CHUNK):
            yield flat[place : place + CHUNK]


def write_whole(path: Path, chunks: Iterable[bytes | memoryview], *, what: str, size: int) -> FileRecord:
    """Write a file so that it is there with all its bytes, on the disk, or not at all.

    Whoever writes the same file at the same time writes the same bytes, and the last rename stands. The folder has to be
    synced afterwards (:func:`sync_folder`) for the name to outlive a power failure.

    Args:
        path: the file; one of that name is replaced.
        chunks: what it holds.
        what: what it is, for an error.
        size: how many bytes are coming, for an error.

    Raises:
        StorageFullError: no space is left, with what is needed.
        OSError: the folder cannot be written.
    """
    kept = list(chunks)  # references, not copies
    for attempt in (1, 2, 3):
        try:
            return _write_once(path, kept)
        except FileNotFoundError:
            # Someone who cleared abandoned parts met ours in the instant before it was locked.
            if attempt == 3 or not path.parent.is_dir():
                raise
        except OSError as error:
            if error.errno in _FULL:
                raise StorageFullError(
                    f"No space for {what}: {path.name} needs {size:,} bytes ({error.strerror}). What was written before is "
                    "whole and stays. Make room and give the same command again; it goes on from there."
                ) from error
            raise
    raise AssertionError


def _write_once(path: Path, chunks: Iterable[bytes | memoryview]) -> FileRecord:
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}{PART}")
    digest, written = hashlib.sha256(), 0
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with open(descriptor, "wb", buffering=0) as file:
            _lock(descriptor)
            for chunk in chunks:
                digest.update(chunk)
                rest = memoryview(chunk)
                while rest:
                    rest = rest[file.write(rest) :]
                written += len(chunk)
            os.fsync(descriptor)
            os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    return FileRecord(written, digest.hexdigest())


def write_new(path: Path, text: str) -> bool:
    """Write a small file unless one of that name is there; whether we did. Of several who try, one does."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}{PART}")
    write_whole(draft, [text.encode()], what=path.name, size=len(text.encode()))
    try:
        os.link(draft, path)  # unlike a rename, this does not replace
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if path.exists():
            return False
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


def sync_folder(folder: Path) -> None:
    """See that the names in a folder are on the disk."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_abandoned_parts(folder: Path) -> int:
    """Remove what killed writers left; how many files that were.

    A writer holds a lock on its part, which the kernel takes away with the process: a part that can be locked has no
    writer. Nothing else is decided by these locks, so none can be in the way.
    """
    removed = 0
    if sys.platform == "win32":
        return removed
    for part in folder.glob(f".*{PART}"):
        try:
            descriptor = os.open(part, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # being written, or a file system without locks
            continue
        else:
            part.unlink(missing_ok=True)
            removed += 1
        finally:
            os.close(descriptor)
    return removed


def _lock(descriptor: int) -> None:
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # a file system without locks: parts are cleared away by hand there
        return


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies in a safetensors file.

    Attributes:
        dtype: safetensors' name of its type, a key of :data:`DTYPES`.
        shape: its sizes.
        offset: of its first byte from the beginning of the file.
        end: of the byte after its last.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    end: int


def read_header(path: Path) -> tuple[dict[str, TensorPlace], dict[str, Json]]:
    """Where the tensors of a file are, and its metadata, without reading any data.

    Raises:
        StoreError: the file is missing, cut off, or not one of ours.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise StoreError(f"{path.name} is cut off or damaged: its header is not whole.")
            text = file.read(length)
    except FileNotFoundError:
        raise StoreError(f"{path.name} is missing.") from None
    try:
        described = json.loads(text)
        about = json.loads(described.pop("__metadata__")[METADATA_KEY])
        places = {
            name: TensorPlace(
                entry["dtype"],
                tuple(map(int, entry["shape"])),
                8 + length + int(entry["data_offsets"][0]),
                8 + length + int(entry["data_offsets"][1]),
            )
            for name, entry in described.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise StoreError(f"{path.name} is damaged, or no shard of ours: its header cannot be read.") from error
    for name, place in places.items():
        if place.dtype not in DTYPES or min(place.shape, default=0) < 0 or place.offset < 8 + length:
            raise StoreError(f"{path.name} is damaged: the header's entry {name!r} makes no sense.")
        expected = int(np.prod(place.shape, dtype=np.int64)) * DTYPES[place.dtype].itemsize
        if place.end - place.offset != expected:
            raise StoreError(f"{path.name} is damaged: the header's entry {name!r} makes no sense.")
        if place.end > size:
            raise StoreError(f"{path.name} is cut off: it has {size:,} bytes and should have at least {place.end:,}.")
    return places, about


def map_tensor(path: Path, place: TensorPlace) -> NDArray[np.generic]:
    """A tensor of a file, mapped and not read; bfloat16 comes as ``uint16`` (see :func:`as_tensor`).

    The mapping is copy-on-write: what is written to it never reaches the file.
    """
    if place.end == place.offset:
        return np.zeros(place.shape, dtype=_VIEWS[place.dtype])
    return np.memmap(path, dtype=_VIEWS[place.dtype], mode="c", offset=place.offset, shape=place.shape)


def as_tensor(array: NDArray[np.generic], dtype: str) -> Tensor:
    """A mapped array, or rows of one, as the tensor it is; the memory is shared."""
    tensor = torch.from_numpy(np.asarray(array))
    return tensor.view(torch.bfloat16) if dtype == "BF16" else tensor


def hash_file(path: Path) -> FileRecord:
    """Length and SHA-256 of a file.

    Raises:
        FileNotFoundError: there is none.
    """
    digest, size = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return FileRecord(size, digest.hexdigest())


@contextmanager
def json_errors(path: Path) -> Iterator[None]:
    """Say which JSON file cannot be read.

    Raises:
        StoreError: it is missing, or what it says makes no sense.
    """
    try:
        yield
    except FileNotFoundError:
        raise StoreError(f"{path} is missing.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{path} is damaged, or none of ours ({type(error).__name__}: {error}).") from error
