"""A model with hook points: finding them, attaching functions, and taking them away again.

What tokens are and how a run is made is not known here; the bridge adds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

from torch import Tensor, nn

from pellucid.config import TransformerBridgeConfig
from pellucid.errors import GradientError, HookDisabledError, HookUnreachableError, InputError
from pellucid.hook_points import Direction, Directions, HookFunction, HookPoint, LensHandle, detach_quietly
from pellucid.model_bridge.generalized_components import GeneralizedComponent
from pellucid.model_bridge.mounting import ComponentTree, Needs
from pellucid.names import Flag, HookSpec, NamesFilter
from pellucid.run_context import Scope, acts, open_scopes, set_open_scopes

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


class Attached(Scope):
    """Functions attached for the length of a block, which is their scope: blocks may end in any order, in any thread.

    A class, where a generator would do, and few methods: it is on the way of every run with hooks, where each Python call
    costs microseconds.

    Args:
        tree: the components.
        handles: the functions, forward ones first.
        keep: leave them on after the block, as if added for good.
        needed: the components they need mounted and how many of them need each, counted if not known.

    Raises:
        GradientError: gradients are wanted on two ways that exclude each other.
    """

    def __init__(
        self, tree: ComponentTree, handles: Sequence[LensHandle], keep: bool = False, needed: Needs | None = None
    ) -> None:
        self._tree, self._handles, self._keep = tree, handles, keep
        if needed is None:
            needed = tree.needs[handles[0].point] if len(handles) == 1 else tree.needed_by(handles)
        self._needed = needed

    def __enter__(self) -> None:
        tree, handles = self._tree, self._handles
        if handles and handles[-1].direction == "bwd":
            refuse_parallel_gradients(tree, handles)
        tree.retain(self._needed)
        try:
            scopes = open_scopes()
            self.level = len(scopes) + 1
            set_open_scopes((*scopes, self))
            for handle in handles:
                handle.scope = self
                (handle.point.fwd_hooks if handle.direction == "fwd" else handle.point.bwd_hooks).append(handle)
        except BaseException:  # an interrupt: those that were not attached yet need nothing any more, too
            detach_quietly(handles)
            tree.release(self._needed)
            self._handles, self._needed = (), Needs()
            self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        self.closed = True
        scopes = open_scopes()
        set_open_scopes(() if scopes == (self,) else tuple(scope for scope in scopes if not scope.closed))
        tree, handles, self._handles = self._tree, self._handles, ()  # which know this scope: no circle is left
        if self._keep:
            for handle in handles:
                handle.scope = None
            return
        gone = detach_quietly(handles)
        # One that was removed on the way has released what it needed.
        tree.release(self._needed if len(gone) == len(handles) else tree.needed_by(gone))


class HookedModel(nn.Module):
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

    # -- the model -----------------------------------------------------------------------------------------------------

    @property
    def hf_model(self) -> nn.Module:
        """The Hugging Face model, the very object the bridge was made from."""
        return self.original_model

    @property
    def cfg(self) -> TransformerBridgeConfig:
        """Sizes and switches."""
        return self._tree.cfg

    @property
    def adapter(self) -> Any:
        """The architecture's table."""
        return self._tree.adapter

    @property
    def blocks(self) -> list[GeneralizedComponent]:
        """The blocks, each with ``ln1``, ``attn``, ``ln2`` and ``mlp``."""
        return self._tree.blocks

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
        """Take everything of ours off the model and give it back, the very same object."""
        self.reset_hooks(including_permanent=True)
        return self.original_model

    @contextmanager
    def mounted_attention(self) -> Iterator[None]:
        """Let the bridge's own attention run in every layer, hooked or not, for the length of a ``with`` block."""
        with self._tree.mounted(self._tree.attentions()):
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
    ) -> list[LensHandle]:
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
            One handle a point, with ``remove()``.

        Raises:
            HookNameError: ``name`` matches nothing.
            HookDisabledError: an opt-in point that is off.
        """
        chosen = self._select(name, dir, "name")
        with ExitStack() as undo:
            handles = []
            for spec, asked in chosen:
                point = self._tree.point(spec.name)
                handle = point.attach(LensHandle(point, hook_fn, dir, asked, is_permanent), prepend=prepend)
                undo.callback(handle.remove)
                handles.append(handle)
            undo.pop_all()
        return handles

    def add_perma_hook(self, name: NamesFilter, hook_fn: HookFunction, dir: Direction = "fwd") -> list[LensHandle]:
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
        with Attached(self._tree, handles, keep=not reset_hooks_end):
            try:
                yield self
            finally:
                if clear_contexts:
                    self.clear_contexts()

    def _requests(
        self, requests: Sequence[HookRequest], direction: Direction, span: tuple[int, int] | None = None
    ) -> list[LensHandle]:
        handles = []
        named = self._tree.named
        for request in requests:
            if not isinstance(request, (tuple, list)) or len(request) != 2:
                raise InputError(f"Hooks are a list of (name, function) pairs; found {request!r} in it.")
            names_filter, function = request
            if not callable(function):
                raise InputError(
                    f"A hook is (name, function); found {function!r} as the function for {names_filter!r}."
                )
            if span is None and isinstance(names_filter, str) and names_filter in named:
                handles.append(LensHandle(named[names_filter], function, direction, names_filter))
                continue
            for spec, asked in self._select(names_filter, direction, "a hook's name", span):
                point = self._tree.point(spec.name)
                if asked == names_filter and spec.flag is None and spec.kind != "int":
                    named[asked] = point  # nothing can refuse this name: it need not be looked up again
                handles.append(LensHandle(point, function, direction, asked))
        return handles

    def _select(
        self, names_filter: NamesFilter, direction: Direction, argument: str, span: tuple[int, int] | None = None
    ) -> list[tuple[HookSpec, str]]:
        if direction not in ("fwd", "bwd"):
            raise InputError(f"dir is 'fwd' or 'bwd'; found {direction!r}.")
        chosen = self._tree.index.select(names_filter, self.cfg.flags, argument=argument)
        if direction == "bwd":
            integers = [spec.name for spec, _ in chosen if spec.kind == "int"]
            if integers:
                raise GradientError(f"{integers[0]} holds token ids, which have no gradient.")
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
        """Remove functions, permanent ones only if told so; of context ``level`` only if given."""
        for point in list(self._tree.live_points()):
            point.remove_hooks(direction, including_permanent, level)
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


def runs_through(spec: HookSpec, start: int, stop: int, n_layers: int) -> bool:
    """Whether a run that is given the residual entering block ``start`` and ends before block ``stop`` fires a point.

    ``start`` is -1 for a run from the tokens, ``stop`` is ``n_layers + 1`` for one to the logits.
    """
    if spec.layer is not None:
        enters = spec.site == "hook_in" and spec.component == f"blocks.{stop}"
        return start <= spec.layer < stop or enters
    before = spec.component in ("embed", "embed_ln")
    return start < 0 if before else stop > n_layers


def refuse_parallel_gradients(tree: ComponentTree, handles: Sequence[LensHandle]) -> None:
    """A per-head input is a second way to the same projection: the gradient can flow through it or around it.

    Raises:
        GradientError: gradients are wanted on both ways of one layer.
    """
    wanted = [tree.index[str(handle.point.name)] for handle in handles if handle.direction == "bwd"]
    per_head = {spec.layer: spec.name for spec in wanted if spec.flag in ("use_attn_in", "use_split_qkv_input")}
    for spec in wanted:
        after_norm = spec.component == f"blocks.{spec.layer}.ln1" or spec.site in (
            "hook_q_in",
            "hook_k_in",
            "hook_v_in",
        )
        if after_norm and spec.layer in per_head:
            raise GradientError(
                f"The gradients at {per_head[spec.layer]} and at {spec.name} exclude each other: queries, keys and "
                "values are made from the one or from the other. Take them in two runs."
            )
