"""One parameter with other values for the length of a block, under TransformerLens' name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.errors import InputError, KindError


@contextmanager
def temporarily_swap_parameter(parameter: Any, new_value: Any) -> Iterator[nn.Parameter]:
    """Write ``new_value`` into a parameter, and its own values back at the end, by an exception too.

    Args:
        parameter: a live ``nn.Parameter``, which stays the object that it is.
        new_value: a tensor of its shape and dtype, on any device.

    Raises:
        KindError: no parameter, or no plain tensor.
        InputError: another shape or dtype; one of them has no values (the meta device).
    """
    if not isinstance(parameter, nn.Parameter):
        raise KindError(f"parameter must be a torch.nn.Parameter; got {type(parameter).__name__}")
    if isinstance(new_value, nn.Parameter) or not isinstance(new_value, Tensor):
        raise KindError(f"new_value must be a plain torch.Tensor; got {type(new_value).__name__}")
    for what in ("shape", "dtype"):
        found, wanted = getattr(new_value, what), getattr(parameter, what)
        if found != wanted:
            raise InputError(f"new_value {what} {found} must match parameter {what} {wanted}")
    for what, given in (("parameter", parameter), ("new_value", new_value)):
        if given.is_meta:
            raise InputError(
                f"{what} is on the meta device and has no values: load it, or put it where its values are."
            )
    before = parameter.detach().clone()
    try:
        with torch.no_grad():
            parameter.copy_(new_value)
        yield parameter
    finally:
        with torch.no_grad():
            parameter.copy_(before)
