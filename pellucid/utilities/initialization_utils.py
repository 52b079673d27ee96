"""Random initial values in TransformerLens' layout of weights (input axis first), under its names."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from pellucid.arguments import check_choice, check_number
from pellucid.errors import InputError
from pellucid.utilities.checks import check_floating, check_tensor

NONLINEARITIES = (
    *("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("sigmoid", "tanh", "relu", "leaky_relu", "selu"),
)
"""Those whose gain torch knows."""


def calc_fan_in_and_fan_out(tensor: Tensor) -> tuple[int, int]:
    """Inputs and outputs of ``[d]`` (1 in), ``[d_in, d_out]`` or ``[n_heads, d_in, d_head]``.

    Raises:
        InputError: no tensor, or another number of axes.
    """
    if check_tensor("tensor", tensor).dim() not in (1, 2, 3):
        raise InputError(f"Fan in and fan out are of tensors with 1, 2 or 3 axes; found shape {tuple(tensor.shape)}.")
    if tensor.dim() == 1:
        return 1, tensor.shape[0]
    if tensor.dim() == 2:
        return tensor.shape[0], tensor.shape[1]
    return tensor.shape[1], tensor.shape[0] * tensor.shape[2]


def _fans(param: Tensor, gain: float) -> tuple[int, int]:
    """Inputs and outputs of what can be filled.

    Raises:
        InputError: no numbers to fill, or a gain that is none.
    """
    check_number("gain", gain, at_least=0)
    if not check_floating("param", param).numel():
        raise InputError(f"param has no entries to fill: its shape is {list(param.shape)}.")
    return calc_fan_in_and_fan_out(param)


def init_xavier_uniform_(param: Tensor, gain: float = 1.0) -> Tensor:
    """Fill in place, uniform with variance ``2 gain^2 / (fan_in + fan_out)`` (Glorot and Bengio 2010)."""
    bound = gain * math.sqrt(6.0 / sum(_fans(param, gain)))
    return nn.init.uniform_(param, -bound, bound)


def init_xavier_normal_(param: Tensor, gain: float = 1.0) -> Tensor:
    """Fill in place, normal with variance ``2 gain^2 / (fan_in + fan_out)``."""
    return nn.init.normal_(param, 0.0, gain * math.sqrt(2.0 / sum(_fans(param, gain))))


def _kaiming(param: Tensor, a: float, nonlinearity: Any, gain: float, mode: str) -> float:
    fan_in, fan_out = _fans(param, gain)
    check_number("a", a)
    check_choice("nonlinearity", nonlinearity, NONLINEARITIES)
    check_choice("mode", mode, ("fan_in", "fan_out"))
    if a != 0 and nonlinearity != "leaky_relu":
        raise InputError(
            f"a={a} would have no effect: it is the slope of nonlinearity='leaky_relu', not {nonlinearity!r}'s."
        )
    return gain * nn.init.calculate_gain(nonlinearity, a) / math.sqrt(fan_in if mode == "fan_in" else fan_out)


def init_kaiming_uniform_(
    param: Tensor, a: float = 0, nonlinearity: Any = "relu", gain: float = 1.0, mode: str = "fan_in"
) -> Tensor:
    """Fill in place, uniform with the deviation that keeps variances through ``nonlinearity`` (He et al. 2015)."""
    bound = math.sqrt(3.0) * _kaiming(param, a, nonlinearity, gain, mode)
    return nn.init.uniform_(param, -bound, bound)


def init_kaiming_normal_(
    param: Tensor, a: float = 0, nonlinearity: Any = "relu", gain: float = 1.0, mode: str = "fan_in"
) -> Tensor:
    """Fill in place, normal with the deviation that keeps variances through ``nonlinearity``."""
    return nn.init.normal_(param, 0.0, _kaiming(param, a, nonlinearity, gain, mode))
