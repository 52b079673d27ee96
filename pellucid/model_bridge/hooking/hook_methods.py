"""The bridge's words for hooks and components, TransformerLens' names; the work is done in :mod:`hooks`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn
from typing_extensions import Self

from pellucid.arguments import check_choice, check_function, check_list, check_whole
from pellucid.config import TransformerBridgeConfig
from pellucid.errors import InputError
from pellucid.hook_points import (
    Direction,
    Directions,
    HookFunction,
    HookHandles,
    HookPoint,
    LensHandle,
    attach_for_good,
)
from pellucid.model_bridge.generalized_components import GeneralizedComponent
from pellucid.model_bridge.generalized_components.block import Blocks
from pellucid.model_bridge.hooking.hook_session import HookSession
from pellucid.model_bridge.hooking.hooks import HookDict, HookRequest, Hooks
from pellucid.model_bridge.hooking.mounting import ComponentTree
from pellucid.names import EXCLUDE_EACH_OTHER, SETTERS, Flag, HookIndex, HookSpec, NamesFilter
from pellucid.run_context import acts


class HookMethods:
    """Components, hook points, and functions on them."""

    original_model: nn.Module
    _tree: ComponentTree
    _hooks: Hooks

    def __repr__(self) -> str:
        cfg, model = self.cfg, type(self.original_model).__name__
        listed = "" if self._tree.adapter.family.listed else " (unlisted: points that were tried)"
        hooked = sum(1 for _ in self._tree.handles())
        return (
            f"{type(self).__name__} around {model}{listed}: {cfg.n_layers} layers, {cfg.n_heads} heads, "
            f"d_model {cfg.d_model}, d_vocab {cfg.d_vocab}, {str(cfg.dtype).removeprefix('torch.')} on {cfg.device}; "
            f"{hooked or 'no'} function{'' if hooked == 1 else 's'} attached\n"
            "  bridge.hook_dict lists the hook points, bridge.hf_model the modules, bridge.cfg the sizes"
        )

    # -- the model -----------------------------------------------------------------------------------------------------

    @property
    def hf_model(self) -> nn.Module:
        """The Hugging Face model, the very object the bridge was made from."""
        return self.original_model

    @property
    def cfg(self) -> TransformerBridgeConfig:
        """Sizes and switches; the vocabulary as it is now (``resize_token_embeddings``)."""
        return self._tree.cfg

    @property
    def adapter(self) -> Any:
        """The architecture's table."""
        return self._tree.adapter

    @property
    def blocks(self) -> list[GeneralizedComponent]:
        """The blocks, each with ``ln1``, ``attn``, ``ln2`` and ``mlp``."""
        return Blocks(self._tree.blocks)

    @property
    def embed(self) -> GeneralizedComponent:
        """``word_embeddings``."""
        return self._tree.components["embed"]

    @property
    def embed_ln(self) -> GeneralizedComponent:
        """``word_embeddings_layernorm``."""
        return self._tree.components["embed_ln"]

    @property
    def ln_final(self) -> GeneralizedComponent:
        """``ln_f``."""
        return self._tree.components["ln_final"]

    @property
    def unembed(self) -> GeneralizedComponent:
        """``lm_head``."""
        return self._tree.components["unembed"]

    def detach(self) -> nn.Module:
        """Take everything of ours off the model and give it back, the very same object.

        That includes functions of blocks and runs that are still open, in other threads too: what they hooked runs
        unhooked from here on.
        """
        self._tree.close_all()
        self.clear_contexts()
        return self.original_model

    def torch_hooks_go_to(self) -> str | None:
        """See :class:`~pellucid.hook_points.NoTorchHooks`."""
        return "Put it on bridge.hf_model or a module of it; bridge.add_hook attaches functions to hook points."

    @contextmanager
    def mounted_attention(self) -> Iterator[None]:
        """Let the bridge's own attention run in every layer, hooked or not, for the length of a ``with`` block.

        In a float64 model that includes whatever else Hugging Face would compute in float32.
        """
        wide = self._tree.computing_in_float64 if self._tree.is_float64() else []
        with HookSession(self._tree, components=[*self._tree.attentions(), *wide]).block():
            yield

    def has_torch_hooks(self) -> bool:
        """Whether somebody has put torch hooks of their own on the model; those that Hugging Face leaves there are none."""
        return self._tree.has_torch_hooks()

    # -- opt-in points -------------------------------------------------------------------------------------------------

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Switch ``blocks.{i}.attn.hook_result`` on or off: each head's contribution, ``[batch, pos, n_heads, d_model]``."""
        self._hooks.set_flag("use_attn_result", use_attn_result)

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Switch ``hook_q_input``, ``hook_k_input``, ``hook_v_input`` on or off: the residual before ln1, one copy a head.

        Raises:
            InputError: ``use_attn_in`` is on; the two would feed the same projections.
            UnsupportedModelError: the family has no such points.
        """
        if use_split_qkv_input and self.cfg.use_attn_in:
            raise InputError("use_attn_in is on: call set_use_attn_in(False) before set_use_split_qkv_input(True).")
        self._hooks.set_flag("use_split_qkv_input", use_split_qkv_input)

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Switch ``hook_attn_in`` on or off: the residual before ln1, one copy a head, for q, k and v together.

        Raises:
            InputError: ``use_split_qkv_input`` is on.
            UnsupportedModelError: the family has no such point: several heads of queries share one of keys.
        """
        if use_attn_in and self.cfg.use_split_qkv_input:
            raise InputError(
                "use_split_qkv_input is on: call set_use_split_qkv_input(False) before set_use_attn_in(True)."
            )
        self._hooks.set_flag("use_attn_in", use_attn_in)

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Switch ``blocks.{i}.hook_mlp_in`` on or off: a copy of the residual that feeds the MLP branch only.

        Raises:
            UnsupportedModelError: the family has no such point: nothing is normed before its MLP alone.
        """
        self._hooks.set_flag("use_hook_mlp_in", use_hook_mlp_in)

    def points_on(self, flags: Flag | Sequence[Flag]) -> AbstractContextManager[None]:
        """Opt-in hook points on for the length of a ``with`` block; then all are as they were, also after an exception.

        Args:
            flags: the points, by the flag of ``bridge.cfg`` that says they are on, such as ``"use_attn_result"``; none is
                allowed. ``use_attn_in`` and ``use_split_qkv_input`` exclude each other: if the other one is on, it is off
                meanwhile.

        Raises:
            InputError: no such flag; two that exclude each other.
            HookDisabledError: a function of the user's is on a point that has to be off, meanwhile or afterwards.
            UnsupportedModelError: the family has no such points.
        """
        asked = [flags] if isinstance(flags, str) else check_list("flags", flags, "names of flags", empty=True)
        for flag in asked:
            check_choice("flags", flag, tuple(SETTERS))
        if {*EXCLUDE_EACH_OTHER} <= {*asked}:
            raise InputError(
                f"{' and '.join(EXCLUDE_EACH_OTHER)} exclude each other; the two feed the same projections."
            )
        wanted: dict[Flag, bool] = dict.fromkeys(asked, True)
        if any(flag in asked for flag in EXCLUDE_EACH_OTHER):
            wanted |= {flag: flag in asked for flag in EXCLUDE_EACH_OTHER}
        return self._hooks.flags_set(wanted)

    # -- hooks ---------------------------------------------------------------------------------------------------------

    @property
    def hook_dict(self) -> HookDict:
        """Every hook point by name, see :class:`HookDict`."""
        return HookDict(self._tree)

    @property
    def hook_index(self) -> HookIndex:
        """The hook table: every point of the model, switched on or not."""
        return self._tree.index

    def hook_points(self) -> list[HookPoint]:
        """Every hook point, in firing order."""
        return list(self.hook_dict.values())

    def live_hooks(self) -> list[LensHandle]:
        """Functions attached to any point that act in this thread or task now."""
        return [handle for handle in self._tree.handles() if acts(handle.scope)]

    def get_hook_point(self, name: str) -> HookPoint:
        """The hook point called ``name``.

        Raises:
            HookNameError: no such name; the nearest ones are listed.
            HookDisabledError: an opt-in point that is off.
        """
        return self.hook_dict[name]

    def add_hook(
        self,
        name: NamesFilter,
        hook_fn: HookFunction,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> HookHandles:
        """Attach a function to the points that ``name`` matches, until it is removed or hooks are reset.

        It acts in every forward of the model, whichever thread runs it and whether the bridge or Hugging Face's model is
        called; for a function of one run or block use ``run_with_hooks`` or :meth:`hooks`.

        Args:
            name: a name, glob, list or predicate.
            hook_fn: called as ``hook_fn(tensor, hook=point)``.
            dir: ``"fwd"``, or ``"bwd"`` for gradients.
            is_permanent: keep it when hooks are reset.
            level: a context level of the caller's own, by which ``reset_hooks(level=)`` finds it.
            prepend: run it before the functions already there.

        Returns:
            One handle a point, in a tuple whose ``remove()`` takes off all of them.

        Raises:
            HookNameError: ``name`` matches nothing.
            HookDisabledError: an opt-in point that is off.
        """
        check_function("hook_fn", hook_fn, "a function of a tensor and its hook point")
        check_choice("dir", dir, ("fwd", "bwd"))
        chosen = self._hooks.select(name, dir, "name")
        depth = None if level is None else check_whole("level", level)
        handles = [
            LensHandle(self._tree.point(spec.name), hook_fn, dir, asked, is_permanent, level=depth)
            for spec, asked in chosen
        ]
        return attach_for_good(handles, self._tree, prepend)

    def add_perma_hook(self, name: NamesFilter, hook_fn: HookFunction, dir: Direction = "fwd") -> HookHandles:
        """Attach a function that ``reset_hooks`` keeps, unless ``including_permanent=True``."""
        return self.add_hook(name, hook_fn, dir=dir, is_permanent=True)

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Sequence[HookRequest] = (),
        bwd_hooks: Sequence[HookRequest] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[Self]:
        """Functions for the length of a ``with`` block, in this thread or task only.

        Every name is checked before anything is attached. Blocks nest and may end in any order; when one ends, by an
        exception too, its functions are gone and all others are as they were.

        Args:
            fwd_hooks: ``(name, glob, list or predicate, function)`` pairs, in the order in which they run.
            bwd_hooks: the same for gradients.
            reset_hooks_end: ``False`` leaves the functions on after the block, as if added with :meth:`add_hook`.
            clear_contexts: empty the ``ctx`` of every point at the end.
        """
        handles = self._hooks.requests(fwd_hooks, "fwd") + self._hooks.requests(bwd_hooks, "bwd")
        with HookSession(self._tree, handles, keep=not reset_hooks_end).block():
            try:
                yield self
            finally:
                if clear_contexts:
                    self.clear_contexts()

    def reset_hooks(
        self,
        clear_contexts: bool = True,
        direction: Directions = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Remove functions that act here, permanent ones only if told so; of context ``level`` only if given.

        Blocks and runs of other threads keep theirs, and so does a cache that is being made.
        """
        self._hooks.reset(clear_contexts, direction, including_permanent, level)

    def remove_all_hook_fns(
        self, direction: Directions = "both", including_permanent: bool = False, level: int | None = None
    ) -> None:
        """Remove functions and leave every point's ``ctx``."""
        self.reset_hooks(False, direction, including_permanent, level)

    def clear_contexts(self) -> None:
        """Empty the ``ctx`` of every hook point."""
        self._hooks.clear_contexts()

    def list_hooks(
        self, name_filter: NamesFilter = None, dir: Directions = "both", including_permanent: bool = True
    ) -> dict[str, list[LensHandle]]:
        """Attached functions by canonical name; points without any are left out."""
        return self._hooks.attached(name_filter, dir, including_permanent)

    def hook_spec(self, name: str) -> HookSpec:
        """The line of the hook table for a point: its axes, dtype, other names and what it holds.

        Raises:
            HookNameError: no such name.
        """
        return self._tree.index[name]
