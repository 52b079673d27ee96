"""Attention that Hugging Face computes, with hook points where its parts meet.

Queries, keys, values and ``z`` are outputs and inputs of the projections, whose own components show them. Between those lie
the rotation, the key/value cache and one call of Hugging Face's attention function. What stands there:

* keys after the rotation (``hook_rot_k``), as they go into the cache: what attention is given as its cache is ours, and
  hands on to the real one;
* queries after the rotation (``hook_rot_q``), as they go into the attention function;
* scores and pattern, inside that function: Hugging Face's eager one, with a softmax and a dropout that show them
  (:mod:`hf_code`). A layer of a model that runs a fused kernel runs the eager function while scores or pattern are looked
  at.

None of the arithmetic is written here; a family says where its softmax is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.conversion_utils.fused_qkv import Part
from pellucid.errors import UnsupportedModelError
from pellucid.model_bridge.generalized_components.base import GeneralizedComponent, Site
from pellucid.model_bridge.generalized_components.head_weights import HeadWeights
from pellucid.model_bridge.generalized_components.hf_arguments import cache_name
from pellucid.model_bridge.generalized_components.hf_code import (
    Standing,
    TappedFunctional,
    names_of,
    rebound,
    tapped_names,
)
from pellucid.model_bridge.generalized_components.linear import HEAD_INPUTS
from pellucid.model_bridge.generalized_components.mixing import FunctionAttends, current_mixing
from pellucid.model_bridge.generalized_components.split_inputs import PER_HEAD_SITES, fire_all_per_head
from pellucid.names import PATTERN_SITES

EAGER, REGISTRY = "eager_attention_forward", "ALL_ATTENTION_FUNCTIONS"
"""What Hugging Face's attention modules call their eager function and the table of the others."""

ROTATION = "apply_rotary_pos_emb"
"""What they call the function that rotates queries and keys."""

OTHER_FUNCTIONS = ("sdpa",)
"""Attention functions whose mask can be made into the one that the eager function takes."""

OWN_SITES = ("hook_rot_q", "hook_rot_k", *PATTERN_SITES)


class PatternDropoutBridge(GeneralizedComponent):
    """Stands for the dropout module that gives the pattern, where an attention has one (GPT-J, GPT-2 that upcasts)."""

    def forward(self, input: Tensor) -> Tensor:
        """The pattern before and after dropout, ``[batch, n_heads, pos, key_pos]``."""
        pattern: Tensor = self.original()(input)
        # In evaluation mode it is the very tensor that the softmax gave, which autograd has saved.
        return self.fire("hook_out", pattern, copy_before_edit=pattern.requires_grad)


class KeyTap(Standing):
    """What an attention is given as its key/value cache: shows new keys, then hands on to the cache, if there is one.

    Args:
        cache: the real one.
        show: shown ``[batch, heads, pos, d_head]``, gives what goes on.
    """

    def __init__(self, cache: Any | None, show: Callable[[Tensor], Tensor]) -> None:
        super().__init__(cache, {"_show": show})

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See Hugging Face's ``Cache.update``."""
        keys, cache = self._show(keys), self._real
        return (keys, values) if cache is None else cache.update(keys, values, *args, **kwargs)


