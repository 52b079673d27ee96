"""Files: the bytes of the safetensors library, whole or not there, and damage that is found."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

from pellucid.errors import InputError, StorageFullError, StoreError
from pellucid.storage.json_text import to_line
from pellucid.storage.safetensors_files import (
    METADATA_KEY,
    as_tensor,
    map_tensor,
    read_header,
    read_safetensors,
    safetensors_chunks,
    write_safetensors,
)
from pellucid.storage.whole_files import hash_file, remove_abandoned_parts, write_new, write_whole

TENSORS = {
    "token": torch.arange(7, dtype=torch.int32),
    "wide": torch.linspace(0, 1, 35).reshape(7, 5),
    "half": torch.randn(7, 3, generator=torch.Generator().manual_seed(0)).to(torch.float16),
    "brain": torch.randn(7, 3, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16),
    "document": torch.arange(7) * 2**40,
    "double": torch.randn(7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2)),
}
SAID = {"z": 1, "a": ["b", "ü"], "m": {"y": None, "x": 1.5}}
ABOUT = to_line(SAID, compact=True)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The kernel refuses to let any file of this process grow over ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("names", [list(TENSORS), ["wide"], ["token", "brain"], ["half", "document", "token"]])
def test_the_bytes_are_those_of_the_safetensors_library(names: list[str]) -> None:
    tensors = {name: TENSORS[name] for name in names}
    text = json.dumps(SAID, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert b"".join(safetensors_chunks(tensors, ABOUT)) == save(tensors, metadata={METADATA_KEY: text})


def test_the_order_in_which_things_are_given_does_not_reach_the_bytes() -> None:
    turned = dict(reversed(list(TENSORS.items())))
    expected = b"".join(safetensors_chunks(TENSORS, ABOUT))
    assert b"".join(safetensors_chunks(turned, to_line(dict(reversed(list(SAID.items()))), compact=True))) == expected


def test_what_is_written_is_read_and_mapped(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    record = write_whole(path, list(safetensors_chunks(TENSORS, ABOUT)), what="it", size=0)
    assert record == hash_file(path)
    assert record.bytes == path.stat().st_size
    places, about = read_header(path)
    assert about == SAID
    with safe_open(path, "pt") as file:
        for name, place in places.items():
            mapped = as_tensor(map_tensor(path, place), place.dtype)
            assert torch.equal(mapped, TENSORS[name])
            assert torch.equal(mapped, file.get_tensor(name))
            mapped.zero_()  # copy on write: the file keeps its bytes
    assert hash_file(path) == record
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_an_empty_tensor(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_whole(path, list(safetensors_chunks({"x": torch.empty(0, 4)}, "{}")), what="it", size=0)
    places, _ = read_header(path)
    assert map_tensor(path, places["x"]).shape == (0, 4)


def test_a_whole_file_is_read_into_memory_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {**TENSORS, "number": torch.tensor(3), "none": torch.empty(0, 4)}
    write_safetensors(path, tensors, ABOUT)
    assert path.read_bytes() == save(tensors, metadata={METADATA_KEY: ABOUT})
    before = hash_file(path)
    found, about = read_safetensors(path)
    assert about == SAID
    assert found.keys() == tensors.keys()
    for name, tensor in found.items():
        assert tensor.dtype == tensors[name].dtype
        assert tensor.shape == tensors[name].shape
        assert torch.equal(tensor, tensors[name])
        tensor.zero_()
    assert hash_file(path) == before
    with pytest.raises(StoreError, match=r"y\.safetensors is missing"):
        read_safetensors(tmp_path / "y.safetensors")


def test_tensors_that_share_memory_or_lie_apart_are_written_as_they_are(tmp_path: Path) -> None:
    square = torch.arange(9.0).view(3, 3)
    tensors = {"a": square, "b": square[1:], "c": square.T}
    write_safetensors(tmp_path / "x", tensors, "{}")
    found, _ = read_safetensors(tmp_path / "x")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_type_that_cannot_be_written_is_named_and_nothing_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"before")
    with pytest.raises(InputError, match=r"one of torch\.int64, .*; z is torch\.complex64"):
        write_safetensors(tmp_path / "x", {"z": torch.zeros(2, dtype=torch.complex64)}, "{}")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x", b"before")]


@given(place=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_any_flipped_bit_changes_the_checksum(tmp_path_factory: pytest.TempPathFactory, place: int, bit: int) -> None:
    data = bytearray(b"".join(safetensors_chunks(TENSORS, ABOUT)))
    data[place % len(data)] ^= 1 << bit
    path = tmp_path_factory.mktemp("x") / "x.safetensors"
    path.write_bytes(b"".join(safetensors_chunks(TENSORS, ABOUT)))
    before = hash_file(path)
    path.write_bytes(data)
    assert hash_file(path) != before


@given(data=st.binary(max_size=300))
def test_a_header_of_anything_is_refused_and_never_followed(
    data: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("x") / "x.safetensors"
    path.write_bytes(len(data).to_bytes(8, "little") + data)
    with pytest.raises(StoreError, match=r"x\.safetensors"):
        read_header(path)


@pytest.mark.parametrize("length", [0, 5, 8, 200, 600])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"".join(safetensors_chunks(TENSORS, ABOUT))[:length])
    with pytest.raises(StoreError, match="cut off"):
        read_header(path)


def test_no_space_leaves_nothing_behind_and_says_what_is_needed(tmp_path: Path) -> None:
    path, chunks = tmp_path / "x.safetensors", list(safetensors_chunks({"x": torch.zeros(10_000)}, "{}"))
    with largest_file(20_000):
        with pytest.raises(StorageFullError, match=r"shard 3 of 9: x\.safetensors needs 40,000 bytes") as caught:
            write_whole(path, chunks, what="shard 3 of 9", size=40_000)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EFBIG  # the kernel's refusal, not a pretended one
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_replaced_keeps_its_bytes_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_whole(path, [b"old"], what="it", size=3)

    def chunks() -> Iterator[bytes]:
        yield b"new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, chunks(), what="it", size=3)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_only_parts_that_nobody_writes_are_removed(tmp_path: Path) -> None:
    abandoned, held = tmp_path / ".a.1.part", tmp_path / ".b.2.part"
    for path in (abandoned, held, tmp_path / "c.part", tmp_path / "d"):
        path.write_bytes(b"x")
    descriptor = os.open(held, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        assert remove_abandoned_parts(tmp_path) == 1
    finally:
        os.close(descriptor)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.2.part", "c.part", "d"]
    assert remove_abandoned_parts(tmp_path) == 1


def test_a_part_that_was_cleared_away_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, calls = tempfile.mkdtemp, []

    def vanish_once(**given: Any) -> str:
        calls.append(make(**given))
        if len(calls) == 1:  # before it is locked
            Path(calls[0]).rmdir()
        return calls[-1]

    monkeypatch.setattr("pellucid.storage.whole_files.tempfile.mkdtemp", vanish_once)
    write_whole(tmp_path / "x", [b"data"], what="it", size=4)
    assert (tmp_path / "x").read_bytes() == b"data"
    assert len(calls) == 2


def test_of_two_that_write_a_new_file_one_does(tmp_path: Path) -> None:
    assert write_new(tmp_path / "x", "first")
    assert not write_new(tmp_path / "x", "second")
    assert (tmp_path / "x").read_text() == "first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]
