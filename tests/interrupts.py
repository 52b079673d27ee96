"""Raising ``KeyboardInterrupt`` at the n-th traced line of a call, and the public operations to do that to."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

import pellucid
from pellucid import TransformerBridge

PACKAGE = str(Path(pellucid.__file__).parent)


def zero(tensor: Tensor, hook: Any) -> Tensor:
    """An edit that shows."""
    return tensor * 0


class _AtLine:
    """Counts the lines of the package that are run, and raises at one of them.

    Args:
        line: the one to raise at, counted from 1; 0 only counts.
    """

    def __init__(self, line: int) -> None:
        self.line, self.seen = line, 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "call" and not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line" and not _leaves_a_block(frame):
            self.seen += 1
            if self.seen == self.line:
                raise KeyboardInterrupt
        return self


def _leaves_a_block(frame: FrameType) -> bool:
    """Whether the line is a ``with`` statement, at which the trace function is also called when its block ends.

    Between the end of a block and ``__exit__`` the interpreter looks for no signal; an exception raised there by a trace
    function would leave a lock held, which no Ctrl-C can.
    """
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with ")


def count_lines(work: Callable[[], Any]) -> int:
    """How many lines of the package a call runs."""
    counter = _AtLine(0)
    sys.settrace(counter)
    try:
        work()
    finally:
        sys.settrace(None)
    return counter.seen


def interrupt_at(line: int, work: Callable[[], Any]) -> bool:
    """Call ``work``, interrupted at its ``line``-th line; whether it was."""
    sys.settrace(_AtLine(line))
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def _block(bridge: TransformerBridge, tokens: Tensor) -> None:
    with bridge.hooks([("blocks.1.attn.hook_z", zero), ("blocks.0.hook_resid_post", zero)]):
        bridge(tokens)


def _part(bridge: TransformerBridge, tokens: Tensor) -> None:
    residual = bridge(tokens, stop_at_layer=1)
    bridge(residual, start_at_layer=1)


OPERATIONS: Mapping[str, Callable[[TransformerBridge, Tensor], Any]] = {
    "run_with_hooks": lambda bridge, tokens: bridge.run_with_hooks(
        tokens, fwd_hooks=[("blocks.1.attn.hook_z", zero), ("hook_unembed", zero)]
    ),
    "run_with_cache of one point": lambda bridge, tokens: bridge.run_with_cache(
        tokens, names_filter="blocks.1.hook_resid_post"
    ),
    "run_with_cache": lambda bridge, tokens: bridge.run_with_cache(tokens),
    "hooks": _block,
    "add_hook": lambda bridge, tokens: bridge.add_hook(["blocks.1.attn.hook_z", "hook_embed"], zero),
    "add_hook on a point": lambda bridge, tokens: bridge.blocks[1].mlp.hook_post.add_hook(zero),
    "reset_hooks": lambda bridge, tokens: bridge.reset_hooks(),
    "start and stop": _part,
    "generate": lambda bridge, tokens: bridge.generate(tokens, max_new_tokens=2, do_sample=False, verbose=False),
}
"""Public operations on a bridge with nothing hooked. What they leave hooked when they are not interrupted is meant."""


def what_is_wrong(bridge: TransformerBridge, tokens: Tensor, expected: Tensor, edited: Tensor) -> str | None:
    """What an interrupted operation left that is not as it should be, ``None`` for nothing.

    Args:
        bridge: nothing was hooked on it before the operation.
        tokens: ids to run.
        expected: the bare model's logits for them.
        edited: logits of a run that zeroes ``blocks.1.attn.hook_z``.
    """
    if bridge.live_hooks():
        return f"a hook on {bridge.live_hooks()[0].name} acts"
    if not torch.equal(bridge.hf_model(tokens).logits, expected):
        return "the Hugging Face model's logits are others"
    if not torch.equal(bridge(tokens), expected):
        return "the bridge's logits are others"
    left = [name for name, module in bridge.hf_model.named_modules() if "forward" in vars(module)]
    if left:
        return f"something stands on {left[0]} after the next call"
    if not torch.equal(bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_z", zero)]), edited):
        return "a hook does not act"
    return None
