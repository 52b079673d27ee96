"""What the functions of this room are given, said in one wording: tensors, ids, axes, tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pellucid.arguments import check_kind, check_whole
from pellucid.errors import InputError


def check_tensor(argument: str, value: Any, what: str = "a tensor", axes: Sequence[int] | None = None) -> Tensor:
    """A tensor; with ``axes``, one with so many axes.

    Raises:
        InputError: something else.
    """
    tensor: Tensor = check_kind(argument, value, Tensor, what)
    if axes is not None and tensor.dim() not in axes:
        raise InputError(f"{argument} is {what}; found shape {list(tensor.shape)}.")
    return tensor


def check_floating(argument: str, value: Any) -> Tensor:
    """A tensor of floating-point numbers.

    Raises:
        InputError: something else.
    """
    tensor = check_tensor(argument, value, "a tensor of floating-point numbers")
    if not tensor.is_floating_point():
        raise InputError(f"{argument} is a tensor of floating-point numbers; found {tensor.dtype}.")
    return tensor


def check_ids(
    argument: str, value: Any, what: str, axes: Sequence[int] | None = None, d_vocab: int | None = None
) -> Tensor:
    """A tensor of whole numbers; with ``d_vocab``, of ids below it.

    Raises:
        InputError: something else.
    """
    tensor = check_tensor(argument, value, what, axes)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise InputError(f"{argument} is {what}, whole numbers; found {tensor.dtype}.")
    if d_vocab is not None and tensor.numel():
        low, high = (int(end) for end in tensor.aminmax())
        if low < 0 or high >= d_vocab:
            raise InputError(
                f"{argument} is ids from 0 to {d_vocab - 1}, as many as there are logits; found {low} to {high}."
            )
    return tensor


def check_axis(argument: str, value: Any, tensor: Tensor) -> int:
    """An axis of a tensor, negative ones counted from the end.

    Raises:
        InputError: something else.
    """
    if not -tensor.dim() <= check_whole(argument, value) < tensor.dim():
        raise InputError(f"{argument}={value} is no axis of a tensor {list(tensor.shape)}.")
    return int(value)


def check_tokenizer(tokenizer: Any, *attributes: str) -> None:
    """Something with these attributes of a tokenizer of Hugging Face's.

    Raises:
        InputError: one is missing.
    """
    missing = [name for name in attributes if not hasattr(tokenizer, name)]
    if missing:
        raise InputError(f"tokenizer is one of Hugging Face's; {type(tokenizer).__name__} has no {missing[0]}.")


def check_dataset(dataset: Any, col_name: str) -> None:
    """A data set of the library ``datasets`` with a column of that name.

    Raises:
        InputError: something else, columns that are not known before it is read, no such column.
    """
    if not (hasattr(dataset, "features") and hasattr(dataset, "remove_columns")):
        raise InputError(f"dataset is a data set of the library datasets; found {type(dataset).__name__}.")
    if dataset.features is None:
        raise InputError(
            "The columns of dataset are not known before it is read: give one that says them, as load_dataset(..., "
            "features=...) does."
        )
    if col_name not in dataset.features:
        raise InputError(
            f"dataset has no column {col_name!r}: its columns are {', '.join(map(repr, dataset.features))}."
        )
