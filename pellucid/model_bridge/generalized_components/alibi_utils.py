"""ALiBi, the linear position bias (Press et al. 2022, arXiv 2108.12409), as BLOOM has it.

BLOOM adds ``slope * position of the key`` and not ``-slope * distance``: the two differ by a constant along each row of
scores, which the softmax does not see. Positions count attended tokens, so left padding shifts them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pellucid.errors import InputError
from pellucid.padding import places


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
    positions = places(attention_mask).clamp(min=0)  # padding has no place and, as in Hugging Face's, no bias
    slopes = build_alibi_slopes(num_heads, attention_mask.device)
    return (slopes[None, :, None, None] * positions[:, None, None, :]).to(dtype)


def add_mask_to_alibi(alibi: Tensor, attention_mask: Tensor | None, num_heads: int) -> Tensor | None:
    """ALiBi and mask as the one bias of a fused attention kernel.

    Where a position is not masked the bias is ALiBi to the bit. Where it is, the sum is the mask's ``finfo.min`` (ALiBi is
    lost in rounding), and so is any score that is added to it: a row in which everything is masked is uniform over all
    keys, as in Hugging Face's attention. Only float16 is too small for that: its ``finfo.min`` of -65504 keeps whatever is
    over 16 of a score, so that such rows follow Hugging Face's rounding and no kernel can give them.

    Args:
        alibi: ``[batch * n_heads, 1, key_pos]`` or ``[batch, n_heads, 1, key_pos]``.
        attention_mask: additive, ``[batch, 1, pos, key_pos]`` of the same dtype, or ``None``.
        num_heads: attention heads.

    Returns:
        ``[batch, n_heads, pos, key_pos]``, with 1 for ``batch`` where all rows are alike and 1 for ``pos`` without a mask;
        ``None`` in float16 where a row has everything masked.
    """
    if alibi.dim() == 3:
        alibi = alibi.unflatten(0, (-1, num_heads))
    if attention_mask is None:
        return alibi
    if attention_mask.dtype == torch.float16 and bool((attention_mask.amax(-1) < 0).any()):
        return None
    # Rows without padding share one bias: it is the only large tensor there is. Not worth a look for a single position.
    if attention_mask.shape[-2] > 1 and _rows_alike(attention_mask) and _rows_alike(alibi):
        alibi, attention_mask = alibi[:1], attention_mask[:1]
    return alibi + attention_mask


def _rows_alike(tensor: Tensor) -> bool:
    return tensor.stride(0) == 0 or torch.equal(tensor[1:], tensor[:-1])
