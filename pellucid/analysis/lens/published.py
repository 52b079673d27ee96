"""Jacobian lenses as they are published: the files of the reference implementation, which TransformerLens reads and
writes too.

A ``torch.save`` of a dictionary, read with ``weights_only=True``, which runs no code: ``J`` maps the number of a block
to its matrix ``[d_model, d_model]`` (last residual, *output* of that block: layer + 1 here), ``n_prompts``,
``source_layers``, ``d_model``, and perhaps ``metadata``. A state of an unfinished fit has ``jacobian_sum`` and
``n_done`` instead. Such a file does not say on which weights it was fitted: sizes are all that can be checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pellucid.analysis.lens.jacobian import JacobianLens
from pellucid.arguments import check_kind, check_path
from pellucid.dtypes import cast, check_dtype
from pellucid.errors import InputError
from pellucid.experiments.labelled import Attribute
from pellucid.model_bridge.transformer_bridge import TransformerBridge
from pellucid.storage.whole_files import whole_file

ESTIMATOR = "jacobian_lens"


def load_published(path: str | Path, bridge: TransformerBridge) -> JacobianLens:
    """A published Jacobian lens on a model.

    Args:
        path: the file.
        bridge: the model, its weights raw. That it is the one of the lens is the caller's to know.

    Raises:
        InputError: not such a file, or a lens of a model of other sizes.
        WeightError: processed weights.
    """
    check_kind("bridge", bridge, TransformerBridge, "a bridge")
    path = check_path("path", path)
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
        count = int(held.get("n_prompts", held.get("n_done", 0)))
        finished = "J" in held
        matrices = {int(layer): matrix for layer, matrix in held["J" if finished else "jacobian_sum"].items()}
        about = dict(held.get("metadata") or {})
        about.setdefault("target_layer", held.get("target_layer"))
    except Exception as error:  # whatever a damaged file makes torch's reader raise
        raise InputError(f"{path} holds no published Jacobian lens, or is damaged: {error!r}"[:500]) from None
    if not finished:
        if count < 1:
            raise InputError(f"{path} is the state of a fit that has seen no prompt.")
        matrices = {layer: matrix.float() / count for layer, matrix in matrices.items()}
    _refuse_another(path, bridge, matrices, about)
    rows = torch.full((bridge.cfg.d_model,), count, dtype=torch.int64)
    made_by: dict[str, Attribute] = {"published": path.name, "fitted_prompts": count}
    made_by |= {f"published_{name}": value for name, value in about.items() if isinstance(value, str | int | float)}
    return JacobianLens(bridge, {layer + 1: matrix for layer, matrix in matrices.items()}, rows, made_by)


def save_published(lens: JacobianLens, path: str | Path, *, dtype: torch.dtype = torch.float16) -> None:
    """Write a lens as it is published: TransformerLens' ``JacobianLens.load`` and the reference implementation read it.

    Args:
        lens: one whose rows are all means of as many prompts; its layer 0 is left out.
        path: the file, ``.pt``; one of that name is replaced.
        dtype: of the matrices.

    Raises:
        InputError: rows of different numbers of prompts, no layer but 0, a number that ``dtype`` cannot hold.
        StorageFullError: no space is left.
    """
    check_kind("lens", lens, JacobianLens, "a Jacobian lens")
    check_dtype(dtype)
    counts = set(lens.rows.tolist())
    if len(counts) != 1:
        raise InputError(
            f"Such a file has one number of prompts; the rows of this lens are of {min(counts)} to {max(counts)}."
        )
    matrices = {
        layer - 1: cast(matrix.cpu().contiguous(), dtype, f"J.{layer}")
        for layer, matrix in lens.matrices.items()
        if layer > 0
    }
    if not matrices:
        raise InputError("Such a file has outputs of blocks; this lens has layer 0 only, the embedding.")
    held = {
        "J": matrices,
        "n_prompts": counts.pop(),
        "source_layers": sorted(matrices),
        "d_model": lens.bridge.cfg.d_model,
    }
    with whole_file(check_path("path", path)) as draft:
        torch.save(held, draft)


def _refuse_another(
    path: Path, bridge: TransformerBridge, matrices: Mapping[int, Any], about: Mapping[str, Any]
) -> None:
    cfg = bridge.cfg
    shapes = {tuple(matrix.shape) if isinstance(matrix, Tensor) else () for matrix in matrices.values()}
    if shapes != {(cfg.d_model, cfg.d_model)}:
        raise InputError(
            f"{path} is a lens of another model: its matrices are {sorted(shapes)}, and d_model is {cfg.d_model} here."
        )
    outside = sorted(layer for layer in matrices if not 0 <= layer < cfg.n_layers - 1)
    if outside:
        raise InputError(
            f"{path} is a lens of another model: it has outputs of the blocks {outside}, and those before the last are 0 to "
            f"{cfg.n_layers - 2} here."
        )
    target = about.get("target_layer")
    if target is not None and int(target) != cfg.n_layers - 1:
        raise InputError(
            f"{path} is of the effect on block {target}'s output; a lens is of the last one's, {cfg.n_layers - 1}."
        )
    estimator = about.get("estimator", ESTIMATOR)
    if estimator != ESTIMATOR:
        raise InputError(f"{path} was estimated as {estimator!r}; this reads {ESTIMATOR!r}.")
