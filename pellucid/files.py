"""Files are written whole or not at all: to a draft beside the place, which then takes the place in one step."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
