"""A shape rule written as an einops pattern; its reverse is the pattern read from right to left."""

from __future__ import annotations

from typing import Any

import einops
from torch import Tensor

from pellucid.conversion_utils.conversion_steps.base_tensor_conversion import BaseTensorConversion, TensorFilter


class RearrangeTensorConversion(BaseTensorConversion):
    """``einops.rearrange`` by ``pattern``, and back.

    Args:
        pattern: an einops pattern such as ``"batch pos (n h) -> batch pos n h"``.
        input_filter: see :class:`BaseTensorConversion`.
        output_filter: see :class:`BaseTensorConversion`.
        axes_lengths: sizes that the pattern leaves open, such as ``n=16``.

    Raises:
        ValueError: the pattern has no single ``->``.
    """

    def __init__(
        self,
        pattern: str,
        input_filter: TensorFilter | None = None,
        output_filter: TensorFilter | None = None,
        **axes_lengths: int,
    ) -> None:
        super().__init__(input_filter=input_filter, output_filter=output_filter)
        sides = [side.strip() for side in pattern.split("->")]
        if len(sides) != 2:
            raise ValueError(f"An einops pattern has one '->'; found {pattern!r}.")
        self.pattern = pattern
        self.axes_lengths = axes_lengths
        self._reverse = f"{sides[1]} -> {sides[0]}"

    def handle_conversion(self, input_value: Tensor, *full_context: Any) -> Tensor:
        """Rearrange from left to right."""
        return einops.rearrange(input_value, self.pattern, **self.axes_lengths)

    def revert(self, input_value: Tensor, *full_context: Any) -> Tensor:
        """Rearrange from right to left."""
        return einops.rearrange(input_value, self._reverse, **self.axes_lengths)

    def __repr__(self) -> str:
        lengths = "".join(f", {axis}={length}" for axis, length in self.axes_lengths.items())
        return f"RearrangeTensorConversion({self.pattern!r}{lengths})"