class HuggingFaceAttentionBridge(HeadWeights):
    """Stands for an attention whose forward runs as Hugging Face wrote it.

    Args:
        name: the module's name inside its parent.
        config: the bridge's configuration.
        submodules: ``q``, ``k``, ``v`` or ``qkv``; ``o``; ``q_norm`` and ``k_norm`` where there are some.
        softmax_in: see :class:`~pellucid.model_bridge.family.Attention`.
        pattern_at: the same; a module's name is a key of ``submodules``.
        heads_first: the same.
    """

    runs_original = True

    hook_rot_q = Site("queries after the rotation, ``[batch, pos, n_heads, d_head]``")
    hook_rot_k = Site("keys of the new positions after the rotation, as they go into the cache")
    hook_q_normed = Site("queries after their norm, ``[batch, pos, n_heads, d_head]``")
    hook_k_normed = Site("keys after their norm")

    def __init__(
        self,
        name: str,
        config: Any,
        submodules: Mapping[str, GeneralizedComponent],
        softmax_in: str = "function",
        pattern_at: str = "dropout",
        heads_first: bool = False,
    ) -> None:
        super().__init__(name, config, submodules)
        self.softmax_in, self.pattern_at, self.heads_first = softmax_in, pattern_at, heads_first
        for part in "qkv":
            if part in self.submodules:
                self.link(f"hook_{part}", self.submodules[part], "hook_out")
                self.link(f"hook_{part}_in", self.submodules[part], "hook_in")
            else:
                self.link(f"hook_{part}", self.submodules["qkv"], f"hook_{part}")
                self.link(f"hook_{part}_in", self.submodules["qkv"], f"hook_{part}_in")
            if f"{part}_norm" in self.submodules:
                self.link(f"hook_{part}_normed", self.submodules[f"{part}_norm"], "hook_out")
        if pattern_at in self.submodules:
            self.link("hook_pattern", self.submodules[pattern_at], "hook_out")
        output = self.submodules["o"]
        self.link("hook_z", output, "hook_in")
        self.link("hook_result", output, "hook_result")
        self.link("hook_attn_out", output, "hook_out")
        self.link("hook_out", output, "hook_out")
        self._bound: tuple[Any, Any, Callable[..., Any]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # What is bound to this component's points is none of a copy's.
        return {**vars(self), "_bound": None}

    # -- Hugging Face's code with our names ----------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Hugging Face's arguments to Hugging Face's output."""
        original = self.original()
        if not self.is_live(*PER_HEAD_SITES):
            return self._run(original, *args, **kwargs)
        cfg: Any = self.config
        heads: dict[Part, int] = {"q": cfg.n_heads, "k": cfg.n_key_value_heads, "v": cfg.n_key_value_heads}
        token = HEAD_INPUTS.set(fire_all_per_head(self, heads))
        try:
            return self._run(original, *args, **kwargs)
        finally:
            HEAD_INPUTS.reset(token)

    def _run(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        ours = self.is_live(*OWN_SITES) or self._is_float64() or current_mixing() is not None
        if not ours:
            return original(*args, **kwargs)
        self._refuse_fused()
        forward = self._with_our_names(original)
        if self.is_live("hook_rot_k") and self.softmax_in != "forward":
            name = cache_name(type(self.module))
            kwargs[name] = KeyTap(kwargs.get(name), partial(self._by_head, "hook_rot_k"))
        return forward(*args, **kwargs)

    def _refuse_fused(self) -> None:
        """A forward that has the softmax itself leaves it out where the model does not run eager."""
        name = getattr(getattr(self.module, "config", None), "_attn_implementation", "eager")
        if self.softmax_in == "forward" and name != "eager" and self.is_live(*PATTERN_SITES):
            raise UnsupportedModelError(self._in_another(name))

    def _in_another(self, name: str) -> str:
        return (
            f"{self.path} has its scores in {self.softmax_in}, which Hugging Face runs where the model's attention "
            f"is 'eager'; it is {name!r}. Call bridge.set_attn_implementation('eager') to look at them, or load "
            "the model with attn_implementation='eager' where Hugging Face cannot switch it."
        )

    def _is_float64(self) -> bool:
        return self.config is not None and self.config.dtype is torch.float64

    def _with_our_names(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The forward that was there, some of the names that it looks up standing for ours."""
        module: nn.Module = self.module
        plain = getattr(original, "__func__", None)
        known = self._bound
        if known is not None and known[0] is module and known[1] is plain:
            return known[2]
        if plain is not type(module).forward or getattr(original, "__self__", None) is not module:
            raise UnsupportedModelError(
                f"{self.path} has a forward that is not its class' own ({original!r}): its scores, its pattern and its "
                "rotated queries and keys cannot be reached. Take the wrapper off, or hook points outside it."
            )
        tapped = TappedFunctional(partial(self.fire, "hook_attn_scores"), self._show_pattern, self.pattern_at)
        ours = tapped_names(tapped)
        there, names = names_of(plain), dict[str, Any]()
        subject: Any = module
        if EAGER in there:
            eager = there[EAGER]
            tapped_eager = rebound(eager, ours)
            names[EAGER] = partial(self._attend, tapped_eager, eager, "eager")
            functions = there[REGISTRY]
            names[REGISTRY] = Standing(
                functions, {"get_interface": partial(self._interface, functions, tapped_eager, eager)}
            )
        if self.softmax_in == "forward":
            names |= ours
            if ROTATION in there:
                names[ROTATION] = partial(self._rotate, there[ROTATION])
        elif self.softmax_in != "function":
            # A method of the attention: the forward is given a stand-in of the module, of which that method is ours.
            method = vars(type(module))[self.softmax_in]
            subject = Standing(module, {})
            tapped_method = partial(rebound(method, ours), subject)
            vars(subject)[self.softmax_in] = partial(self._in_method, tapped_method)
        made = partial(rebound(plain, names), subject)
        self._bound = (module, plain, made)
        return made

    def _rotate(self, rotation: Callable[..., tuple[Tensor, Tensor]], *args: Any) -> tuple[Tensor, Tensor]:
        """In the place of the rotation that a forward looks up: what it gives goes on to cache and scores."""
        query, key = rotation(*args)
        heads = 1 if self.config is None else key.shape[1] // self.config.n_key_value_heads
        # Repeated already for each head of queries: a function sees one of each, and its edit is of all of them.
        shown = self._by_head("hook_rot_k", key[:, ::heads] if heads > 1 else key)
        if heads == 1:
            key = shown
        elif self.is_live("hook_rot_k") and not self.only_reads("hook_rot_k"):
            key = torch.empty_like(key)  # in its memory layout, on which the rounding of products depends
            key.unflatten(1, (-1, heads)).copy_(shown.unsqueeze(2))
        return self._by_head("hook_rot_q", query), key

    def _interface(
        self, functions: Any, tapped_eager: Callable[..., Any], eager: Callable[..., Any], name: str, default: Any
    ) -> Callable[..., Any]:
        """What the table of attention functions gives: the function asked for, with our points."""
        chosen = functions.get_interface(name, eager)
        return partial(self._attend, tapped_eager, chosen, "eager" if chosen is eager else name)

    def _attend(
        self,
        tapped_eager: Callable[..., Any],
        chosen: Callable[..., Any],
        name: str,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """In the place of an attention function."""
        looked_at = query.dtype is torch.float64 or self.is_live(*PATTERN_SITES)
        if looked_at and self.softmax_in != "function":
            raise UnsupportedModelError(self._in_another(name))

        def function(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Any:
            if not looked_at:
                return chosen(module, query, key, value, mask, **kwargs)
            if name != "eager":
                mask = self._mask_for_eager(name, mask, query, key)
            return tapped_eager(module, query, key, value, mask, **kwargs)

        if current_mixing() is not None and name not in ("eager", *OTHER_FUNCTIONS):
            raise UnsupportedModelError(_other_function(name, "mask cannot be taken apart by rows and positions"))
        return _mixed(function, self._by_head("hook_rot_q", query), key, value, attention_mask)

    def _in_method(
        self,
        method: Callable[..., Any],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Any:
        """In the place of a method that holds the softmax."""
        query = self._by_head("hook_rot_q", query)
        if not self.heads_first or current_mixing() is None:
            return _mixed(method, query, key, value, attention_mask)

        def positions_first(*given: Tensor | None) -> tuple[Tensor, Tensor]:
            z, pattern = method(*given)
            return z.transpose(1, 2), pattern

        z, _ = _mixed(positions_first, query, key, value, attention_mask)
        return z.transpose(1, 2), None

    def _mask_for_eager(self, name: str, mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
        """The additive mask ``[batch, 1, pos, key_pos]`` of the eager function, from what another one is given."""
        if name not in OTHER_FUNCTIONS:
            raise UnsupportedModelError(_other_function(name, "scores and pattern cannot be looked at"))
        if mask is None:  # no padding: everything before a position, itself included; a single query sees all keys
            length, keys = query.shape[-2], key.shape[-2]
            mask = torch.ones(length, keys, dtype=torch.bool, device=query.device).tril(keys - length)[None, None]
        if mask.dtype is not torch.bool:
            return mask
        added = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
        return added.masked_fill(~mask, torch.finfo(query.dtype).min)

    # -- points --------------------------------------------------------------------------------------------------------

    def results(self, z: Tensor) -> Tensor:
        """Each head's contribution without b_O, ``[batch, pos, n_heads, d_model]``, from ``z``, nothing firing."""
        output: Any = self.submodules["o"]
        return output.results(z)  # type: ignore[no-any-return]

    def _by_head(self, site: str, value_bnqh: Tensor) -> Tensor:
        """Show ``[batch, heads, pos, d_head]`` as ``[batch, pos, heads, d_head]``."""
        if not self.is_live(site):
            return value_bnqh
        return self.fire(site, value_bnqh.transpose(1, 2)).transpose(1, 2)

    def _show_pattern(self, pattern: Tensor) -> Tensor:
        # The softmax keeps its output for the backward pass: a hook that writes must not write there.
        return self.fire("hook_pattern", pattern, copy_before_edit=pattern.requires_grad)


def _mixed(function: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Any:
    """``function(query, key, value, mask)``, or what somebody who mixes values makes of it."""
    mixing = current_mixing()
    if mixing is None:
        return function(query, key, value, mask)

    def project() -> tuple[Tensor, Tensor, Tensor]:
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    return mixing(FunctionAttends(function), project), None


def _other_function(name: str, what: str) -> str:
    return (
        f"The model's attention is {name!r}, whose {what}: its mask is of another kind. Call "
        "bridge.set_attn_implementation('eager'), or 'sdpa'."
    )
