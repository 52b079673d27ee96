"""Small functions of tensors, under TransformerLens' names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from pellucid.arguments import check_count, check_text, check_whole
from pellucid.errors import InputError
from pellucid.padding import position_ids

V = TypeVar("V")


def to_numpy(tensor: Any) -> Any:
    """A tensor, list, tuple, number, string or array as a NumPy array; bfloat16, which NumPy has not, as float32.

    Raises:
        InputError: something else.
    """
    if isinstance(tensor, np.ndarray):
        return tensor
    if isinstance(tensor, Tensor):
        here = tensor.detach().cpu()
        return (here.float() if here.dtype == torch.bfloat16 else here).numpy()
    if isinstance(tensor, list | tuple | int | float | bool | str):
        return np.array(tensor)
    raise InputError(
        f"to_numpy takes a tensor, an array, a list or a number: invalid type: {type(tensor).__name__} was found."
    )


def get_corner(tensor: Any, n: int = 3) -> Any:
    """The first ``n`` entries along every axis of a tensor, an array or a factored matrix, for looking at."""
    check_count("n", n, 0)
    return tensor[tuple(slice(n) for _ in range(tensor.ndim))]


def remove_batch_dim(tensor: Tensor) -> Tensor:
    """``tensor[0]`` where the first axis has size 1; any other tensor as it is."""
    return tensor[0] if tensor.ndim > 0 and tensor.shape[0] == 1 else tensor


def transpose(tensor: Tensor) -> Tensor:
    """``[..., a, b]`` to ``[..., b, a]``."""
    return tensor.transpose(-1, -2)


def is_square(x: Tensor) -> bool:
    """Whether it is a matrix with as many rows as columns."""
    return x.ndim == 2 and x.shape[0] == x.shape[1]


def is_lower_triangular(x: Tensor) -> bool:
    """Whether it is a square matrix with zeros above the diagonal."""
    return is_square(x) and bool(x.equal(x.tril()))


def check_structure(t1: Tensor, t2: Tensor, *, verbose: bool = False) -> None:
    """Print whether neighbours compare alike in two matrices, along rows and along columns.

    Args:
        t1: ``[rows, columns]``.
        t2: of the same shape.
        verbose: print what is compared.

    Raises:
        InputError: two matrices of one shape are needed.
    """
    if t1.ndim != 2 or t1.shape != t2.shape:
        raise InputError(f"check_structure compares two matrices of one shape; found {t1.shape} and {t2.shape}.")
    found = {}
    for what, one, other in (("row", t1, t2), ("column", t1.T, t2.T)):
        if verbose:
            print(f"Checking {what}s")  # noqa: T201 (the function prints, as TransformerLens' does)
        differs = (one[:-1].ge(one[1:]) != other[:-1].ge(other[1:])).any(-1)
        found[what] = differs.nonzero()[:, 0].tolist()
        if verbose:
            for place in found[what]:
                print(f"\t{what}s {place}:{place + 1}")  # noqa: T201
    mismatch = next(((what, places) for what, places in found.items() if places), None)
    print("PASSED" if mismatch is None else f"{mismatch[0]} mismatch: {mismatch[1]}")  # noqa: T201


def get_offset_position_ids(past_kv_pos_offset: int, attention_mask: Tensor) -> Tensor:
    """``[batch, pos]`` position ids of a mask, without those of the first ``past_kv_pos_offset`` columns; 0 at padding."""
    check_count("past_kv_pos_offset", past_kv_pos_offset, 0)
    return position_ids(attention_mask)[:, past_kv_pos_offset:]


def get_cumsum_along_dim(tensor: Tensor, dim: int, reverse: bool = False) -> Tensor:
    """Cumulative sums along an axis, from its end if ``reverse``.

    Raises:
        InputError: no such axis.
    """
    if not -tensor.dim() <= check_whole("dim", dim) < tensor.dim():
        raise InputError(f"dim={dim} is no axis of a tensor {list(tensor.shape)}.")
    return tensor.flip(dim).cumsum(dim).flip(dim) if reverse else tensor.cumsum(dim)


def repeat_along_head_dimension(tensor: Tensor, n_heads: int, clone_tensor: bool = True) -> Tensor:
    """``[batch, pos, d_model]`` to ``[batch, pos, n_heads, d_model]``; a view without ``clone_tensor``."""
    check_count("n_heads", n_heads)
    repeated = tensor.unsqueeze(-2).expand(*tensor.shape[:-1], n_heads, tensor.shape[-1])
    return repeated.clone() if clone_tensor else repeated


def filter_dict_by_prefix(dictionary: Mapping[str, V], prefix: str) -> dict[str, V]:
    """The entries below ``prefix`` (a dotted path, with or without its last dot), named from there on."""
    check_text("prefix", prefix)
    start = prefix if prefix.endswith(".") else prefix + "."
    return {name.removeprefix(start): value for name, value in dictionary.items() if name.startswith(start)}
