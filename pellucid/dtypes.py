"""Casting to a dtype of a smaller range: a number that does not fit is an error that names it, not an infinity.

float16 ends at 65,504. The residual stream of a trained model goes beyond that, and ``tensor.to(torch.float16)`` then gives
``inf`` without a word.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pellucid.errors import InputError

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Those that activations are kept in, by range."""


def widened(tensor: Tensor) -> Tensor:
    """``tensor`` in float32 at least: what is computed from numbers of a model in half precision, and what numpy takes."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def check_dtype(dtype: torch.dtype | None) -> None:
    """Refuse a dtype in which activations are not kept.

    Raises:
        InputError: an integer dtype, say, which would cut every number off at its point.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype is one of {', '.join(map(str, DTYPES))}; found {dtype!r}.")


def cast(tensor: Tensor, dtype: torch.dtype | None, what: str, device: torch.device | str | None = None) -> Tensor:
    """``tensor`` as ``dtype`` on ``device``; integers keep their dtype.

    The lowest number of a dtype is what Hugging Face adds to a masked score, and becomes the lowest of the other dtype.

    Args:
        tensor: of any shape.
        dtype: ``None`` for its own.
        what: what the tensor is, for the error.
        device: ``None`` for its own.

    Raises:
        InputError: a finite value that is infinite in ``dtype``; says what, the value, and which dtypes hold it.
    """
    if dtype is None or not tensor.is_floating_point():
        return tensor.to(device=device)
    made = tensor.to(device=device, dtype=dtype)
    old, new = torch.finfo(tensor.dtype), torch.finfo(dtype)
    if new.max >= old.max or not bool(made.isinf().any()):
        return made
    made = torch.where((tensor == old.min).to(made.device), new.min, made)
    lost = made.isinf() & tensor.isfinite().to(made.device)
    if not bool(lost.any()):
        return made
    largest = float(tensor[lost.to(tensor.device)].abs().max())
    holding = [str(each) for each in DTYPES if torch.finfo(each).max > largest and each is not dtype]
    raise InputError(
        f"{what} has values up to {largest:.6g} in size, and {dtype} ends at {new.max:.6g}: they would be infinite. "
        f"Take {' or '.join(holding)}."
    )
