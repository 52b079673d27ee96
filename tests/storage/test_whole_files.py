"""The one writer of files: drafts that a kill left are gone at the next start, and no planted link is followed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from pellucid.errors import StorageFullError
from pellucid.running_stats import CountPositive, save_statistics
from pellucid.storage.whole_files import remove_abandoned_parts, whole_file, whole_folder, write_new, write_whole

KILLED = """
import os, signal
from pathlib import Path
from pellucid.storage.whole_files import whole_file, whole_folder, write_whole
path = Path({path!r})
def kill():
    os.kill(os.getpid(), signal.SIGKILL)
if {how!r} == "file":
    with whole_file(path) as draft:
        draft.write_bytes(b"half"); kill()
elif {how!r} == "folder":
    with whole_folder(path) as draft:
        (draft / "a").write_bytes(b"half"); kill()
else:
    import pellucid.storage.whole_files as files
    files.os.fsync = lambda descriptor: kill()
    write_whole(path, [b"half"], what="it", size=4)
"""


def write_file(path: Path) -> None:
    with whole_file(path) as draft:
        draft.write_bytes(b"whole")


def write_folder(path: Path) -> None:
    with whole_folder(path) as draft:
        (draft / "a").write_bytes(b"whole")


def write_bytes(path: Path) -> None:
    write_whole(path, [b"whole"], what="it", size=5)


WRITERS: dict[str, Callable[[Path], None]] = {"file": write_file, "folder": write_folder, "bytes": write_bytes}


@pytest.mark.parametrize("how", WRITERS)
def test_what_a_kill_left_is_removed_by_the_next_start(how: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    done = subprocess.run([sys.executable, "-c", KILLED.format(path=str(path), how=how)], cwd=Path(__file__).parents[2])
    assert done.returncode == -signal.SIGKILL
    left = [entry.name for entry in tmp_path.iterdir()]
    assert len(left) == 1
    assert left[0].endswith(".part")
    if how == "bytes":
        assert remove_abandoned_parts(tmp_path) == 1  # what the start of a job calls: a store has many files
    WRITERS[how](path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("how", WRITERS)
def test_a_draft_that_is_being_written_is_left(how: str, tmp_path: Path) -> None:
    written = threading.Event()

    def other() -> None:
        with whole_file(tmp_path / "x") as draft:
            draft.write_bytes(b"other")
            written.set()
            finished.wait(10)

    finished = threading.Event()
    thread = threading.Thread(target=other)
    thread.start()
    assert written.wait(10)
    assert remove_abandoned_parts(tmp_path) == 0
    if how != "folder":
        WRITERS[how](tmp_path / "x")
    finished.set()
    thread.join()
    assert (tmp_path / "x").read_bytes() == b"other"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("how", WRITERS)
def test_a_planted_link_is_not_followed(how: str, tmp_path: Path) -> None:
    """Links at every name that a draft used to have, and at what looks like an abandoned draft."""
    target = tmp_path / "theirs"
    target.write_bytes(b"theirs")
    folder = tmp_path / "out"
    folder.mkdir()
    for name in (f".x.{os.getpid()}.part", ".x.1.part"):
        (folder / name).symlink_to(target)
    WRITERS[how](folder / "x")
    remove_abandoned_parts(folder)
    assert target.read_bytes() == b"theirs"
    assert not (folder / "x").is_symlink()
    with whole_file(folder / "y") as draft:
        assert draft.parent.stat().st_mode & 0o077 == 0  # nobody else can put a link where a library will write


def test_a_link_in_the_place_itself_is_replaced_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "theirs"
    target.write_bytes(b"theirs")
    for name, write in (("a", write_file), ("b", write_bytes)):
        (tmp_path / name).symlink_to(target)
        write(tmp_path / name)
        assert (tmp_path / name).read_bytes() == b"whole"
        assert not (tmp_path / name).is_symlink()
    (tmp_path / "c").symlink_to(tmp_path / "nowhere")
    assert not write_new(tmp_path / "c", "new")
    assert target.read_bytes() == b"theirs"


def test_others_may_read_what_they_could_read_of_a_plain_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    expected = (tmp_path / "plain").stat().st_mode
    save_statistics(tmp_path / "x", {"a": CountPositive()}, {})
    write_file(tmp_path / "y")
    write_bytes(tmp_path / "z")
    assert {(tmp_path / name).stat().st_mode for name in "xyz"} == {expected}


def raise_os() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def raise_safetensors() -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("fail", [raise_os, raise_safetensors])
def test_a_full_disk_is_told_in_a_sentence_whoever_meets_it(fail: Callable[[], None], tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"before")

    def write() -> None:
        with whole_file(tmp_path / "x"):
            fail()

    with pytest.raises(StorageFullError, match="No space for .*x .No space left on device.* as it was"):
        write()
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == b"before"


def test_the_kernels_own_refusal_is_told_too(tmp_path: Path) -> None:
    from tests.storage.test_safetensors_files import largest_file

    def write() -> None:
        with whole_file(tmp_path / "x") as draft:
            save_file({"a": torch.zeros(10_000)}, draft)

    with largest_file(20_000):
        with pytest.raises(StorageFullError, match="No space for"):
            write()
    assert list(tmp_path.iterdir()) == []


def test_another_error_is_left_as_it_is(tmp_path: Path) -> None:
    def write() -> None:
        with whole_file(tmp_path / "x"):
            raise SafetensorError("invalid")

    with pytest.raises(SafetensorError, match="invalid"):
        write()
    with pytest.raises(FileNotFoundError):
        write_file(tmp_path / "nowhere" / "x")
