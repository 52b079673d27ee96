"""The conversion steps: one class a file, each with a ``convert`` and a ``revert`` that undo each other."""

from pellucid.conversion_utils.conversion_steps.base_tensor_conversion import BaseTensorConversion
from pellucid.conversion_utils.conversion_steps.chain_tensor_conversion import ChainTensorConversion
from pellucid.conversion_utils.conversion_steps.rearrange_tensor_conversion import RearrangeTensorConversion

__all__ = ["BaseTensorConversion", "ChainTensorConversion", "RearrangeTensorConversion"]
