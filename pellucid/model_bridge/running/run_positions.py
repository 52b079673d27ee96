"""The positions of a run, and which of them hold the tokens that were given.

A model's wrapper may put positions of its own before the tokens (prompt tuning and p-tuning of PEFT) or hand the model a
key/value cache (prefix tuning), so a run's positions are read from what enters the backbone, never counted in the tokens.
A *virtual* position holds no token: the model attends to it, and it has activations and logits as any other position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.errors import InputError
from pellucid.model_bridge.generalized_components.hf_arguments import by_name, given_cache
from pellucid.model_bridge.hooking.mounting import ComponentTree
from pellucid.padding import NO_TOKEN, last_columns
from pellucid.run_context import hooks_suppressed, is_quiet


@dataclass(frozen=True, eq=False)
class RunPositions:
    """The positions of one run.

    Attributes:
        batch: rows.
        length: positions that enter the first block, virtual ones among them.
        past: positions in the key/value cache before them.
        virtual: how many of them, the first ones, hold no token of the input: the model's wrapper put them there.
        tokens: ``[batch, pos]`` int64 ids, :data:`~pellucid.padding.NO_TOKEN` at virtual positions; ``None`` if the run was
            given embeddings or a residual.
        attention_mask: ``[batch, pos]`` int64, 1 at virtual positions, or ``None`` if nothing is padding.
        cache_is_wrappers: whether the key/value cache is one that the model's wrapper made.
        embeddings: ``[batch, pos, d_model]`` as they entered the backbone, ``None`` if token ids did.
    """

    batch: int
    length: int
    past: int = 0
    virtual: int = 0
    tokens: Tensor | None = None
    attention_mask: Tensor | None = None
    cache_is_wrappers: bool = False
    embeddings: Tensor | None = None

    @property
    def given(self) -> int:
        """Positions that the input has, padding among them: all but virtual ones."""
        return self.length - self.virtual

    def of_input(self, tensor: Tensor, axis: int = 1) -> Tensor:
        """``tensor`` at the positions that the input has; one without virtual positions is returned as it is."""
        return tensor.narrow(axis, tensor.shape[axis] - self.given, self.given)


def positions_of_input(given: Tensor, tokens: Tensor | None, mask: Tensor | None, past: int = 0) -> RunPositions:
    """Of a run whose input goes to the backbone as it is.

    Args:
        given: ``[batch, pos]`` ids, or ``[batch, pos, d_model]`` embeddings or residual.
        tokens: the ids, if they are known.
        mask: ``[batch, past + pos]``, or ``None``.
        past: cached positions.
    """
    batch, length = given.shape[:2]
    return RunPositions(batch, length, past, 0, tokens, last_columns(mask, length))


def positions_of_wrapped(
    wrapper: nn.Module, tree: ComponentTree, arguments: dict[str, Any], tokens: Tensor | None, given: Tensor
) -> RunPositions:
    """Of a run whose input goes through a wrapper of the model, found by calling the wrapper up to the backbone.

    Args:
        wrapper: what is called.
        tree: the model inside.
        arguments: what it is called with.
        tokens: the ids among them, if there are any.
        given: the input, see :func:`positions_of_input`.

    Raises:
        InputError: the wrapper changes the input in a way that does not say which positions hold the tokens.
    """
    entering = _entering_backbone(wrapper, tree, arguments)
    ids, embeddings, cache = entering.get("input_ids"), entering.get("inputs_embeds"), given_cache(entering)
    whole = ids if ids is not None else embeddings
    batch, length = given.shape[:2]
    if not isinstance(whole, Tensor) or whole.shape[0] != batch or whole.shape[1] < length:
        found = f"shape {tuple(whole.shape[:2])}" if isinstance(whole, Tensor) else type(whole).__name__
        raise InputError(
            f"The model's wrapper makes of an input of shape {(batch, length)} one of {found}: which positions hold which "
            "tokens cannot be known. Give the bridge the model inside."
        )
    virtual = whole.shape[1] - length
    if virtual:
        expected = given
        if ids is None and tokens is not None:
            with torch.no_grad():
                expected = hooks_suppressed(tree.embedding(), tokens)
        if not torch.equal(whole[:, virtual:], expected.to(whole)):
            raise InputError(
                f"The model's wrapper makes {length + virtual} positions of an input of {length}, and the last {length} are "
                "not the input: which positions hold which tokens cannot be known. Give the bridge the model inside."
            )
    known = ids
    if ids is None and tokens is not None:
        known = nn.functional.pad(tokens, (virtual, 0), value=NO_TOKEN)
    mask = entering.get("attention_mask")
    own = last_columns(mask, length + virtual) if isinstance(mask, Tensor) and mask.dim() == 2 else None
    return RunPositions(
        batch,
        length + virtual,
        0 if cache is None else int(cache.get_seq_length()),
        virtual,
        known,
        None if own is None else own.long(),
        cache is not None and cache is not given_cache(arguments),
        embeddings,
    )


def puts_prompts_before(model: nn.Module) -> bool:
    """Whether a wrapper puts a learnt prompt before what it is given (PEFT's prompt and prefix tuning).

    It then numbers the positions itself and takes no ``position_ids``.
    """
    active = getattr(model, "active_peft_config", None)
    return active is not None and bool(active.is_prompt_learning)


class _BackboneReached(Exception):  # noqa: N818 (a signal, never seen by a user)
    """Ends the call of a wrapper where the backbone would begin."""


def _entering_backbone(wrapper: nn.Module, tree: ComponentTree, arguments: dict[str, Any]) -> dict[str, Any]:
    """What a wrapper gives the backbone: nothing behind it runs, and no hook point fires."""
    seen: dict[str, Any] = {}

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_quiet():  # an interrupt may leave this function on the model: it does nothing in anybody's run
            seen.update(by_name(module, args, kwargs))
            raise _BackboneReached

    device = tree.embedding().weight.device
    handle = tree.backbone.module.register_forward_pre_hook(look, prepend=True, with_kwargs=True)
    try:
        # A prompt encoder in training may draw random numbers, which are the run's.
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            hooks_suppressed(wrapper, **arguments)
    except _BackboneReached:
        tree.restore_offloaded()
    finally:
        handle.remove()
    return seen
