"""The oracle of the sweep's tests: one whole forward an edit, by hooks written here with plain indexing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pellucid import TransformerBridge
from pellucid.sweep import Add, Edit, FromRun, Scale, SetTo, Zero


def _where(edit: Edit, shape: Sequence[int], axes: Sequence[str]) -> Tensor:
    """Which cells of the whole activation the edit means."""
    mask = torch.ones(*shape, dtype=torch.bool)
    named = {"batch": edit.rows, "pos": edit.positions, "key_pos": edit.keys}
    named |= dict.fromkeys(("n_heads", "n_key_value_heads"), edit.heads)
    last = axes[-1] if axes[-1] not in ("pos", "key_pos", "1", "batch") else None
    for axis, word in enumerate(axes):
        index = named.get(word)
        if word == last and axis == len(axes) - 1:
            index = edit.neurons
        if index is None:
            continue
        chosen = torch.zeros(shape[axis], dtype=torch.bool)
        chosen[index] = True
        mask &= chosen.view([-1 if other == axis else 1 for other in range(len(shape))])
    return mask


def as_hook(bridge: TransformerBridge, edit: Edit) -> tuple[str, Callable[..., Any]]:
    """The edit as a hook on whole activations ``[batch, pos, ...]``."""
    spec = bridge.hook_spec(edit.hook)

    def hook(tensor: Tensor, hook: Any) -> Tensor:
        where = _where(edit, tensor.shape, spec.axes)
        value = edit.value
        if isinstance(value, Zero):
            new = torch.zeros_like(tensor)
        elif isinstance(value, Scale):
            new = tensor * value.factor
        elif isinstance(value, FromRun):
            new = value.run[spec.name].to(tensor)
        elif isinstance(value, SetTo):
            new = torch.as_tensor(value.value, dtype=tensor.dtype).expand_as(tensor)
        elif isinstance(value, Add):
            new = tensor + torch.as_tensor(value.direction, dtype=tensor.dtype)
        else:
            raise AssertionError(value)
        return torch.where(where, new, tensor)

    return edit.hook, hook


@torch.no_grad()
def whole_logits(
    bridge: TransformerBridge, tokens: Tensor, edits: Edit | Sequence[Edit], attention_mask: Tensor | None = None
) -> Tensor:
    """Logits of one whole forward with the edits made by hooks, in the order given."""
    chosen = [edits] if isinstance(edits, Edit) else edits
    hooks = [as_hook(bridge, edit) for edit in chosen]
    logits: Tensor = bridge.run_with_hooks(tokens, fwd_hooks=hooks, attention_mask=attention_mask)
    return logits
