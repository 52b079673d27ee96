"""The contract of a shape rule: what a hook sees is ``convert(tensor)``, what goes on is ``revert`` of what it leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

TensorFilter = Callable[[Tensor], Tensor]


class BaseTensorConversion:
    """A reversible change of a tensor's shape.

    Subclasses write :meth:`handle_conversion` and :meth:`revert`. Both are required: an edit made on the converted tensor,
    in place or returned, has to find its way back into the model.

    Args:
        input_filter: applied before converting; undone by nothing, so a view at most.
        output_filter: applied after converting, likewise.
    """

    def __init__(self, input_filter: TensorFilter | None = None, output_filter: TensorFilter | None = None) -> None:
        self.input_filter = input_filter
        self.output_filter = output_filter

    def convert(self, input_value: Tensor, *full_context: Any) -> Tensor:
        """The tensor as a hook is to see it. ``full_context`` is handed on to :meth:`handle_conversion`."""
        filtered = input_value if self.input_filter is None else self.input_filter(input_value)
        output = self.handle_conversion(filtered, *full_context)
        return output if self.output_filter is None else self.output_filter(output)

    def handle_conversion(self, input_value: Tensor, *full_context: Any) -> Tensor:
        """Model's shape to the hook's shape."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to convert: write handle_conversion.")

    def revert(self, input_value: Tensor, *full_context: Any) -> Tensor:
        """The tensor as the model has it, from the one a hook saw."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to go back: write revert.")
