"""A plain torch autoencoder with SAELens' small interface, to attach to bridges."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn


class Sae(nn.Module):
    """A sparse autoencoder with random weights, and nothing of SAELens' but its interface."""

    def __init__(self, hook: str, d_in: int, out: str | None = None, d_out: int | None = None, d_sae: int = 40) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.W_enc = nn.Parameter(torch.randn(d_in, d_sae, generator=generator) / d_in**0.5)
        self.W_dec = nn.Parameter(torch.randn(d_sae, d_out or d_in, generator=generator) / d_sae**0.5)
        self.cfg = SimpleNamespace(metadata=SimpleNamespace(hook_name=hook, hook_name_out=out))

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.W_enc)

    def decode(self, acts: Tensor) -> Tensor:
        return acts @ self.W_dec


def make_sae(hook: str, width: int) -> Sae:
    """One of so many features at a hook."""
    return Sae(hook, width)
