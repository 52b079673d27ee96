"""Files of fitted lenses: matrices in safetensors, and whose they are.

A lens of another model reads nonsense that looks like sense. So a file says which weights it was fitted on, by hash,
and is refused beside others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import torch
from jaxtyping import Shaped
from torch import Tensor

from pellucid.arguments import check_choice, check_kind, check_path
from pellucid.dtypes import cast as cast_to
from pellucid.dtypes import check_dtype
from pellucid.errors import InputError, StoreError
from pellucid.experiments.labelled import Attribute
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.model_bridge.weights.hashing import tensor_hash
from pellucid.storage.json_text import Json, to_line
from pellucid.storage.safetensors_files import read_safetensors, write_safetensors
from pellucid.tables import BriefFields

Check: TypeAlias = Literal["weights", "unembedding", "sizes"]
"""What of the model has to be as it was fitted on: every weight; the final norm and the head, which is quicker; or the sizes
alone, for weights that are the same in another dtype."""

FORMAT = 1


@dataclass(frozen=True, eq=False, repr=False)
class LensFile(BriefFields):
    """What a file holds.

    Attributes:
        kind: of the lens.
        tensors: by name.
        made_by: what made it.
        whose: hashes and sizes of the model.
    """

    kind: str
    tensors: Mapping[str, Shaped[Tensor, "..."]]
    made_by: Mapping[str, Attribute]
    whose: Mapping[str, Any]


def identity_of(bridge: TransformerBridge) -> dict[str, Any]:
    """Hashes and sizes of a model, which a lens belongs to."""
    cfg = bridge.cfg
    return {
        "d_model": cfg.d_model,
        "n_layers": cfg.n_layers,
        "d_vocab": cfg.d_vocab,
        "dtype": str(cfg.dtype).removeprefix("torch."),
        "weights_sha256": bridge.weights_hash(),
        "unembedding_sha256": unembedding_hash(bridge),
    }


def unembedding_hash(bridge: TransformerBridge) -> str:
    """SHA-256 over the final norm and the head: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for part in (bridge.ln_final, bridge.unembed):
        for name, tensor in sorted(cast(torch.nn.Module, part.module).state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor_hash(tensor)}\n".encode())
    return digest.hexdigest()


def write_lens(path: str | Path, file: LensFile, dtype: torch.dtype | None) -> None:
    """Write a lens.

    Raises:
        InputError: no path, no dtype; a number that the dtype cannot hold.
        StorageFullError: no space is left.
    """
    check_dtype(dtype)
    tensors = {name: cast_to(tensor.detach(), dtype, name).cpu().contiguous() for name, tensor in file.tensors.items()}
    about: dict[str, Json] = {
        "lens": file.kind,
        "format": FORMAT,
        "made_by": dict(file.made_by),
        "whose": dict(file.whose),
        "sha256": {name: tensor_hash(tensor) for name, tensor in tensors.items()},
    }
    write_safetensors(check_path("path", path), tensors, to_line(about))


def read_lens(path: str | Path, bridge: TransformerBridge, check: Check, kind: str | None) -> LensFile:
    """Read a lens, and see that it is of this model.

    Args:
        path: what :func:`write_lens` wrote.
        bridge: the model.
        check: what has to be equal.
        kind: of the lens; ``None`` for any.

    Raises:
        InputError: not such a file, a damaged one, another kind of lens, or a lens of another model.
    """
    check_choice("check", check, ("weights", "unembedding", "sizes"))
    check_kind("bridge", bridge, TransformerBridge, "a bridge")
    path = check_path("path", path)
    try:
        tensors, about = read_safetensors(path)
        found, sums = LensFile(about["lens"], tensors, about["made_by"], about["whose"]), about["sha256"]
        damaged = [name for name, tensor in tensors.items() if tensor_hash(tensor) != sums[name]]
    except (StoreError, OSError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} holds no lens, or is damaged: {error!r}") from None
    if damaged or about["format"] != FORMAT:
        why = f"{damaged[0]} does not have the checksum it was written with" if damaged else "its format is another one"
        raise InputError(f"{path} is damaged, or of another version of Pellucid: {why}.")
    if kind is not None and found.kind != kind:
        raise InputError(
            f"{path} holds a {found.kind} lens, and a {kind} lens was asked for: pellucid.analysis.lens.load_lens."
        )
    _refuse_another(path, found.whose, bridge, check)
    return found


def _refuse_another(path: Path, whose: Mapping[str, Any], bridge: TransformerBridge, check: Check) -> None:
    sizes = {"d_model": bridge.cfg.d_model, "n_layers": bridge.cfg.n_layers, "d_vocab": bridge.cfg.d_vocab}
    for name, size in sizes.items():
        if whose.get(name) != size:
            raise InputError(f"{path} is a lens of another model: its {name} is {whose.get(name)}, this one's {size}.")
    if check == "sizes":
        return
    name = f"{check}_sha256"
    now = bridge.weights_hash() if check == "weights" else unembedding_hash(bridge)
    if whose.get(name) == now:
        return
    dtype = str(bridge.dtype).removeprefix("torch.")
    hint = (
        f"It was fitted on {whose.get('dtype')} weights, and these are {dtype}: open the model in that dtype, or pass "
        "check='sizes'."
        if whose.get("dtype") != dtype
        else "Fit it on this model; check='sizes' compares sizes alone, for weights that you know to be near."
    )
    raise InputError(f"{path} is a lens of another model: it was fitted on other weights ({check}). {hint}")
