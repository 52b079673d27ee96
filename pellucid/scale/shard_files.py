"""Safetensors files whose bytes are a function of what they hold, and JSON, in one form only.

:mod:`pellucid.files` writes them, and takes their SHA-256 from the bytes on their way to the disk. The safetensors header
is written here and not by the library for two reasons: data go from the array to the file without a copy, through the
checksum; and the bytes are fixed. (The library keeps metadata in a hash map: several keys come in another order in another
process. Ours is one key, a JSON object with its keys sorted.) Any safetensors reader reads them.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pellucid.errors import StoreError
from pellucid.files import FileRecord, Json

if TYPE_CHECKING:
    from numpy.typing import NDArray

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

CHUNK = 8 * 2**20
"""Bytes that are hashed and written at a time."""

MAX_HEADER = 2**20
"""Ours are below 4 KiB; a damaged length must not make us read the whole file as JSON."""


def to_json(value: Json) -> str:
    """JSON in one form only: keys sorted, nothing that is not JSON."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def sha256_of_json(value: Json) -> str:
    """The SHA-256 of :func:`to_json`."""
    return hashlib.sha256(to_json(value).encode()).hexdigest()


# -- bytes -------------------------------------------------------------------------------------------------------------


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
