"""State dicts that do not fit are refused with names before anything is loaded; torch loads what fits, and then raises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pellucid.errors import StateDictError

MOST_NAMES = 6
"""Names of one kind that a message lists."""


def refuse_other_state(model: nn.Module, given: Mapping[str, Any], strict: bool) -> None:
    """Refuse a state dict that is not of this model.

    A module that reads its state in a way of its own (quantised ones do) is left to say so itself.

    Args:
        model: the model.
        given: tensors by name.
        strict: whether all names have to be there, and no other.

    Raises:
        StateDictError: names that are missing or not the model's, sizes that differ, values that are no tensors.
    """
    if not all(_is_plain(module) for module in model.modules()):
        return
    own = model.state_dict()
    wrong = [
        *_named("Missing key(s)", [name for name in own if name not in given] if strict else []),
        *_named("Unexpected key(s)", [str(name) for name in given if name not in own] if strict else []),
        *_named("size mismatch", [_sizes(name, given[name], own[name]) for name in own if _differs(given, name, own)]),
    ]
    if wrong:
        raise StateDictError(
            f"state_dict is not one of this {type(model).__name__}; nothing was loaded:\n" + "\n".join(wrong)
        )


def _is_plain(module: nn.Module) -> bool:
    own: Any = type(module)._load_from_state_dict
    return own is nn.Module._load_from_state_dict and not module._load_state_dict_pre_hooks


def _differs(given: Mapping[str, Any], name: str, own: Mapping[str, Any]) -> bool:
    """Whether there is a value that cannot be loaded; torch takes a tensor of one number for a number."""
    if name not in given or not isinstance(own[name], Tensor):
        return False
    value = given[name]
    return not isinstance(value, Tensor) or (value.shape != own[name].shape and value.numel() + own[name].numel() > 2)


def _sizes(name: str, found: Any, wanted: Tensor) -> str:
    there = f"{tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
    return f"{name}: {there} given, {tuple(wanted.shape)} here"


def _named(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f", and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return [f"  {what}: {', '.join(names[:MOST_NAMES])}{more}"]
