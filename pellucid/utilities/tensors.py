"""Small functions of tensors, under TransformerLens' names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from pellucid.arguments import check_count, check_mapping, check_text
from pellucid.errors import InputError
from pellucid.padding import position_ids
from pellucid.utilities.checks import check_axis, check_tensor

V = TypeVar("V")


def to_numpy(tensor: Any) -> Any:
    """A tensor, list, tuple, number, string or array as a NumPy array; bfloat16, which NumPy has not, as float32.

    Raises:
        InputError: something else; rows of several lengths; a tensor without values, or of a dtype that NumPy has not.
    """
    if isinstance(tensor, np.ndarray):
        return tensor
    try:
        if isinstance(tensor, Tensor):
            here = tensor.detach().cpu()
            return (here.float() if here.dtype == torch.bfloat16 else here).numpy()
        if isinstance(tensor, list | tuple | int | float | bool | str):
            return np.array(tensor)
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"to_numpy: NumPy has no array of tensor, a {type(tensor).__name__}: {error}") from error
    raise InputError(
        f"to_numpy takes a tensor, an array, a list or a number: invalid type: {type(tensor).__name__} was found."
    )


def get_corner(tensor: Any, n: int = 3) -> Any:
    """The first ``n`` entries along every axis of a tensor, an array or a factored matrix, for looking at."""
    check_count("n", n, 0)
    if not (hasattr(tensor, "ndim") and hasattr(tensor, "__getitem__")):
        raise InputError(f"tensor is a tensor, an array or a FactoredMatrix; found {type(tensor).__name__}.")
    return tensor[tuple(slice(n) for _ in range(tensor.ndim))]


def remove_batch_dim(tensor: Tensor) -> Tensor:
    """``tensor[0]`` where the first axis has size 1; any other tensor as it is."""
    _check_shaped("tensor", tensor)
    return tensor[0] if tensor.ndim > 0 and tensor.shape[0] == 1 else tensor


def _check_shaped(argument: str, value: Any) -> None:
    if not isinstance(value, Tensor | np.ndarray):
        raise InputError(f"{argument} is a tensor; found {type(value).__name__}.")


def transpose(tensor: Tensor) -> Tensor:
    """``[..., a, b]`` to ``[..., b, a]``.

    Raises:
        InputError: fewer axes than two.
    """
    if check_tensor("tensor", tensor, "a tensor [..., a, b]").dim() < 2:
        raise InputError(f"tensor is a tensor [..., a, b]; found shape {list(tensor.shape)}.")
    return tensor.transpose(-1, -2)


def is_square(x: Tensor) -> bool:
    """Whether it is a matrix with as many rows as columns."""
    _check_shaped("x", x)
    return x.ndim == 2 and x.shape[0] == x.shape[1]


def is_lower_triangular(x: Tensor) -> bool:
    """Whether it is a square matrix with zeros above the diagonal."""
    check_tensor("x", x)
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
    check_tensor("t1", t1)
    check_tensor("t2", t2)
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
    """``[batch, pos]`` position ids of a mask, without those of the first ``past_kv_pos_offset`` columns; 0 at padding.

    Raises:
        InputError: no mask, or more columns than it has.
    """
    check_tensor("attention_mask", attention_mask, "a tensor [batch, pos]", (2,))
    check_count("past_kv_pos_offset", past_kv_pos_offset, 0, attention_mask.shape[1])
    return position_ids(attention_mask)[:, past_kv_pos_offset:]


def get_cumsum_along_dim(tensor: Tensor, dim: int, reverse: bool = False) -> Tensor:
    """Cumulative sums along an axis, from its end if ``reverse``.

    Raises:
        InputError: no such axis.
    """
    check_axis("dim", dim, check_tensor("tensor", tensor))
    return tensor.flip(dim).cumsum(dim).flip(dim) if reverse else tensor.cumsum(dim)


def repeat_along_head_dimension(tensor: Tensor, n_heads: int, clone_tensor: bool = True) -> Tensor:
    """``[batch, pos, d_model]`` to ``[batch, pos, n_heads, d_model]``; a view without ``clone_tensor``."""
    check_count("n_heads", n_heads)
    if check_tensor("tensor", tensor, "a tensor [batch, pos, d_model]").dim() == 0:
        raise InputError("tensor is a tensor [batch, pos, d_model]; found a scalar.")
    repeated = tensor.unsqueeze(-2).expand(*tensor.shape[:-1], n_heads, tensor.shape[-1])
    return repeated.clone() if clone_tensor else repeated


def filter_dict_by_prefix(dictionary: Mapping[str, V], prefix: str) -> dict[str, V]:
    """The entries below ``prefix`` (a dotted path, with or without its last dot), named from there on."""
    check_text("prefix", prefix)
    for name in check_mapping("dictionary", dictionary, "names to values"):
        if not isinstance(name, str):
            raise InputError(f"dictionary maps names to values; found the key {name!r} ({type(name).__name__}).")
    start = prefix if prefix.endswith(".") else prefix + "."
    return {name.removeprefix(start): value for name, value in dictionary.items() if name.startswith(start)}
