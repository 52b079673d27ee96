"""Files a command makes: never over an existing one unasked."""

from __future__ import annotations

import os
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
