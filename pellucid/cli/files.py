"""Files a command makes: never over an existing one unasked, and whole or not at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pellucid.errors import InputError

METADATA_KEY = "pellucid"
"""The one metadata key of our safetensors files, a JSON object: with several, their order in the file is not fixed."""


def refuse_out(path: Path, force: bool) -> None:
    """See, before anything is computed, that ``path`` can be written.

    Raises:
        InputError: it exists and ``force`` is off, or there is no such folder.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder: give a file in it.")
    if path.exists() and not force:
        raise InputError(f"{path} exists: give another --out, or --force to overwrite it.")
    if not path.parent.is_dir():
        raise InputError(f"There is no folder {path.parent}: make it first, or give another --out.")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"The folder {path.parent} cannot be written: give another --out.")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to, which takes its place if the block ends well and is removed if not."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        draft.touch()
        mode = stat.S_IMODE(draft.stat().st_mode)  # safetensors makes files that only their owner may read
        yield draft
        draft.chmod(mode)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
