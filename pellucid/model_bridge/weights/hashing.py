"""A hash over a model's weights: what a stored result belongs to."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from pellucid.model_bridge.generalized_components.weights import stored_parts

CHUNK = 2**26


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over every parameter and buffer of the state: name, dtype, shape and bytes, in the order of the names.

    A quantised weight is hashed as it is stored: its integers, scales and zero points.

    Raises:
        WeightError: weights that are not in memory (offloaded), or that cannot be read.
    """
    whole = hashlib.sha256()
    known: dict[tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...]], str] = {}
    for name, value in sorted(model.state_dict(keep_vars=True).items()):
        for kind, tensor in stored_parts(name, value):
            key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
            if key not in known or type(value) is not nn.Parameter:  # tied weights are read once
                known[key] = tensor_hash(tensor)
            whole.update(f"{kind} {known[key]}\n".encode())
    return whole.hexdigest()


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 over the bytes of a tensor that needs no gradient."""
    digest = hashlib.sha256()
    data = tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
    for part in data.split(CHUNK):
        digest.update(part.cpu().numpy().data)
    return digest.hexdigest()
