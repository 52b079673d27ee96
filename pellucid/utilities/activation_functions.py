"""Activation functions by TransformerLens' names. A bridge runs Hugging Face's own; these are for a user's own use."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from pellucid.arguments import check_number
from pellucid.utilities.checks import check_floating, check_tensor

ActivationFunction: TypeAlias = Callable[..., Tensor]
SOFTCAP_DISABLED = -1.0
"""TransformerLens' word for no cap."""


def gelu_new(input: Tensor) -> Tensor:
    """GPT-2's approximation of GELU, by a tanh."""
    check_floating("input", input)
    return 0.5 * input * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (input + 0.044715 * input.pow(3.0))))


def gelu_fast(input: Tensor) -> Tensor:
    """BLOOM's approximation of GELU, by a tanh."""
    check_floating("input", input)
    return 0.5 * input * (1.0 + torch.tanh(input * 0.7978845608 * (1.0 + 0.044715 * input * input)))


def gelu_pytorch_tanh(input: Tensor) -> Tensor:
    """torch's own approximation of GELU, by a tanh."""
    check_floating("input", input)
    return F.gelu(input, approximate="tanh")


def solu(input: Tensor) -> Tensor:
    """``input * softmax(input)`` over the last axis (Elhage et al. 2022), without the norm that follows it."""
    check_floating("input", input)
    return input * input.softmax(-1)


def xielu(input: Tensor) -> Tensor:
    """xIELU (Huang and Schlag 2024) at its initial parameters."""
    check_floating("input", input)
    positive = 0.8 * input * input + 0.5 * input
    negative = (torch.expm1(input.clamp(max=-1e-6)) - input) * 0.8 + 0.5 * input
    return torch.where(input > 0, positive, negative)


def relu2(input: Tensor) -> Tensor:
    """``relu(input)`` squared."""
    check_floating("input", input)
    return F.relu(input).square()


def softcap_enabled(cap: float | None) -> bool:
    """Whether a cap caps: it is above 0. ``None``, 0 and negative numbers are words for no cap.

    Raises:
        InputError: no finite number.
    """
    return cap is not None and check_number("cap", cap) > 0


def apply_softcap(x: Tensor, cap: float | None) -> Tensor:
    """``cap * tanh(x / cap)``; ``x`` where the cap is none (see :func:`softcap_enabled`)."""
    check_tensor("x", x)
    return cap * torch.tanh(x / cap) if softcap_enabled(cap) and cap is not None else x


SUPPORTED_ACTIVATIONS: Mapping[str, ActivationFunction] = {
    "gelu": F.gelu,
    "gelu_fast": gelu_fast,
    "gelu_new": gelu_new,
    "gelu_pytorch_tanh": gelu_pytorch_tanh,
    "relu": F.relu,
    "relu2": relu2,
    "silu": F.silu,
    "solu": solu,
    "solu_ln": solu,
    "xielu": xielu,
}
"""Functions by the names that ``cfg.act_fn`` can have."""
