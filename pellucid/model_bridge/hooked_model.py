"""A model with hook points: finding them, attaching functions, and taking them away again.

What tokens are and how a run is made is not known here; the bridge adds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import Tensor, nn

from pellucid.arguments import check_function, check_list
from pellucid.config import TransformerBridgeConfig
from pellucid.errors import GradientError, HookDisabledError, HookUnreachableError, InputError
from pellucid.hook_points import (
    Direction,
    Directions,
    HookFunction,
    HookHandles,
    HookPoint,
    LensHandle,
    NoTorchHooks,
    attach_for_good,
)
from pellucid.model_bridge.generalized_components import GeneralizedComponent
from pellucid.model_bridge.generalized_components.block import Blocks
from pellucid.model_bridge.generalized_components.weights import adapted
from pellucid.model_bridge.hook_session import HookSession
from pellucid.model_bridge.mounting import ComponentTree
from pellucid.names import FROM_EMBEDDINGS, Flag, HookIndex, HookSpec, NamesFilter, runs_through, table_of_points
from pellucid.run_context import acts
from pellucid.tables import NamesView, Table

HookRequest: TypeAlias = tuple[NamesFilter, HookFunction]
"""``(name, glob, list or predicate, function)``."""


class HookDict(Mapping[str, HookPoint]):
    """Hook points by name. Iterates each point once, under its canonical name; look-up takes either name.

    Opt-in points that are off are absent; looking one up says which call switches it on.
    """

    def __init__(self, tree: ComponentTree) -> None:
        self._tree = tree

    def __getitem__(self, name: str) -> HookPoint:
        self._tree.index.select(name, self._tree.cfg.flags)
        return self._tree.point(name)

    def __iter__(self) -> Iterator[str]:
        return (spec.name for spec, _ in self._tree.index.select(None, self._tree.cfg.flags))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        if name not in self._tree.index:
            return False
        spec = self._tree.index[str(name)]
        return spec.flag is None or self._tree.cfg.flags[spec.flag]

    def keys(self) -> NamesView:
        """Canonical names in firing order; a notebook shows them as a table."""
        return NamesView(self)

    def _table(self) -> Table:
        specs = [spec for spec, _ in self._tree.index.select(None, self._tree.cfg.flags)]
        return table_of_points("HookDict (bridge.explain(name) says what one holds)", specs)

    def __repr__(self) -> str:
        return str(self._table())

    def _repr_html_(self) -> str:
        return self._table().html()


class HookedModel(NoTorchHooks):
    """A Hugging Face model and the hook points on it.

    Parameters, buffers and state are the Hugging Face model's own, under its own names: nothing is added or copied.

    Args:
        model: the model as the user has it, wrapped or not.
        tree: the components of the BLOOM inside it.
    """

    def __init__(self, model: nn.Module, tree: ComponentTree) -> None:
        super().__init__()
        self.original_model = model
        self._tree = tree

    def __repr__(self) -> str:
        cfg, model = self.cfg, type(self.original_model).__name__
        hooked = sum(1 for _ in self._tree.handles())
        return (
            f"{type(self).__name__} around {model}: {cfg.n_layers} layers, {cfg.n_heads} heads, d_model {cfg.d_model}, "
            f"d_vocab {cfg.d_vocab}, {str(cfg.dtype).removeprefix('torch.')} on {cfg.device}; "
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
        cfg = self._tree.cfg
        table = adapted(self._tree.embedding())._parameters.get("weight")
        if table is not None and table.shape[0] != cfg.d_vocab:
            cfg.d_vocab = table.shape[0]
        return cfg

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

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The Hugging Face model's parameters under its own names."""
        return self.original_model.named_parameters(prefix, recurse, remove_duplicate)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """The Hugging Face model's buffers under its own names."""
        return self.original_model.named_buffers(prefix, recurse, remove_duplicate)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The Hugging Face model's state under its own names."""
        return self.original_model.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict of the Hugging Face model."""
        return self.original_model.load_state_dict(state_dict, strict=strict, assign=assign)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Hugging Face's ``save_pretrained``."""
        model: Any = self.original_model
        return model.save_pretrained(*args, **kwargs)

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
        """Let the bridge's own attention run in every layer, hooked or not, for the length of a ``with`` block."""
        with HookSession(self._tree, components=self._tree.attentions()).block():
            yield

    def has_torch_hooks(self) -> bool:
        """Whether somebody has put torch hooks of their own on the model."""
        return self._tree.has_torch_hooks()

    # -- opt-in points -------------------------------------------------------------------------------------------------

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Switch ``blocks.{i}.attn.hook_result`` on or off: each head's contribution, ``[batch, pos, n_heads, d_model]``."""
        self._set_flag("use_attn_result", use_attn_result)

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Switch ``hook_q_input``, ``hook_k_input``, ``hook_v_input`` on or off: the residual before ln1, one copy a head.

        Raises:
            InputError: ``use_attn_in`` is on; the two would feed the same projections.
        """
        if use_split_qkv_input and self.cfg.use_attn_in:
            raise InputError("use_attn_in is on: call set_use_attn_in(False) before set_use_split_qkv_input(True).")
        self._set_flag("use_split_qkv_input", use_split_qkv_input)

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Switch ``hook_attn_in`` on or off: the residual before ln1, one copy a head, for q, k and v together.

        Raises:
            InputError: ``use_split_qkv_input`` is on.
        """
        if use_attn_in and self.cfg.use_split_qkv_input:
            raise InputError(
                "use_split_qkv_input is on: call set_use_split_qkv_input(False) before set_use_attn_in(True)."
            )
        self._set_flag("use_attn_in", use_attn_in)

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Switch ``blocks.{i}.hook_mlp_in`` on or off: a copy of the residual that feeds the MLP branch only."""
        self._set_flag("use_hook_mlp_in", use_hook_mlp_in)

    def _set_flag(self, flag: Flag, value: bool) -> None:
        if not value:
            for handle in list(self._tree.handles()):
                spec = self._tree.index[str(handle.point.name)]
                if spec.flag == flag:
                    raise HookDisabledError(
                        f"A hook is on {spec.name}; remove it (reset_hooks) before switching {flag} off."
                    )
        setattr(self.cfg, flag, bool(value))

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
        called; for a function of one run or block use :meth:`run_with_hooks` or :meth:`hooks`.

        Args:
            name: a name, glob, list or predicate.
            hook_fn: called as ``hook_fn(tensor, hook=point)``.
            dir: ``"fwd"``, or ``"bwd"`` for gradients.
            is_permanent: keep it when hooks are reset.
            level: accepted for TransformerLens' callers, decided by :meth:`hooks`.
            prepend: run it before the functions already there.

        Returns:
            One handle a point, in a tuple whose ``remove()`` takes off all of them.

        Raises:
            HookNameError: ``name`` matches nothing.
            HookDisabledError: an opt-in point that is off.
        """
        check_function("hook_fn", hook_fn, "a function of a tensor and its hook point")
        chosen = self._select(name, dir, "name")
        handles = [LensHandle(self._tree.point(spec.name), hook_fn, dir, asked, is_permanent) for spec, asked in chosen]
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
    ) -> Iterator[HookedModel]:
        """Functions for the length of a ``with`` block, in this thread or task only.

        Every name is checked before anything is attached. Blocks nest and may end in any order; when one ends, by an
        exception too, its functions are gone and all others are as they were.

        Args:
            fwd_hooks: ``(name, glob, list or predicate, function)`` pairs, in the order in which they run.
            bwd_hooks: the same for gradients.
            reset_hooks_end: ``False`` leaves the functions on after the block, as if added with :meth:`add_hook`.
            clear_contexts: empty the ``ctx`` of every point at the end.
        """
        handles = self._requests(fwd_hooks, "fwd") + self._requests(bwd_hooks, "bwd")
        with HookSession(self._tree, handles, keep=not reset_hooks_end).block():
            try:
                yield self
            finally:
                if clear_contexts:
                    self.clear_contexts()

    def _requests(
        self, requests: Sequence[HookRequest], direction: Direction, span: tuple[int, int] | None = None
    ) -> list[LensHandle]:
        handles = []
        for request in check_list(f"{direction}_hooks", requests, "(name, function) pairs", empty=True):
            if not isinstance(request, (tuple, list)) or len(request) != 2:
                raise InputError(f"{direction}_hooks is a list of (name, function) pairs; found {request!r} in it.")
            names_filter, function = request
            if not callable(function):
                raise InputError(
                    f"A hook is (name, function); found {function!r} as the function for {names_filter!r}."
                )
            for spec, asked in self._select(names_filter, direction, "a hook's name", span):
                handles.append(LensHandle(self._tree.point(spec.name), function, direction, asked))
        return handles

    def _select(
        self, names_filter: NamesFilter, direction: Direction, argument: str, span: tuple[int, int] | None = None
    ) -> list[tuple[HookSpec, str]]:
        if direction not in ("fwd", "bwd"):
            raise InputError(f"dir is 'fwd' or 'bwd'; found {direction!r}.")
        everything: Any = names_filter
        if everything is True:
            names_filter = None
        chosen = self._tree.index.select(names_filter, self.cfg.flags, argument=argument)
        if direction == "bwd":
            named = [names_filter] if isinstance(names_filter, str) else [] if callable(names_filter) else names_filter
            exact = set(named or ()) & {name for spec, _ in chosen for name in (spec.name, *spec.aliases)}
            integers = [(spec, asked) for spec, asked in chosen if spec.kind == "int"]
            if any(asked in exact for _, asked in integers) or len(integers) == len(chosen):
                raise GradientError(f"{integers[0][0].name} holds token ids, which have no gradient.")
            chosen = [
                pair for pair in chosen if pair not in integers
            ]  # a glob or a predicate means those that have one
        return chosen if span is None else self._reachable(chosen, names_filter, span)

    def _reachable(
        self, chosen: list[tuple[HookSpec, str]], names_filter: NamesFilter, span: tuple[int, int]
    ) -> list[tuple[HookSpec, str]]:
        """Points that a run from block ``start`` up to block ``stop`` passes; a named one it does not pass is refused."""
        start, stop = span
        passed = [(spec, asked) for spec, asked in chosen if runs_through(spec, start, stop, self.cfg.n_layers)]
        entries = (
            [names_filter] if isinstance(names_filter, str) or callable(names_filter) else list(names_filter or ())
        )
        names = {spec.name for spec, _ in passed}
        for entry in entries:
            met = self._tree.index.select(entry, self.cfg.flags)
            if not any(spec.name in names for spec, _ in met):
                limits = [f"start_at_layer={start}"] if start >= 0 else []
                limits += ["inputs_embeds"] if start == FROM_EMBEDDINGS else []
                limits += [f"stop_at_layer={stop}"] if stop <= self.cfg.n_layers else []
                what = repr(entry) if isinstance(entry, str) else "What the predicate matches"
                raise HookUnreachableError(
                    f"{what} is not on the way of a run with {' and '.join(limits)}: nothing would be hooked there."
                )
        return passed

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
        for point in list(self._tree.live_points()):
            chosen = [
                handle
                for handle in point.handles(direction, including_permanent)
                if _is_resettable(handle) and (level is None or handle.context_level == level)
            ]
            if chosen:
                point.drop(chosen.__contains__)
        self._tree.sync()
        if clear_contexts:
            self.clear_contexts()

    def remove_all_hook_fns(
        self, direction: Directions = "both", including_permanent: bool = False, level: int | None = None
    ) -> None:
        """Remove functions and leave every point's ``ctx``."""
        self.reset_hooks(False, direction, including_permanent, level)

    def clear_contexts(self) -> None:
        """Empty the ``ctx`` of every hook point."""
        for point in self._tree.live_points():
            point.clear_context()

    def list_hooks(
        self, name_filter: NamesFilter = None, dir: Directions = "both", including_permanent: bool = True
    ) -> dict[str, list[LensHandle]]:
        """Attached functions by canonical name; points without any are left out."""
        chosen = {spec.name for spec, _ in self._tree.index.select(name_filter, self.cfg.flags)}
        found: dict[str, list[LensHandle]] = {}
        for point in self._tree.live_points():
            handles = point.handles(dir, including_permanent)
            if handles and point.name in chosen:
                found[str(point.name)] = handles
        return found

    def hook_spec(self, name: str) -> HookSpec:
        """The line of the hook table for a point: its axes, dtype, other names and what it holds.

        Raises:
            HookNameError: no such name.
        """
        return self._tree.index[name]

    def explain(self, name: str) -> str:
        """What a hook point holds: its shape, dtype, other names and the module it stands on, in a few lines."""
        spec = self._tree.index[name]
        component = self._tree.components[spec.component]
        dtype = {"model": str(self.cfg.dtype), "wide": "float32 at least", "int": "int64"}[spec.kind]
        lines = [
            f"{spec.name}: {spec.doc}",
            f"  shape   [{', '.join(spec.axes)}], {dtype}",
            f"  module  {component.path} ({type(component.module).__name__})",
        ]
        if spec.aliases:
            lines.append(f"  also    {', '.join(spec.aliases)}")
        if spec.flag is not None:
            state = "on" if self.cfg.flags[spec.flag] else "off"
            lines.append(f"  opt-in  {spec.flag} is {state}")
        if self.cfg.apply_residual_connection_post_layernorm and spec.site in ("hook_in", "hook_out"):
            lines.append("  note    this model takes the residual after the layer norm")
        return "\n".join(lines)


def _is_resettable(handle: LensHandle) -> bool:
    return acts(handle.scope) and (handle.scope.everywhere or not handle.reads_only)
