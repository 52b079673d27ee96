"""A hash over a model's weights: what a stored result belongs to."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from pellucid.errors import WeightError

CHUNK = 2**26


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over every parameter and buffer of the state: name, dtype, shape and bytes, in the order of the names.

    Raises:
        WeightError: weights that are not in memory (offloaded).
    """
    whole = hashlib.sha256()
    known: dict[tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...]], str] = {}
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if tensor.is_meta:
            raise WeightError(f"{name} is not in memory (offloaded), so the model's weights cannot be hashed.")
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if key not in known:  # tied weights are read once
            known[key] = tensor_hash(tensor.detach())
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {known[key]}\n".encode())
    return whole.hexdigest()


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 over the bytes of a tensor that needs no gradient."""
    digest = hashlib.sha256()
    data = tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
    for part in data.split(CHUNK):
        digest.update(part.cpu().numpy().data)
    return digest.hexdigest()
