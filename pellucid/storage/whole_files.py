"""The one writer of files: each is there whole, or not at all, and never written through a link that was planted.

A file is first a draft, which then takes its place in one step. The draft lies beside it in a folder whose name cannot be
guessed and that nobody else may enter. Whoever writes a draft holds a lock on its folder, which the kernel takes away with
the process: so what a killed process left is known, and removed when the same file is written, or the same job is begun,
again.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pellucid.errors import StorageFullError

if sys.platform != "win32":
    import fcntl

PART = ".part"
"""How the name of a draft ends; it begins with a dot and the name of its file."""

CHUNK = 8 * 2**20
"""Bytes that are hashed and written at a time."""

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_AS_IT_WAS = "What was there before is as it was; make room and do it again."
_GOES_ON = (
    "What was written before is whole and stays. Make room and give the same command again; it goes on from there."
)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A draft to write to by its name, which takes the place of ``path`` if the block ends well and is removed if not.

    Raises:
        StorageFullError: no space is left.
    """
    remove_abandoned_parts(path.parent, path.name)
    with _full_disk_told(str(path), _AS_IT_WAS), _draft_file(path) as draft:
        yield draft


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """The same for a folder that is not there yet, or is empty.

    Raises:
        StorageFullError: no space is left.
    """
    remove_abandoned_parts(path.parent, path.name)
    with _full_disk_told(str(path), _AS_IT_WAS), _draft_folder(path) as folder:
        draft = folder / path.name
        draft.mkdir()
        yield draft
        if path.exists():
            path.rmdir()
        os.replace(draft, path)


@contextmanager
def _draft_file(path: Path) -> Iterator[Path]:
    with _draft_folder(path) as folder:
        draft = folder / path.name
        draft.touch(exist_ok=False)
        mode = stat.S_IMODE(draft.stat().st_mode)  # some libraries make files that only their owner may read
        yield draft
        draft.chmod(mode)
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)


@contextmanager
def _draft_folder(path: Path) -> Iterator[Path]:
    """A locked folder beside ``path`` that only this user may enter; gone after the block, with what is in it."""
    folder, descriptor = _locked_folder(path)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor >= 0:
            os.close(descriptor)


def _locked_folder(path: Path) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.{os.getpid()}.", suffix=PART, dir=path.parent))
        if sys.platform == "win32":
            return folder, -1
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # cleared away as abandoned in the instant before it was locked
            continue
        with suppress(OSError):  # a file system without locks: drafts are cleared away by hand there
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if folder.exists():
            return folder, descriptor
        os.close(descriptor)


@contextmanager
def _full_disk_told(subject: str, advice: str) -> Iterator[None]:
    """Say that there is no space for something, whatever library meets it.

    Raises:
        StorageFullError: no space is left.
    """
    try:
        yield
    except StorageFullError:
        raise
    except Exception as error:
        number = _error_number(error)
        if number not in _FULL:
            raise
        raise StorageFullError(f"No space for {subject} ({os.strerror(number)}). {advice}") from error


def _error_number(error: Exception) -> int:
    """The system's number of an error; safetensors has one of its own kind, with the number in its words."""
    if isinstance(error, OSError):
        return error.errno or 0
    from safetensors import SafetensorError

    found = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
    return int(found[1]) if found else 0


# -- from bytes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileRecord:
    """What a file has to be.

    Attributes:
        bytes: its length.
        sha256: of all its bytes, header included, in hexadecimal.
    """

    bytes: int
    sha256: str


def write_whole(path: Path, chunks: Iterable[bytes | memoryview], *, what: str, size: int) -> FileRecord:
    """Write one of the files of a job that is gone on with: it is there with all its bytes, on the disk, or not at all.

    Whoever writes the same file at the same time writes the same bytes, and the last rename stands. The folder has to be
    synced afterwards (:func:`sync_folder`) for the name to outlive a power failure, and cleared of abandoned drafts when
    the job begins (:func:`remove_abandoned_parts`): it may have too many files to look for them at each.

    Args:
        path: the file; one of that name is replaced.
        chunks: what it holds.
        what: what it is, for an error.
        size: how many bytes are coming, for an error.

    Raises:
        StorageFullError: no space is left, with what is needed.
        OSError: the folder cannot be written.
    """
    digest, written = hashlib.sha256(), 0
    with (
        _full_disk_told(f"{what}: {path.name} needs {size:,} bytes", _GOES_ON),
        _draft_file(path) as draft,
        draft.open("wb") as file,
    ):
        for chunk in chunks:
            digest.update(chunk)
            written += file.write(chunk)
    return FileRecord(written, digest.hexdigest())


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


def write_new(path: Path, text: str) -> bool:
    """Write a small file unless one of that name is there; whether we did. Of several who try, one does."""
    with _full_disk_told(str(path), _AS_IT_WAS), _draft_folder(path) as folder:
        draft = folder / path.name
        write_whole(draft, [text.encode()], what=path.name, size=len(text.encode()))
        try:
            os.link(draft, path)  # unlike a rename, this does not replace
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            if path.exists():
                return False
            os.replace(draft, path)
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


def remove_abandoned_parts(folder: Path, name: str | None = None) -> int:
    """Remove the drafts that killed writers left; how many those were.

    A writer holds a lock on its draft, which the kernel takes away with the process: a draft that can be locked has no
    writer. Nothing else is decided by these locks, so none can be in the way. Links are left as they are.

    Args:
        folder: where.
        name: drafts of this file only.
    """
    removed = 0
    if sys.platform == "win32" or not folder.is_dir():
        return removed
    ours = re.compile(r"\..+\.part" if name is None else rf"\.{re.escape(name)}\.\d+\..+\.part", re.DOTALL)
    for part in [entry for entry in folder.iterdir() if ours.fullmatch(entry.name)]:
        try:
            descriptor = os.open(part, os.O_RDONLY | os.O_NONBLOCK | _NO_LINK)
        except OSError:  # gone meanwhile, or a link, or another user's
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # being written, or a file system without locks
            continue
        else:
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                shutil.rmtree(part, ignore_errors=True)
            else:
                part.unlink(missing_ok=True)
            removed += 1
        finally:
            os.close(descriptor)
    return removed
