"""What flows back through a module in the place of its gradient: RelP's rules (Rezaei Jafari et al., arXiv 2508.21258), and
gates that let nothing through (GradDrop of AtP*, Kramar et al., arXiv 2403.00745).

A rule is a function on a hook point that gives back the bits it was shown, with another graph behind them:

==================  ================================================  =====================================================
module              forward                                           what flows back
==================  ================================================  =====================================================
norm                ``(x - mean) / scale * gain``                     as if ``scale`` were a constant
activation          ``a(x)``                                          as through ``x * c`` with ``c = a(x) / x`` a constant
gated product       ``a(g) * u``                                      half to each: ``u * c/2u + g * c/2g``, ``c = a(g) u``
attention           ``pattern @ values``                              through the values; the pattern is a constant
cap of the logits   ``cap * tanh(x / cap)``                           as an activation
clip (MPT's)        ``clamp(values)``                                 its gradient: nothing where a value is cut off
anything linear     as it is                                          its gradient
==================  ================================================  =====================================================

Both graphs stand in one run, and a :class:`Switch` says at the time of a backward pass which of them it goes through: AtP
and RelP share their runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pellucid.errors import InputError, UnsupportedModelError
from pellucid.model_bridge.transformer_bridge import TransformerBridge

Hook = tuple[str, Callable[..., Any]]

LIMIT = 0.5
"""``a(x) / x`` at 0: the limit for GELU and SiLU; for ReLU the mean of its two one-sided limits."""


class Switch:
    """What the backward pass that runs now goes through."""

    def __init__(self) -> None:
        self.rules = False
        self.without_layer: int | None = None
        self.has_rules = False
        self.has_gates = False
        self.has_ended = False

    @contextmanager
    def set(self, rules: bool, without_layer: int | None) -> Iterator[None]:
        """Set it for one backward pass.

        Raises:
            InputError: the run was made without what is asked for.
        """
        if rules and not self.has_rules:
            raise InputError("This run was made without rules: run_with_gradients(..., rules=True).")
        if without_layer is not None and not self.has_gates:
            raise InputError("This run was made without gates: run_with_gradients(..., gates=True).")
        self.rules, self.without_layer = rules, without_layer
        try:
            yield
        finally:
            self.rules, self.without_layer = False, None


class _Gate(torch.autograd.Function):
    """A tensor whose gradient goes on while ``is_open()``."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, is_open: Callable[[], bool]) -> Tensor:
        ctx.is_open = is_open
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        return (gradients[0] if ctx.is_open() else None), None


class _Activated(torch.autograd.Function):
    """A tensor whose gradient goes to itself, or by the rule to what it was made from, an equal share to each.

    The constants of the rule are computed on the way back, so that a forward costs nothing more.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, switch: Switch, *entered: Tensor) -> Tensor:
        ctx.switch = switch
        ctx.save_for_backward(value, *entered)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        value, *entered = ctx.saved_tensors
        if not ctx.switch.rules:
            return gradients[0], None, *(None for _ in entered)
        share = value / len(entered)
        return None, None, *(_ratio(each, share).mul_(gradients[0]) for each in entered)


def refuse_rules(bridge: TransformerBridge) -> None:
    """Refuse a family of which a module has no rule.

    Raises:
        UnsupportedModelError: with the module.
    """
    if "blocks.0.mlp.hook_post" not in bridge.hook_index:
        raise UnsupportedModelError(
            f"RelP has a rule for an activation between two projections, and the inside of {bridge.adapter.family.title}'s "
            "MLP is no tensor [batch, pos, ...] (experts): take AtP or integrated gradients."
        )


def rule_hooks(bridge: TransformerBridge, switch: Switch) -> tuple[list[Hook], list[Hook]]:
    """The rules as functions on hook points: those before the final norm, and those from it on."""
    switch.has_rules = True

    def constant(tensor: Tensor, hook: Any) -> Tensor:
        gated: Tensor = _Gate.apply(tensor, partial(_no_rules, switch))
        return gated

    entered: dict[str, Tensor] = {}

    def enter(tensor: Tensor, hook: Any) -> None:
        entered[hook.name] = tensor

    def activated(names: tuple[str, ...], tensor: Tensor, hook: Any) -> Tensor:
        chosen: Tensor = _Activated.apply(tensor, switch, *(entered.pop(name) for name in names))
        return chosen

    block: list[Hook] = []
    index, flags = bridge.hook_index, bridge.cfg.flags
    head: list[Hook] = [("ln_final.hook_scale", constant)]
    for glob in ("*.hook_scale", "*.hook_pattern"):
        block += [(spec.name, constant) for spec, _ in index.select(glob, flags) if spec.name != "ln_final.hook_scale"]
    for layer in range(bridge.cfg.n_layers):
        mlp = f"blocks.{layer}.mlp"
        into = tuple(name for name in (f"{mlp}.hook_pre", f"{mlp}.hook_pre_linear") if name in index)
        block += [(name, enter) for name in into]
        block.append((f"{mlp}.hook_post", partial(activated, into)))
    if bridge.adapter.family.logits_change:
        head += [("hook_unembed", enter), ("hook_logits", partial(activated, ("hook_unembed",)))]
    return block, head


def _no_rules(switch: Switch) -> bool:
    return not switch.rules


def _ratio(entered: Tensor, given: Tensor) -> Tensor:
    """What ``entered`` times makes ``given``, a tensor of its own."""
    return (given / entered).masked_fill_(entered == 0, LIMIT)


def layer_gates(bridge: TransformerBridge, switch: Switch) -> list[Hook]:
    """Gates on what attention and MLP of each layer add to the stream, to be put after what keeps them."""
    switch.has_gates = True

    def gate(layer: int, tensor: Tensor, hook: Any) -> Tensor:
        gated: Tensor = _Gate.apply(tensor, partial(_stays, switch, layer))
        return gated

    return [
        (f"blocks.{layer}.{name}", partial(gate, layer))
        for layer in range(bridge.cfg.n_layers)
        for name in ("hook_attn_out", "hook_mlp_out")
    ]


def _stays(switch: Switch, layer: int) -> bool:
    return switch.without_layer != layer
