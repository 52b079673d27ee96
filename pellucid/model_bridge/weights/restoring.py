"""The original weights put back, from copies or from the checkpoint."""

from __future__ import annotations

import os
from typing import cast

import torch
from torch import Tensor, nn

from pellucid.errors import WeightError
from pellucid.model_bridge.hooking.mounting import ComponentTree
from pellucid.model_bridge.weights.all_or_nothing import undisturbed
from pellucid.model_bridge.weights.legality import plain_parameters
from pellucid.model_bridge.weights.record import parameter_at, record_of
from pellucid.model_bridge.weights.unembedding_table import say_tied


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
        source = read_checkpoint(checkpoint)
        tied = "lm_head.weight" not in source
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
        lacking = [path for path, _ in plain_parameters(tree) if path not in source and not path.startswith("lm_head.")]
        if lacking:
            raise WeightError(
                f"{os.fspath(checkpoint)} lacks {lacking[0]} and {len(lacking) - 1} more of the model's weights."
            )
    head = cast(nn.Linear, tree.components["unembed"].module)
    with undisturbed(), torch.no_grad():
        for path, value in source.items():
            cast(nn.Parameter, places[path]).detach().copy_(value)
        if "lm_head.bias" not in source:
            head.register_parameter("bias", None)
        if tied:
            head.weight = cast(nn.Parameter, tree.components["embed"].module.weight)
            say_tied(tree, True)
        record.clear()


def read_checkpoint(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files by the names a ``BloomForCausalLM`` has; lazily mapped, not copied.

    Raises:
        WeightError: no such files.
    """
    from safetensors.torch import load_file

    names = (
        sorted(name for name in os.listdir(folder) if name.endswith(".safetensors")) if os.path.isdir(folder) else []
    )
    if not names:
        raise WeightError(f"{os.fspath(folder)} is not a folder with .safetensors files.")
    tensors: dict[str, Tensor] = {}
    for name in names:
        for key, value in load_file(os.path.join(os.fspath(folder), name)).items():
            tensors[key if key.startswith(("transformer.", "lm_head.")) else f"transformer.{key}"] = value
    return tensors
