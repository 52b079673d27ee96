"""Shape rules one after another; reverted from the last to the first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pellucid.conversion_utils.conversion_steps.base_tensor_conversion import BaseTensorConversion


class ChainTensorConversion(BaseTensorConversion):
    """Apply ``conversions`` in order, and revert them in the opposite order."""

    def __init__(self, conversions: Sequence[BaseTensorConversion]) -> None:
        super().__init__()
        self.conversions = tuple(conversions)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self.conversions)!r})"

    def handle_conversion(self, input_value: Tensor, *full_context: Any) -> Tensor:
        """First to last."""
        for conversion in self.conversions:
            input_value = conversion.convert(input_value, *full_context)
        return input_value

    def revert(self, input_value: Tensor, *full_context: Any) -> Tensor:
        """Last to first."""
        for conversion in reversed(self.conversions):
            input_value = conversion.revert(input_value, *full_context)
        return input_value
