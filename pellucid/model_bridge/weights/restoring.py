"""The original weights put back, from copies or from the checkpoint."""

from __future__ import annotations

import os
import re
from typing import cast

import torch
from torch import Tensor, nn

from pellucid.errors import WeightError
from pellucid.model_bridge.hooking.mounting import ComponentTree
from pellucid.model_bridge.weights.all_or_nothing import undisturbed
from pellucid.model_bridge.weights.legality import plain_parameters
from pellucid.model_bridge.weights.record import parameter_at, record_of
from pellucid.model_bridge.weights.unembedding_table import head_of, say_tied, weight_path


def unprocess(tree: ComponentTree, checkpoint: str | os.PathLike[str] | None = None) -> None:
    """Put the original weights back, in place; ties that processing undid are tied again.

    Args:
        tree: the model's components.
        checkpoint: folder with the safetensors files the model was loaded from; not needed after ``keep_originals``.

    Raises:
        WeightError: neither originals nor a checkpoint, or one that does not fit. Nothing was changed then.
    """
    record = record_of(tree)
    if record.originals is not None:
        source, tied = dict(record.originals), record.was_tied
    elif checkpoint is not None:
        source = read_checkpoint(checkpoint, tree)
        tied = weight_path(tree, "unembed") not in source
    elif not any(record.done.values()):
        return
    else:
        raise WeightError(
            "The original weights were not kept: pass the folder of the checkpoint (unprocess_weights(folder)), or process "
            "with keep_originals=True."
        )
    places = {path: parameter_at(tree.root, path) for path in source}
    for path, value in source.items():
        place = places.get(path)
        if place is None or place.shape != value.shape:
            found = "no such parameter" if place is None else f"shape {tuple(place.shape)}"
            raise WeightError(f"{path} {tuple(value.shape)} of the original weights does not fit the model: {found}.")
    if checkpoint is not None and record.originals is None:
        head_path = tree.components["unembed"].path
        lacking = [
            path for path, _ in plain_parameters(tree) if path not in source and not path.startswith(f"{head_path}.")
        ]
        if lacking:
            raise WeightError(
                f"{os.fspath(checkpoint)} lacks {lacking[0]} and {len(lacking) - 1} more of the model's weights."
            )
    head = head_of(tree)
    with undisturbed(), torch.no_grad():
        for path, value in source.items():
            cast(nn.Parameter, places[path]).detach().copy_(value)
        if f"{tree.components['unembed'].path}.bias" not in source and not tree.adapter.family.outside.head_has_bias:
            head.register_parameter("bias", None)
        if tied:
            head.weight = cast(nn.Parameter, tree.components["embed"].module.weight)
            say_tied(tree, True)
        record.clear()


def read_checkpoint(folder: str | os.PathLike[str], tree: ComponentTree) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files by the names that the model has; lazily mapped, not copied.

    A checkpoint may have been saved without the head. What the model's class says it ignores (masks of old) is left out.

    Raises:
        WeightError: no such files.
    """
    from safetensors.torch import load_file

    names = (
        sorted(name for name in os.listdir(folder) if name.endswith(".safetensors")) if os.path.isdir(folder) else []
    )
    if not names:
        raise WeightError(f"{os.fspath(folder)} is not a folder with .safetensors files.")
    outside, tensors = tree.adapter.family.outside, dict[str, Tensor]()
    ignored = getattr(tree.root, "_keys_to_ignore_on_load_unexpected", None) or ()
    if tree.adapter.family.mlp.router:
        ignored = (".",)  # files name each expert, the model all of them together, and processing changes none
    whole, head = f"{outside.backbone.partition('.')[0]}.", outside.head_in_files or outside.head
    for name in names:
        for key, value in load_file(os.path.join(os.fspath(folder), name)).items():
            owner, _, last = key.rpartition(".")
            if owner in (head, outside.head):
                path = f"{outside.head}.{last}"
            else:
                path = key if key.startswith(whole) else f"{whole}{key}"
            if parameter_at(tree.root, path) is not None or not any(re.search(pattern, path) for pattern in ignored):
                tensors[path] = value
    return tensors
