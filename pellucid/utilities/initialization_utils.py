"""Random initial values in TransformerLens' layout of weights (input axis first), under its names."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from pellucid.errors import InputError


def calc_fan_in_and_fan_out(tensor: Tensor) -> tuple[int, int]:
    """Inputs and outputs of ``[d]`` (1 in), ``[d_in, d_out]`` or ``[n_heads, d_in, d_head]``.

    Raises:
        InputError: another number of axes.
    """
    sizes = {1: (0, 0), 2: (0, 1), 3: (1, 0)}
    if tensor.dim() not in sizes:
        raise InputError(f"Fan in and fan out are of tensors with 1, 2 or 3 axes; found shape {tuple(tensor.shape)}.")
    if tensor.dim() == 1:
        return 1, tensor.shape[0]
    into, out = sizes[tensor.dim()]
    return tensor.shape[into], tensor.numel() // tensor.shape[into] if out == 0 else tensor.shape[1]


def init_xavier_uniform_(param: Tensor, gain: float = 1.0) -> Tensor:
    """Fill in place, uniform with variance ``2 gain^2 / (fan_in + fan_out)`` (Glorot and Bengio 2010)."""
    bound = gain * math.sqrt(6.0 / sum(calc_fan_in_and_fan_out(param)))
    return nn.init.uniform_(param, -bound, bound)


def init_xavier_normal_(param: Tensor, gain: float = 1.0) -> Tensor:
    """Fill in place, normal with variance ``2 gain^2 / (fan_in + fan_out)``."""
    return nn.init.normal_(param, 0.0, gain * math.sqrt(2.0 / sum(calc_fan_in_and_fan_out(param))))


def _kaiming(param: Tensor, a: float, nonlinearity: Any, gain: float, mode: str) -> float:
    fan_in, fan_out = calc_fan_in_and_fan_out(param)
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
