"""ALiBi, the linear position bias (Press et al. 2022, arXiv 2108.12409), as BLOOM has it.

BLOOM adds ``slope * position of the key`` and not ``-slope * distance``: the two differ by a constant along each row of
scores, which the softmax does not see. Positions count attended tokens, so left padding shifts them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pellucid.errors import InputError


def build_alibi_slopes(num_heads: int, device: torch.device | str | None = None) -> Tensor:
    """One slope a head, ``[n_heads]`` float32.

    For ``n`` a power of two they are ``2^(-8/n), 2^(-16/n), ...``. Another head count (176B has 112) takes those of the
    next lower power of two, and then every other slope of the next higher one.

    Raises:
        InputError: fewer than one head.
    """
    if num_heads < 1:
        raise InputError(f"num_heads must be at least 1; found {num_heads}.")
    lower = 2 ** math.floor(math.log2(num_heads))

    def powers(count_of_series: int, exponents: Tensor) -> Tensor:
        base = torch.full((), 2 ** (-8 / count_of_series), dtype=torch.float32, device=device)
        return torch.pow(base, exponents)

    slopes = powers(lower, torch.arange(1, lower + 1, dtype=torch.int32, device=device))
    if lower == num_heads:
        return slopes
    odd = torch.arange(1, 2 * (num_heads - lower) + 1, 2, dtype=torch.int32, device=device)
    return torch.cat([slopes, powers(2 * lower, odd)])


def build_alibi_tensor(attention_mask: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
    """The bias of each key, ``[batch, n_heads, 1, key_pos]`` in ``dtype``.

    Hugging Face passes the same numbers as ``[batch * n_heads, 1, key_pos]``; ``BloomAttentionBridge`` takes both.

    Args:
        attention_mask: ``[batch, key_pos]``, 1 or True at real tokens.
        num_heads: attention heads.
        dtype: the model's. The product is rounded to it from float32, as Hugging Face does.

    Raises:
        InputError: a mask that is not two-dimensional.
    """
    if attention_mask.dim() != 2:
        raise InputError(f"attention_mask must be [batch, key_pos]; found shape {tuple(attention_mask.shape)}.")
    mask = attention_mask.long()
    positions = (mask.cumsum(-1) - 1) * mask
    slopes = build_alibi_slopes(num_heads, attention_mask.device)
    return (slopes[None, :, None, None] * positions[:, None, None, :]).to(dtype)
