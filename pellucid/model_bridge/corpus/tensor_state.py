"""The state of an unfinished job whose numbers are tensors: one safetensors file, each tensor with its checksum."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pellucid.errors import InputError, StoreError
from pellucid.model_bridge.weights.hashing import tensor_hash
from pellucid.storage.json_text import Json, to_line
from pellucid.storage.safetensors_files import read_safetensors, write_safetensors


def write_tensor_state(
    path: Path, tensors: Mapping[str, Tensor], key: str, told: Mapping[str, Json], extra: Mapping[str, Any]
) -> None:
    """Write a state.

    Args:
        path: the file.
        tensors: by name.
        key: under which ``told`` is kept.
        told: what else the state consists of.
        extra: JSON beside it, such as the job.

    Raises:
        StorageFullError: no space is left.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    sha256: dict[str, Json] = {name: tensor_hash(tensor) for name, tensor in plain.items()}
    write_safetensors(path, plain, to_line({**extra, key: {**told, "sha256": sha256}}))


def read_tensor_state(path: Path, key: str, what: str) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """What :func:`write_tensor_state` was given: the tensors, ``told`` and ``extra``.

    Args:
        path: the file.
        key: under which ``told`` is kept.
        what: the job, for an error: ``"a fit"``.

    Raises:
        InputError: the file holds something else, or is damaged.
    """
    try:
        tensors, about = read_safetensors(path)
        told = about.pop(key)
        sha256 = told.pop("sha256")
        whole = all(tensor_hash(tensor) == sha256[name] for name, tensor in tensors.items())
    except (StoreError, OSError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} holds no state of {what}, or is damaged: {error!r}") from None
    if not whole:
        raise InputError(f"{path} is damaged: a tensor does not have the checksum it was written with. Begin anew.")
    return tensors, told, about
