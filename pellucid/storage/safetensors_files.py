"""Safetensors files whose bytes are a function of what they hold: tensors, and one metadata key.

The key is :data:`METADATA_KEY`, its value the text of one JSON object. (The safetensors library keeps metadata in a hash
map: several keys come in another order in another process.) The header is written here and not by the library for two
reasons: data go from the tensor to the file without a copy, on their way through a checksum where there is one; and the
bytes are fixed. They are those that the library writes, and any safetensors reader reads them.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from pellucid.errors import InputError, StoreError
from pellucid.storage.json_text import Json
from pellucid.storage.whole_files import CHUNK, whole_file

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

MAX_HEADER = 100_000_000
"""The library's own limit: a damaged length must not make us read the whole file as JSON."""


# -- bytes -------------------------------------------------------------------------------------------------------------


def safetensors_chunks(tensors: Mapping[str, Tensor], about: str) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file: header, then each tensor's memory as it lies.

    Args:
        tensors: contiguous CPU tensors by name, of the types in :data:`DTYPES`.
        about: the text of one JSON object (:func:`~pellucid.storage.json_text.to_line`), for the one metadata key.

    Raises:
        InputError: a tensor of another type.
        StoreError: a machine that is not little-endian.
    """
    if sys.byteorder != "little":
        raise StoreError("Safetensors files are little-endian, and this machine is not: run it on another.")
    for name, tensor in tensors.items():
        if tensor.dtype not in _CODES:
            known = ", ".join(str(dtype) for dtype in _CODES)
            raise InputError(f"Tensors are written as one of {known}; {name} is {tensor.dtype}.")
    # The library's own order: wide types first, so that every tensor lies at a multiple of its width, then by name.
    order = list(DTYPES.values())
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))
    described: dict[str, Json] = {"__metadata__": {METADATA_KEY: about}}
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


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], about: str) -> None:
    """Write one file, whole or not at all: equal tensors and texts, equal bytes.

    Args:
        path: the file; one of that name is replaced.
        tensors: by name, on any device, of the types in :data:`DTYPES`. Several may share memory.
        about: see :func:`safetensors_chunks`.

    Raises:
        InputError: a tensor of another type.
        StorageFullError: no space is left.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as draft, draft.open("wb") as file:
        file.writelines(safetensors_chunks(plain, about))


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


def read_header(path: Path) -> tuple[dict[str, TensorPlace], Any]:
    """Where the tensors of a file are, and what its metadata key says, without reading any data.

    Raises:
        StoreError: the file is missing, cut off, or not one of ours.
    """
    try:
        with open(path, "rb") as file:
            return _read_header(file, path.name)
    except FileNotFoundError:
        raise StoreError(f"{path.name} is missing.") from None


def _read_header(file: BinaryIO, file_name: str) -> tuple[dict[str, TensorPlace], Any]:
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER):
        raise StoreError(f"{file_name} is cut off or damaged: its header is not whole.")
    try:
        described = json.loads(file.read(length))
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
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise StoreError(f"{file_name} is damaged, or no file of ours: its header cannot be read.") from error
    for name, place in places.items():
        if place.dtype not in DTYPES or min(place.shape, default=0) < 0 or place.offset < 8 + length:
            raise StoreError(f"{file_name} is damaged: the header's entry {name!r} makes no sense.")
        if place.end - place.offset != math.prod(place.shape) * DTYPES[place.dtype].itemsize:
            raise StoreError(f"{file_name} is damaged: the header's entry {name!r} makes no sense.")
        if place.end > size:
            raise StoreError(f"{file_name} is cut off: it has {size:,} bytes and should have at least {place.end:,}.")
    return places, about


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """A whole file in memory: its tensors by name, and what its metadata key says.

    Raises:
        StoreError: the file is missing, cut off, or not one of ours.
        OSError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            places, about = _read_header(file, path.name)
            file.seek(0)
            data = np.fromfile(file, dtype=np.uint8)
    except FileNotFoundError:
        raise StoreError(f"{path.name} is missing.") from None
    tensors = {}
    for name, place in places.items():
        array = data[place.offset : place.end].view(_VIEWS[place.dtype]).reshape(place.shape)
        tensors[name] = as_tensor(array, place.dtype)
    return tensors, about


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
