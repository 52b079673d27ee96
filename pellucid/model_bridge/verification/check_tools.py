"""What the checks of a bridge need: how they see it, and an edit to try on any hook point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pellucid.hook_points import HookPoint
from pellucid.model_bridge.running.run_positions import RunPositions
from pellucid.model_bridge.running.runner import Runner
from pellucid.names import Flag, HookSpec


class CheckedBridge(Protocol):
    """What the checks need of a bridge."""

    @property
    def hf_model(self) -> nn.Module:
        """The Hugging Face model."""
        ...

    @property
    def runner(self) -> Runner:
        """What runs it."""
        ...

    def check_input(self, input: Tensor) -> Any:
        """A checked input."""
        ...

    def positions_of(self, prepared: Any) -> RunPositions:
        """The positions of its run."""
        ...

    def points_on(self, flags: Flag | Sequence[Flag]) -> AbstractContextManager[None]:
        """Opt-in points, on for the length of a block."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run."""
        ...

    def run_with_cache(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Run and keep."""
        ...

    def hooks(self, fwd_hooks: Any) -> AbstractContextManager[Any]:
        """Functions for the length of a block."""
        ...

    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """Run with hooks."""
        ...


class FastAttentionOn:
    """Fast attention, on for the length of a block."""

    def __init__(self, bridge: CheckedBridge, name: str = "sdpa") -> None:
        self._runner, self._name = bridge.runner, name

    def __enter__(self) -> None:
        self._runner.attn_implementation = self._name

    def __exit__(self, *exception: object) -> None:
        self._runner.attn_implementation = "eager"


def random_edit(spec: HookSpec, d_vocab: int) -> Callable[[Tensor], Tensor]:
    """The same random change of a tensor every time: not a constant, which a norm or a softmax would not see."""

    def edit(tensor: Tensor) -> Tensor:
        if spec.kind == "int":
            return (tensor + 1) % d_vocab
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
        finite = torch.where(tensor.abs() < 1e4, tensor, torch.zeros_like(tensor))
        size = finite.double().std(correction=0).clamp_min(1e-3) * (0.1 if spec.site == "hook_scale" else 1.0)
        change = noise.abs() if spec.site == "hook_scale" else noise
        return tensor + change.to(device=tensor.device, dtype=tensor.dtype) * size.to(tensor.dtype)

    return edit


def written_in_place(edit: Callable[[Tensor], Tensor]) -> Callable[[Tensor, HookPoint], None]:
    """The edit as a hook function that writes into the tensor it is given."""

    def hook(tensor: Tensor, hook: HookPoint) -> None:
        tensor.copy_(edit(tensor))

    return hook
