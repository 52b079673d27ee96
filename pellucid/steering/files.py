"""Files of directions and of steering: safetensors, with everything that is no tensor as JSON in the one metadata key."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

from jaxtyping import Float
from torch import Tensor

from pellucid.arguments import check_path
from pellucid.errors import InputError, StoreError
from pellucid.storage.json_text import Json, to_line
from pellucid.storage.safetensors_files import read_safetensors, write_safetensors
from pellucid.version import __version__

Kind: TypeAlias = Literal["direction", "samples", "steering"]

FORMAT = 1
"""Counted up when a file says the same things in another way."""


def write(
    path: str | os.PathLike[str], kind: Kind, about: Mapping[str, Json], tensors: Mapping[str, Float[Tensor, "..."]]
) -> None:
    """Write one file, whole or not at all.

    Raises:
        InputError: a path that does not end in ``.safetensors``.
        StorageFullError: no space is left.
    """
    file = check_path("path", path)
    if file.suffix != ".safetensors":
        raise InputError(f"path is a safetensors file: give it that ending, {file.with_suffix('.safetensors')}.")
    said = {"kind": kind, "format": FORMAT, "pellucid": __version__, **about}
    write_safetensors(file, tensors, to_line(said))


def read(path: str | os.PathLike[str], kind: Kind) -> tuple[dict[str, Float[Tensor, "..."]], Any]:
    """What :func:`write` wrote.

    Raises:
        StoreError: the file is missing, damaged, or of another kind.
    """
    file = Path(check_path("path", path)).expanduser()
    tensors, about = read_safetensors(file)
    found = about.get("kind") if isinstance(about, dict) else None
    if found != kind:
        what = f"holds {found}" if found in ("direction", "samples", "steering") else "is none of steering's files"
        raise StoreError(f"{file} {what}; {kind} was asked for.")
    if about.get("format") != FORMAT:
        raise StoreError(f"{file} has format {about.get('format')}, which this version of Pellucid does not read.")
    return tensors, about


@contextmanager
def damage(path: str | os.PathLike[str]) -> Iterator[None]:
    """Say which file makes no sense.

    Raises:
        StoreError: what it holds cannot be understood.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, InputError) as error:
        raise StoreError(f"{os.fspath(path)} is damaged: {type(error).__name__}: {error}") from error
